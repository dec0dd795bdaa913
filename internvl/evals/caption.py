"""Captions: a generated text for every picture of a COCO caption file against its references."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from internvl.config import EvalConfig, UserError
from internvl.data.images import BadImage, join_inside
from internvl.evals import metrics
from internvl.generate import Request


class Caption:
    """Exact-match accuracy, BLEU, METEOR, ROUGE-L and CIDEr of greedy answers.

    Data: COCO caption JSON; prompt: the recipe's; metrics: evals/metrics.py.

    Raises:
        UserError: the file is missing or not in COCO form.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.references: dict[int, list[str]] = {}
        try:
            tree = json.loads(config.annotations.read_text(encoding="utf-8"))
            self.images: dict[int, str] = {
                row["id"]: join_inside(config.images, row["file_name"]) for row in tree["images"]
            }
            for row in tree["annotations"]:
                self.references.setdefault(row["image_id"], []).append(row["caption"])
        except FileNotFoundError:
            raise UserError(f"there is no annotation file {config.annotations}") from None
        except (ValueError, KeyError, TypeError) as error:
            what = f"key {error} missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{config.annotations} is not a COCO caption file: {what}") from None
        self.ids = [i for i in self.images if i in self.references][: config.limit]
        if not self.ids:
            raise UserError(f"{config.annotations} has no image with a caption")

    def requests(self) -> list[Request]:
        """A request per picture, in the order of `ids`."""
        message = {"role": "user", "content": f"<image>\n{self.config.prompt}"}
        return [Request([message], [self.images[i]]) for i in self.ids]

    def run(self, answer: Callable[[Sequence[Request], EvalConfig], list[str]]) -> "Scores":
        """Generates and scores."""
        try:
            texts = answer(self.requests(), self.config)
        except BadImage as error:
            raise UserError(f"{self.config.annotations}: {error}") from None
        found = dict(zip(self.ids, texts, strict=True))
        references = {i: self.references[i] for i in self.ids}
        values = {"exact": metrics.exact_match(found, references)}
        if self.config.metrics == "all":
            values |= metrics.caption_scores(found, references, tokenize=self.config.tokenize)
        return Scores(values, list(self._rows(found)))

    def _rows(self, found: dict[int, str]) -> Iterator[dict[str, Any]]:
        for i in self.ids:
            yield {
                "image": self.images[i],
                "references": self.references[i],
                "answer": found[i],
                "exact": metrics.exact_match({i: found[i]}, {i: self.references[i]}) == 1.0,
            }


class Scores:
    """Metric name -> value, and one row per answer."""

    def __init__(self, values: dict[str, float], rows: list[dict[str, Any]]) -> None:
        self.values = values
        self.rows = rows
