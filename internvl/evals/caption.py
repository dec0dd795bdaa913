"""Captions: a generated text for every image of a COCO caption file against its references."""

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl.config import CaptionEval
from internvl.data import captions
from internvl.data.captions import CaptionFile, ImageId, NamedImage
from internvl.data.pair_files import broken, image_path
from internvl.errors import BadImage, BadSample, UserError
from internvl.evals import metrics
from internvl.evals.scores import EvalScores, file_state, left_out, settle
from internvl.inference.handle import Handle
from internvl.log import Progress

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"


class Caption:
    """Exact-match accuracy, average length in words, BLEU, METEOR, ROUGE-L and CIDEr.

    Data: images with captions in any form of data/captions.py, usually COCO's; prompt: the
    recipe's, or the original's for the kind of model; metrics: evals/metrics.py.

    Raises:
        UserError: the file is missing, holds no image with a caption, or has problems.
    """

    def __init__(self, config: CaptionEval) -> None:
        self.config = config
        file = captions.read(
            config.annotations, config.form, split=config.split, images=config.pictures
        )
        self.problems = file.problems
        self.references: dict[ImageId, list[str]] = {}
        """id -> its captions. Where a form has no ids they are the images' numbers from 1."""
        self.paths: dict[ImageId, str] = {}
        ids = [n if i.id is None else i.id for n, i in enumerate(file.images, start=1)]
        for number, caption in file.captions:
            self.references.setdefault(ids[number], []).append(caption)
        listed = zip(ids, file.images, strict=True)
        self._place([pair for pair in listed if pair[0] in self.references][: config.limit], file)
        policy = "skip" if config.on_bad_sample == "skip" else "raise"
        if config.on_bad_sample == "keep" and not self._broken:
            policy = "keep"
        settle(self.problems, policy, _REMEDY)
        self.ids = list(self.paths)
        if not self.ids:
            raise UserError(f"{config.annotations} has no image with a caption; check it")

    def _place(self, listed: Sequence[tuple[ImageId, NamedImage]], file: CaptionFile) -> None:
        """Finds every image's file and opens it; what cannot be shown is a problem."""
        places: dict[str, NamedImage] = {}
        self._broken = False
        for image_id, image in listed:
            path, reason = image_path(image, self.config.images, flat=self.config.flat)
            other = places.setdefault(path, image) if isinstance(path, str) else image
            if reason is None and path is not None and not isinstance(path, str):
                reason = "captions are written for image files, not for those in tars"
            if reason is None and other.name != image.name:
                reason = f"{image.name} and {other.name} are one file in the folder of images"
            if reason is None and isinstance(path, str):
                self.paths[image_id] = path
            else:
                self.problems.append(file.problem(image.where, str(reason)))
                self._broken = True
        unreadable = broken([*self.paths.values()])
        ids = list(self.paths)
        for number, reason in unreadable.items():
            path = self.paths.pop(ids[number])
            self.problems.append(BadSample(path, reason))
            self._broken = True

    def images(self) -> Sequence[str]:
        """Every image that will be opened, in the order of `ids`."""
        return [self.paths[i] for i in self.ids]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        references = sum(len(self.references[i]) for i in self.ids)
        counts = {"images": len(self.ids), "texts": references}
        return counts | ({"left out": len(self.problems)} if self.problems else {})

    def run(self, handle: Handle, folder: Path | None) -> EvalScores:
        """Generates with `handle` and scores; keeps texts in `folder`, if any."""
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
        return EvalScores(values, [*self._rows(found), *left_out(self.problems)])

    def _texts(self, handle: Handle, folder: Path | None) -> list[str]:
        """A text for every image, in order, going on after those that are kept already."""
        config = self.config
        images, kept = self.images(), None
        texts: list[str] = []
        if folder is not None:
            key = repr((self.config, [(path, *file_state(path)) for path in images]))
            kept = folder / f"captions-{blake2b(key.encode(), digest_size=8).hexdigest()}.jsonl"
            texts = _whole_lines(kept)
        window = 8 * self.config.batch_size
        with Progress("captions", total=len(images)) as progress:
            progress.update(len(texts))
            for start in range(len(texts), len(images), window):
                answered = handle.caption(
                    images[start : start + window],
                    config.prompt or handle.caption_prompt,
                    num_beams=config.num_beams or handle.caption_beams,
                    max_new_tokens=config.max_new_tokens,
                    min_new_tokens=config.min_new_tokens,
                    batch_size=config.batch_size,
                )
                new = list(map(metrics.whole_text, answered))
                texts += new
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    with kept.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(text) + "\n" for text in new)
                progress.update(len(new))
        return texts

    def _rows(self, found: dict[ImageId, str]) -> Iterator[dict[str, Any]]:
        for i in self.ids:
            yield {
                "image": self.paths[i],
                "image_id": i,
                "references": self.references[i],
                "answer": found[i],
                "exact": metrics.exact_match({i: found[i]}, {i: self.references[i]}) == 1.0,
            }


def _whole_lines(path: Path) -> list[str]:
    """The texts in a file of JSON strings; a last line that was cut off is cut away."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
