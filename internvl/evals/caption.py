"""Captions: a generated text for every picture of a COCO caption file against its references."""

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl.config import EvalConfig, UserError
from internvl.data.images import BadImage, join_inside
from internvl.evals import metrics
from internvl.evals.scores import Scores, file_state
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

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        references = sum(len(self.references[i]) for i in self.ids)
        return {"pictures": len(self.ids), "texts": references}

    def run(self, handle: Any, folder: Path | None) -> Scores:
        """Generates with `handle` (Chat or Dual) and scores; keeps texts in `folder`, if any."""
        try:
            texts = self._texts(handle, folder)
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

    def _texts(self, handle: Any, folder: Path | None) -> list[str]:
        """A text for every picture, in order, going on after those that are kept already."""
        generate = _dual_texts if hasattr(handle, "caption") else _chat_texts
        pictures, kept = self.pictures(), None
        texts: list[str] = []
        if folder is not None:
            key = repr((self.config, [(path, *file_state(path)) for path in pictures]))
            kept = folder / f"captions-{blake2b(key.encode(), digest_size=8).hexdigest()}.jsonl"
            texts = _whole_lines(kept)
        window = 8 * self.config.batch_size
        with Progress("captions", total=len(pictures)) as progress:
            progress.update(len(texts))
            for start in range(len(texts), len(pictures), window):
                new = generate(handle, pictures[start : start + window], self.config)
                texts += new
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    with kept.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(text) + "\n" for text in new)
                progress.update(len(new))
        return texts

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
    requests = [Request([message], [picture]) for picture in pictures]
    settings = Settings(config.max_new_tokens, config.min_new_tokens, config.num_beams or 1)
    size = config.batch_size
    return answers(chat.model, chat.encoder, chat.tiles, requests, settings, batch_size=size)


def _dual_texts(dual: Any, pictures: Sequence[str], config: EvalConfig) -> list[str]:
    """Captions of InternVL-G, in the order of the pictures."""
    return dual.caption(
        pictures,
        prompt=config.prompt or DUAL_PROMPT,
        num_beams=config.num_beams or DUAL_BEAMS,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        batch_size=config.batch_size,
    )


def _whole_lines(path: Path) -> list[str]:
    """The texts in a file of JSON strings; a last line that was cut off is cut away."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no annotation file {path}") from None
