"""Options of `internvl data make-pairs`."""

from dataclasses import dataclass
from pathlib import Path

from internvl.data.arguments import check_number, check_whole, nearest
from internvl.errors import UserError
from internvl.evals.pairing.choosing import CORRECTNESS, DROPOUT_NTP
from internvl.evals.pairing.forms import NAMES
from internvl.evals.pairing.rules import RULES
from internvl.inference.settings import Settings

METHODS = ("auto", CORRECTNESS, DROPOUT_NTP)
"""auto: by correctness where a rule can compare the reference, else by leaving out the image."""


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How pairs are made.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    annotations: Path
    """Questions with reference answers, JSONL or JSON."""
    images: Path = Path(".")
    """Folder that paths of images and videos are relative to."""
    method: str = "auto"
    """One of METHODS."""
    rule: str = "auto"
    """Rule that calls answers right, one of RULES; auto: by what the references are."""
    form: str = "plain"
    """What a question asks for, one of `forms.NAMES`."""
    samples: int = 8
    """Answers to a question, by correctness."""
    continuations: int = 1
    """Continuations of an answer without its image."""
    begin: float = 0.5
    """Share of an answer's words that is continued."""
    per_question: int = 15
    """Most pairs of a question, of right and wrong answers and of form."""
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    limit: int | None = None
    """Questions to ask, the first ones."""
    tiles: str | None = None
    """Most tiles of an image, or "one"; None: the checkpoint's."""
    frames: int = 8
    """Frames of a video."""
    tolerance: float = 0.0
    """Largest relative error of a right number."""
    batch_size: int | None = None
    """Answers of a batch, all in flight; None: what the device holds."""
    on_bad_sample: str = "raise"
    """raise, or skip to leave out what cannot be read."""

    def __post_init__(self) -> None:
        for key, names in (
            ("method", METHODS),
            ("rule", ("auto", *RULES)),
            ("form", NAMES),
            ("on_bad_sample", ("raise", "skip")),
        ):
            value = getattr(self, key)
            if value not in names:
                raise UserError(f"there is no {key} {value!r}; {nearest(value, names)}")
        # A pair takes two.
        check_whole("samples", self.samples, 2)
        for key in ("continuations", "per_question", "frames"):
            check_whole(key, getattr(self, key), 1)
        for key in ("limit", "batch_size"):
            if getattr(self, key) is not None:
                check_whole(key, getattr(self, key), 1)
        check_whole("seed", self.seed, 0)
        check_number("begin", self.begin, above=0, most=1)
        # Greedy answers of a question would all be equal.
        check_number("temperature", self.temperature, above=0)
        # A word or a number, as evaluations take it.
        if self.tiles not in (None, "one", "checkpoint") and not str(self.tiles).isdecimal():
            raise UserError(f"tiles must be one, checkpoint or a number, not {self.tiles!r}")
        # For its checks: a setting out of range must not wait for the model.
        self.settings()

    def settings(self) -> Settings:
        """Returns the settings of an answer, but for its seed."""
        return Settings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
