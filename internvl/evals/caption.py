"""Captions: a generated text for every image of a COCO caption file against its references."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from internvl import dist
from internvl.config import CaptionEval
from internvl.data import captions
from internvl.data.captions import CaptionFile, ImageId, NamedImage
from internvl.data.images import Exif, read_rgb
from internvl.data.pair_files import image_path
from internvl.errors import BadImage, BadSample, UserError
from internvl.evals import metrics, sharing
from internvl.evals.answers import AnswerFiles, Row
from internvl.evals.scores import (
    LEFT_OUT,
    EvalScores,
    fingerprint,
    raise_or_log,
    raise_or_log_images,
    skipped_rows,
)
from internvl.inference.engine import one_engine
from internvl.inference.handle import Handle
from internvl.parallel import lockstep

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"

_NO_ANSWER_REMEDY = "answer these images too, or leave them out with --on-bad-sample skip"

_WINDOW = 8
"""Batches whose images are sorted by their tiles: similar prompts need little padding."""

_BLACK = np.zeros((32, 32, 3), np.uint8)
"""Stands for a batch without a readable image where all ranks must run as many."""


class Caption:
    """Exact-match accuracy, average length in words, BLEU, METEOR, ROUGE-L and CIDEr.

    Data: images with captions in any form of data/captions.py, usually COCO's; prompt: the
    recipe's, or the original's for the model's family; metrics: evals/metrics.py.

    Raises:
        UserError: the file is missing, holds no image with a caption, or has problems.
    """

    def __init__(self, config: CaptionEval, *, opens_images: bool = True) -> None:
        """
        Args:
            opens_images: False for answers that are there: no image is needed.
        """
        self.config = config
        file = captions.read(
            config.annotations, config.form, split=config.split, images=config.image_list
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
        chosen = [pair for pair in named if pair[0] in self.references][: config.limit]
        self._broken: list[BadSample] = []
        self._unusable = False
        if opens_images:
            self._resolve(chosen, file)
        else:
            self.paths = {image_id: image.name for image_id, image in chosen}
        policy = config.on_bad_sample
        # "keep" measures in spite of problems, but not on an image that cannot be shown.
        policy = "raise" if policy == "keep" and self._unusable else policy
        raise_or_log_images(self.problems, self._broken, policy, _REMEDY)
        self.problems += self._broken
        self.ids = list(self.paths)
        self._unread: list[BadSample] = []  # could be read at first, and then could not
        if not self.ids:
            raise_or_log(self.problems, "raise", _REMEDY)
            raise UserError(f"{config.annotations} has no image with a caption; check it")

    def _resolve(self, named: Sequence[tuple[ImageId, NamedImage]], file: CaptionFile) -> None:
        """Resolves names to `paths` and decodes every image once; failures become problems."""
        images_by_path: dict[str, NamedImage] = {}
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
        unreadable = sharing.broken([*self.paths.values()])
        ids = list(self.paths)  # `broken` counts by position, and `paths` shrinks meanwhile
        self._broken = [BadSample(self.paths.pop(ids[i]), why) for i, why in unreadable.items()]

    def images(self) -> Sequence[str]:
        """Returns every image that will be opened, in the order of `ids`."""
        return [self.paths[i] for i in self.ids]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        unread = {problem.name for problem in self._unread}
        ids = [i for i in self.ids if self.paths[i] not in unread]
        counts = {"images": len(ids), "texts": sum(len(self.references[i]) for i in ids)}
        left_out = len(self.problems) + len(unread)
        return counts | ({LEFT_OUT: left_out} if left_out else {})

    def table(self) -> None:
        """See `Evaluator.table`."""

    def run(self, handle: Handle, folder: Path | None) -> EvalScores | None:
        """Generates with `handle` and scores; keeps answers in `folder`, if any."""
        rows = self._answers(_tiled(handle, self.config.tiles), folder)
        return dist.main_alone(lambda: self._score([row for batch in rows for row in batch]))

    def _score(self, rows: Sequence[tuple[int, Row]]) -> EvalScores:
        """Computes the metrics of answers, (index in `ids`, row) in any order."""
        by_index = dict(rows)
        ordered = [(i, by_index[index]) for index, i in enumerate(self.ids)]
        answers = {i: row["answer"] for i, row in ordered if "answer" in row}
        self._unread = [BadSample(self.paths[i], r["reason"]) for i, r in ordered if "reason" in r]
        raise_or_log(self._unread, "skip", _REMEDY)
        if not answers:
            raise UserError(f"{self.config.annotations}: none of its images can be read any more")
        # Skipped images have references but no answer; the scorers take equal keys only.
        references = {i: self.references[i] for i in answers}
        values = {
            "exact": metrics.exact_match(answers, references),
            "average_length": sum(len(text.split()) for text in answers.values()) / len(answers),
        }
        scores = metrics.CaptionScores({}, {}, {})
        if self.config.metrics != "exact":
            scores = metrics.score_captions(
                answers,
                references,
                tokenize=self.config.tokenize,
                meteor=self.config.metrics == "all",
            )
        skipped = skipped_rows([*self.problems, *self._unread])
        return EvalScores(values | scores.values, [*self._rows(answers, scores), *skipped])

    def _answers(self, handle: Handle, folder: Path | None) -> list[list[tuple[int, Row]]]:
        """Generates a text for every image on one of the ranks; goes on after those on disk.

        Returns:
            On rank 0, for every batch (index in `ids`, {"answer": text} or {"reason": text}).
        """
        config, images = self.config, self.images()
        tiles = sharing.spread(images, lambda share: [handle.num_tiles(path) for path in share])
        batches = self._batches(tiles)
        files = None
        done: dict[int, list[tuple[int, Row]]] = {}
        if folder is not None:
            # Other settings or a changed image: another folder, so that no old answer is reused.
            key = repr((self.config, [(path, *fingerprint(path)) for path in images]))
            digest = blake2b(key.encode(), digest_size=8).hexdigest()
            files = AnswerFiles(folder / f"captions-{digest}")
            rows = files.read() if dist.is_main() else {}
            for n, batch in enumerate(batches):
                # Half a batch is computed again, as the whole that it is part of.
                if all(index in rows for index in batch):
                    done[n] = [(index, rows[index]) for index in batch]

        def read(batch: Sequence[int]) -> list[tuple[int, np.ndarray | str]]:
            return [(index, _read(images[index], handle.exif)) for index in batch]

        in_step = lockstep.in_step(handle.model)

        def answer(batch: Sequence[tuple[int, np.ndarray | str]]) -> list[tuple[int, Row]]:
            arrays = {index: image for index, image in batch if not isinstance(image, str)}
            shown = [*arrays.values()] or ([_BLACK] if in_step else [])
            texts = handle.caption(
                shown,
                config.prompt or handle.caption_prompt,
                num_beams=config.num_beams or handle.caption_beams,
                max_new_tokens=config.max_new_tokens,
                min_new_tokens=config.min_new_tokens,
                batch_size=config.batch_size,
            )
            texts_by_index = dict(zip(arrays, map(metrics.whole_text, texts), strict=False))
            return [
                (i, {"reason": image} if isinstance(image, str) else {"answer": texts_by_index[i]})
                for i, image in batch
            ]

        def keep(index: int, rows: list[tuple[int, Row]]) -> None:
            if files is not None:
                files.append(dict(rows))

        work = sharing.Work("captions", read, answer, keep, in_step)
        costs = [len(batch) * max(tiles[index] for index in batch) for batch in batches]
        with one_engine(handle.model, len(images)):
            return work.run(batches, sizes=[*map(len, batches)], costs=costs, done=done)

    def _batches(self, tiles: Sequence[int]) -> list[list[int]]:
        """Groups indices of images to batches of similar numbers of tiles."""
        size, batches = self.config.batch_size, []
        for start in range(0, len(tiles), _WINDOW * size):
            window = range(start, min(start + _WINDOW * size, len(tiles)))
            order = sorted(window, key=lambda index: -tiles[index])
            batches += [order[n : n + size] for n in range(0, len(order), size)]
        return batches

    def _rows(
        self, answers: dict[ImageId, str], scores: metrics.CaptionScores
    ) -> Iterator[dict[str, Any]]:
        for index, (i, answer) in enumerate(answers.items()):
            row: dict[str, Any] = {
                "image": self.paths[i],
                "image_id": i,
                "references": self.references[i],
                "answer": answer,
                "exact": metrics.exact_match({i: answer}, {i: self.references[i]}) == 1.0,
            }
            if scores.per_image:
                per_image = {name: values[index] for name, values in scores.per_image.items()}
                row["scores"] = {name: round(value, 6) for name, value in per_image.items()}
                # BLEU and METEOR of a corpus are no means: these make an interval of them.
                row["sums"] = {name: [*map(int, v[index])] for name, v in scores.sums.items()}
            yield row


class CaptionAnswers(Caption):
    """`Caption` of answers that are there already: no model runs and no image is opened.

    Raises:
        UserError: as `Caption`; an answer to no image of the file, or, unless on_bad_sample is
            skip, an image without an answer.
    """

    def __init__(self, config: CaptionEval, answers: Mapping[ImageId, str]) -> None:
        super().__init__(config, opens_images=False)
        unknown = [image_id for image_id in answers if image_id not in self.references]
        if unknown:
            raise UserError(
                f"there is an answer for {unknown[0]!r}, and {config.annotations} has no image "
                "with a caption of this id; score answers against the file that they are for"
            )
        self._rows_answered: list[tuple[int, Row]] = [
            (index, {"answer": metrics.whole_text(answers[image_id])})
            if image_id in answers
            else (index, {"reason": "there is no answer"})
            for index, image_id in enumerate(self.ids)
        ]
        if config.on_bad_sample != "skip":
            unanswered = [i for i in self.ids if i not in answers]
            problems = [BadSample(self.paths[i], "there is no answer") for i in unanswered]
            raise_or_log(problems, "raise", _NO_ANSWER_REMEDY)

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Scores the answers; neither `handle` nor `folder` is used."""
        return dist.main_alone(lambda: self._score(self._rows_answered))


def _tiled(handle: Any, most: str | int | None) -> Any:
    """Returns a chat model that cuts images into at most so many tiles, see CaptionEval."""
    if most in (None, "checkpoint"):
        return handle
    chat = handle.as_chat("tiles")
    largest = 1 if most == "one" else int(most)
    # No grid has at least `min` tiles and at most `max` if `min` is larger.
    tiles = replace(chat.tiles, min=min(chat.tiles.min, largest), max=largest)
    return replace(chat, tiles=tiles)


def _read(path: str, exif: Exif) -> np.ndarray | str:
    """Decodes an image to uint8 (H, W, 3), or returns why it cannot be."""
    try:
        return read_rgb(path, exif)
    except BadImage as error:
        return str(error).removeprefix(f"{path}: ")
