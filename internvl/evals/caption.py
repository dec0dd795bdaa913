"""Captions: a generated text for every picture of a COCO caption file against its references."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internvl.config import EvalConfig, UserError
from internvl.data.images import BadImage, join_inside
from internvl.evals import metrics
from internvl.evals.scores import Scores
from internvl.generate import Request, Settings, answers
from internvl.log import Progress

CHAT_PROMPT = "Provide a one-sentence caption for the provided image."
DUAL_PROMPT = "English caption:"
"""The originals' only prompts; `<image>` comes before the first."""

DUAL_BEAMS = 5


class Caption:
    """Exact-match accuracy, average length in words, BLEU, METEOR, ROUGE-L and CIDEr.

    Data: COCO caption JSON; prompt: the recipe's, or the original's for the kind of model;
    metrics: evals/metrics.py.

    Raises:
        UserError: the file is missing or not in COCO form.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.references: dict[int, list[str]] = {}
        try:
            tree = _read(config.annotations)
            self.images: dict[int, str] = {
                number: join_inside(config.images, Path(name).name if config.flat else name)
                for number, name in self._listed(tree)
            }
            for row in tree["annotations"]:
                self.references.setdefault(row["image_id"], []).append(row["caption"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            what = f"key {error} missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{config.annotations} is not a COCO caption file: {what}") from None
        self.ids = [i for i in self.images if i in self.references][: config.limit]
        if not self.ids:
            raise UserError(f"{config.annotations} has no image with a caption")

    def _listed(self, tree: Any) -> Iterator[tuple[int, str]]:
        """(id, name) of every picture."""
        if self.config.pictures is None:
            for row in tree["images"]:
                yield row["id"], row["file_name"] if "file_name" in row else row["image"]
            return
        for row in _read(self.config.pictures):
            yield int(Path(row["image"]).stem.rpartition("_")[2]), row["image"]

    def pictures(self) -> Sequence[str]:
        """Every picture that will be opened, in the order of `ids`."""
        return [self.images[i] for i in self.ids]

    def run(self, handle: Any, folder: Path | None) -> Scores:
        """Generates with `handle` (Chat or Dual) and scores."""
        generate = _dual_texts if hasattr(handle, "caption") else _chat_texts
        try:
            texts = generate(handle, self.pictures(), self.config)
        except BadImage as error:
            raise UserError(f"{self.config.annotations}: {error}") from None
        found = dict(zip(self.ids, texts, strict=True))
        references = {i: self.references[i] for i in self.ids}
        values = {
            "exact": metrics.exact_match(found, references),
            "average_length": sum(len(text.split()) for text in texts) / len(texts),
        }
        if self.config.metrics == "all":
            values |= metrics.caption_scores(found, references, tokenize=self.config.tokenize)
        return Scores(values, list(self._rows(found)))

    def _rows(self, found: dict[int, str]) -> Iterator[dict[str, Any]]:
        for i in self.ids:
            yield {
                "image": self.images[i],
                "image_id": i,
                "references": self.references[i],
                "answer": found[i],
                "exact": metrics.exact_match({i: found[i]}, {i: self.references[i]}) == 1.0,
            }


def _chat_texts(chat: Any, pictures: Sequence[str], config: EvalConfig) -> list[str]:
    """Answers of a chat model, in the order of the pictures."""
    message = {"role": "user", "content": f"<image>\n{config.prompt or CHAT_PROMPT}"}
    settings = Settings(config.max_new_tokens, config.min_new_tokens, config.num_beams or 1)
    with Progress("answers", total=len(pictures)) as progress:
        return answers(
            chat.model,
            chat.encoder,
            chat.tiles,
            [Request([message], [picture]) for picture in pictures],
            settings,
            batch_size=config.batch_size,
            progress=progress.update,
        )


def _dual_texts(dual: Any, pictures: Sequence[str], config: EvalConfig) -> list[str]:
    """Captions of InternVL-G, in the order of the pictures."""
    found: list[str] = []
    with Progress("captions", total=len(pictures)) as progress:
        for start in range(0, len(pictures), config.batch_size):
            some = pictures[start : start + config.batch_size]
            found += dual.caption(
                some,
                prompt=config.prompt or DUAL_PROMPT,
                num_beams=config.num_beams or DUAL_BEAMS,
                max_new_tokens=config.max_new_tokens,
                min_new_tokens=config.min_new_tokens,
                batch_size=config.batch_size,
            )
            progress.update(len(some))
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no annotation file {path}") from None
