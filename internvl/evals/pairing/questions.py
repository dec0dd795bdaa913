"""Questions with reference answers: chat rows as training reads them, or question and answer.

question, answer          the original's prompts; `answers` are several references
question, chosen          a good answer alone, to be continued without the image
conversations, messages   the last question is asked; its answer is the reference
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl.config import SourceConfig
from internvl.data import formats
from internvl.data.json_rows import parse_row
from internvl.data.records import Sample
from internvl.data.sources import LineSource, open_source
from internvl.errors import BadSample, UserError
from internvl.evals.scoring.answers import Reference

_MEDIA = ("image", "images", "video", "videos", "clip")


@dataclass(frozen=True)
class Question:
    """A question and what its answers are compared with."""

    row: Mapping[str, Any]
    """As it lies in the file."""
    sample: Sample
    """Its messages end with a reference answer."""
    reference: Reference

    @property
    def name(self) -> str:
        """File and line, for messages."""
        return self.sample.name

    @property
    def text(self) -> str:
        """The question itself, with its marks."""
        return self.sample.messages[-2].content

    @property
    def key(self) -> str:
        """Returns a hash of media and texts, whatever the reference and the place in the file."""
        content = [self.media, [m.content for m in self.sample.messages[:-1]]]
        digest = blake2b(json.dumps(content, default=str).encode(), digest_size=12)
        return digest.hexdigest()

    @property
    def media(self) -> dict[str, Any]:
        """Images and videos as the file has them."""
        return {key: self.row[key] for key in _MEDIA if self.row.get(key) is not None}


def read(
    annotations: Path, images: Path, *, tolerance: float = 0.0
) -> Iterator[Question | BadSample]:
    """Yields the questions of a JSONL or JSON file; BadSample in place of a bad row.

    Args:
        images: folder that paths of images and videos are relative to.
        tolerance: largest relative error of a number.

    Raises:
        DataError: the file cannot be read.
        UserError: no file, or a table, whose images have no path that pairs could name.
    """
    # No recipe names this source, as `open_source` would say.
    if not annotations.exists():
        raise UserError(f"there is no file of questions {annotations}; check --annotations")
    config = SourceConfig(
        name="questions",
        type="chat",
        annotations=annotations,
        images=images,
        insert_image_mark=True,
    )
    source = open_source(config)
    # Also tars and caption files, which become lines of ours in the cache.
    if not isinstance(source, LineSource) or source.converted:
        raise UserError(
            f"{annotations}: pairs name the images of their questions, so a JSONL file with paths "
            "is needed; write one"
        )
    for position, line in enumerate(source.index.lines(range(len(source))), start=1):
        name = f"{annotations} {source.unit} {position}"
        try:
            yield _question(name, parse_row(name, line), config, tolerance)
        except BadSample as bad:
            yield bad


def _question(name: str, row: Any, config: SourceConfig, tolerance: float) -> Question:
    texts = _listed_references(name, row)
    if isinstance(row.get("question"), str):
        if not texts:
            raise BadSample(name, "there is no reference; write `answer`, `answers` or `chosen`")
        # As a conversation, so that marks and paths are read as in training.
        turns = [("human", row["question"]), ("gpt", texts[0])]
        media = {key: row[key] for key in _MEDIA if row.get(key) is not None}
        sample = formats.chat(
            name, {**media, "conversations": [{"from": f, "value": v} for f, v in turns]}, config
        )
    else:
        sample = formats.chat(name, row, config)
    if len(sample.messages) < 2 or sample.messages[-1].role != "assistant":
        raise BadSample(name, "it does not end with an answer, which would be the reference")
    # Now, not after hours of answers.
    for path in [*sample.images, *(video.path for video in sample.videos)]:
        if isinstance(path, str) and "://" not in path and not Path(path).exists():
            raise BadSample(name, f"there is no {path}")
    # `answers` stand beside a conversation as in evaluations of type qa.
    references = texts or [sample.messages[-1].content]
    return Question(row, sample, Reference(references, sample.messages[-2].content, tolerance))


def _listed_references(name: str, row: Mapping[str, Any]) -> list[str]:
    for key in ("answers", "answer", "chosen"):
        if row.get(key) is None:
            continue
        # Numbers are usual in the original's files.
        values = row[key] if isinstance(row[key], list) else [row[key]]
        texts = [str(value).strip() for value in values if isinstance(value, str | int | float)]
        if len(texts) != len(values) or not all(texts) or not texts:
            raise BadSample(name, f"`{key}` must be a text or a number, or a list of them")
        return texts
    return []
