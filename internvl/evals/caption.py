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
from internvl.evals.scores import EvalScores, fingerprint, raise_or_log, skipped_rows
from internvl.inference.handle import Handle
from internvl.log import Progress

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"

_WINDOW = 8  # batches between two writes of the answers: what an interruption can cost


class Caption:
    """Exact-match accuracy, average length in words, BLEU, METEOR, ROUGE-L and CIDEr.

    Data: images with captions in any form of data/captions.py, usually COCO's; prompt: the
    recipe's, or the original's for the model's family; metrics: evals/metrics.py.

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
        """Image id -> its captions."""
        self.paths: dict[ImageId, str] = {}
        # Forms without ids: an image's position from 1 is its id.
        ids = [n if i.id is None else i.id for n, i in enumerate(file.images, start=1)]
        for index, caption in file.captions:
            self.references.setdefault(ids[index], []).append(caption)
        named = zip(ids, file.images, strict=True)
        # `limit` counts images that have a caption: a COCO file may list others before them.
        self._resolve([pair for pair in named if pair[0] in self.references][: config.limit], file)
        policy = "skip" if config.on_bad_sample == "skip" else "raise"
        # "keep" measures in spite of problems, but not on an image that cannot be shown.
        if config.on_bad_sample == "keep" and not self._unusable:
            policy = "keep"
        raise_or_log(self.problems, policy, _REMEDY)
        self.ids = list(self.paths)
        if not self.ids:
            raise UserError(f"{config.annotations} has no image with a caption; check it")

    def _resolve(self, named: Sequence[tuple[ImageId, NamedImage]], file: CaptionFile) -> None:
        """Resolves names to `paths` and decodes every image once; failures become problems."""
        images_by_path: dict[str, NamedImage] = {}
        self._unusable = False
        for image_id, image in named:
            path, reason = image_path(image, self.config.images, flat=self.config.flat)
            first = images_by_path.setdefault(path, image) if isinstance(path, str) else image
            if reason is None and path is not None and not isinstance(path, str):
                reason = "captions are written for image files, not for those in tars"
            # `flat` drops folders: two images may come to one path, and one of them is another's.
            if reason is None and first.name != image.name:
                reason = f"{image.name} and {first.name} are one file in the folder of images"
            if reason is None and isinstance(path, str):
                self.paths[image_id] = path
            else:
                self.problems.append(file.problem(image.where, str(reason)))
                self._unusable = True
        # Decoded before any model is loaded: a truncated file would end a long run otherwise.
        unreadable = broken([*self.paths.values()])
        ids = list(self.paths)  # `broken` counts by position, and `paths` shrinks meanwhile
        for index, reason in unreadable.items():
            path = self.paths.pop(ids[index])
            self.problems.append(BadSample(path, reason))
            self._unusable = True

    def images(self) -> Sequence[str]:
        """Returns every image that will be opened, in the order of `ids`."""
        return [self.paths[i] for i in self.ids]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        references = sum(len(self.references[i]) for i in self.ids)
        counts = {"images": len(self.ids), "texts": references}
        return counts | ({"left out": len(self.problems)} if self.problems else {})

    def table(self) -> None:
        """See `Evaluator.table`."""

    def run(self, handle: Handle, folder: Path | None) -> EvalScores:
        """Generates with `handle` and scores; caches answers in `folder`, if any."""
        try:
            texts = self._texts(handle, folder)
        except BadImage as error:
            raise UserError(f"{self.config.annotations}: {error}") from None
        answers = dict(zip(self.ids, texts, strict=True))
        # Skipped images have references but no answer; the scorers take equal keys only.
        references = {i: self.references[i] for i in self.ids}
        values = {
            "exact": metrics.exact_match(answers, references),
            "average_length": sum(len(text.split()) for text in texts) / len(texts),
        }
        if self.config.metrics == "all":
            values |= metrics.caption_scores(answers, references, tokenize=self.config.tokenize)
        return EvalScores(values, [*self._rows(answers), *skipped_rows(self.problems)])

    def _texts(self, handle: Handle, folder: Path | None) -> list[str]:
        """Generates a text for every image, in order; resumes after the cached ones."""
        config = self.config
        images, cache = self.images(), None
        texts: list[str] = []
        if folder is not None:
            # Other settings or a changed image: another file, so that no old answer is reused.
            key = repr((self.config, [(path, *fingerprint(path)) for path in images]))
            cache = folder / f"captions-{blake2b(key.encode(), digest_size=8).hexdigest()}.jsonl"
            texts = _read_answers(cache)
        window = _WINDOW * config.batch_size
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
                if cache is not None:
                    cache.parent.mkdir(parents=True, exist_ok=True)
                    # Appended, not rewritten; JSON because an answer may have line breaks.
                    with cache.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(text) + "\n" for text in new)
                progress.update(len(new))
        return texts

    def _rows(self, answers: dict[ImageId, str]) -> Iterator[dict[str, Any]]:
        for i in self.ids:
            yield {
                "image": self.paths[i],
                "image_id": i,
                "references": self.references[i],
                "answer": answers[i],
                "exact": metrics.exact_match({i: answers[i]}, {i: self.references[i]}) == 1.0,
            }


def _read_answers(path: Path) -> list[str]:
    """Reads the answers in a file of JSON strings; truncates an incomplete last line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    # A killed process may leave half a line, which the next append would continue.
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return [json.loads(line) for line in complete.splitlines()]
