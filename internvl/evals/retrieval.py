"""Retrieval: which texts find their image, which images find one of their texts.

Recall equals CLIP_benchmark's (`metrics/zeroshot_retrieval.py`), where an image hits when at least
one of its captions is among the first k. Ties, which it leaves to torch.topk, go to the lower
index here.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.config import RetrievalEval
from internvl.data.images import FileSlice
from internvl.data.pair_files import Pairs, broken, leaks, read_pairs
from internvl.data.pairs import clean_caption
from internvl.errors import BadSample, UserError
from internvl.evals.features import Store, nearest, ranks_both_ways, share_within, too_large
from internvl.evals.scores import EvalScores, file_state, left_out, settle
from internvl.log import Progress

_REMEDY = (
    "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out, or to keep"
)


def recalls(image_ranks: Tensor, text_ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """CLIP_benchmark's metrics, in its order.

    Args:
        image_ranks: int64 (num_texts,), the rank of its image for every text.
        text_ranks: int64 (num_images,), the rank of the best of its texts for every image.
    """
    found: dict[str, float] = {}
    for k in ks:
        found[f"image_retrieval_recall@{k}"] = share_within(image_ranks, k)
        found[f"text_retrieval_recall@{k}"] = share_within(text_ranks, k)
    return found


class Retrieval:
    """Recall@k in both directions, for InternVL-C and InternVL-G.

    Data: images with captions (data/pair_files.py). The model's own encoders squash the images
    to a square and put `summarize:` before the texts.

    Raises:
        UserError: the file cannot be used, has problems, or fewer candidates than `recall_k`.
    """

    def __init__(self, config: RetrievalEval) -> None:
        self.config = config
        found = read_pairs(
            config.annotations,
            config.images,
            config.form,
            clean=clean_caption if config.clean else None,
            split=config.split,
        )
        found = found.without(
            {*range(len(found.images))[config.limit :]} if config.limit else set()
        )
        bad = broken(found.images)
        problems = [*found.problems, *(BadSample(str(found.images[i]), bad[i]) for i in bad)]
        leaked = self._leaks(found)
        problems += [BadSample(str(found.images[i]), leaked[i]) for i in leaked]
        policy = "raise" if bad and config.on_bad_sample == "keep" else config.on_bad_sample
        settle(problems, policy, _REMEDY)
        self.problems = problems
        self.pairs = found.without({*bad, *leaked} if policy == "skip" else set())
        for what, number in (
            ("images", len(self.pairs.images)),
            ("texts", len(self.pairs.texts)),
        ):
            large = too_large(config.recall_k, number)
            if large:
                raise UserError(
                    f"{config.annotations}: recall_k has {large[0]}, but there are only {number} "
                    f"{what} to choose from; set recall_k (--recall-k) to smaller numbers"
                )

    def _leaks(self, found: Pairs) -> dict[int, str]:
        if self.config.train is None:
            return {}
        trained = read_pairs(self.config.train, self.config.images, split="train")
        return leaks(found, trained)

    def images(self) -> Sequence[str | FileSlice]:
        """Every image that will be opened."""
        return self.pairs.images

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"images": len(self.pairs.images), "texts": len(self.pairs.texts)}
        return counts | ({"left out": len(self.problems)} if self.problems else {})

    def run(self, handle: Any, folder: Path | None) -> EvalScores:
        """Encodes with `handle` (Dual) and ranks; keeps features in `folder`, if there is one."""
        handle = handle.as_dual("retrieval")
        store, all_texts, paths = Store(self._folder(folder)), self.pairs.texts, self.pairs.images
        of_text, batch_size = torch.tensor(self.pairs.image_of_text), self.config.batch_size
        device = handle.device

        def encoded(part: range) -> Tensor:
            return handle.encode_texts(all_texts[part.start : part.stop])

        texts = store.encode("texts", len(all_texts), encoded).to(device)
        matches = _Matches(handle, self.pairs, batch_size)
        values: dict[str, float] = {}
        listed: dict[str, tuple[list[int], list[int]]] = {}
        looked_at = store.encode_images(
            "images", handle, paths, self.config.modes, batch_size=batch_size
        )
        for mode, images in looked_at.items():
            found = ranks_both_ways(texts, images, of_text)
            listed[mode] = (found[0].tolist(), found[1].tolist())
            values |= _named(mode, recalls(*found, self.config.recall_k))
            if self.config.rerank:
                again = self._reranked(texts, images, found, matches)
                values |= _named(f"{mode}_itm", recalls(*again, self.config.recall_k))
        return EvalScores(values, [*self._rows(listed), *left_out(self.problems)])

    def _reranked(
        self, texts: Tensor, images: Tensor, found: tuple[Tensor, Tensor], matches: "_Matches"
    ) -> tuple[Tensor, Tensor]:
        """The same ranks after the first `rerank` candidates were sorted by their match score."""
        of_text = self.pairs.image_of_text
        near_images = nearest(texts, images, self.config.rerank).tolist()
        near_texts = nearest(images, texts, self.config.rerank).tolist()
        wanted = [(i, t) for t, row in enumerate(near_images) for i in row]
        wanted += [(i, t) for i, row in enumerate(near_texts) for t in row]
        scores = matches.scores(wanted)
        image_ranks, text_ranks = found[0].tolist(), found[1].tolist()
        for t, row in enumerate(near_images):
            order = sorted(row, key=lambda i: -scores[i, t])  # stable: ties stay as they were
            own = of_text[t]
            image_ranks[t] = order.index(own) if own in order else max(len(row), image_ranks[t])
        for i, row in enumerate(near_texts):
            order = sorted(row, key=lambda t: -scores[i, t])
            hits = [place for place, t in enumerate(order) if of_text[t] == i]
            text_ranks[i] = hits[0] if hits else max(len(row), text_ranks[i])
        return torch.tensor(image_ranks), torch.tensor(text_ranks)

    def _rows(self, listed: dict[str, tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
        """Texts with the rank of their image, then images with that of their best text."""
        rows: list[dict[str, Any]] = [
            {
                "text": text,
                "image": str(self.pairs.images[image]),
                "rank": {mode: listed[mode][0][number] for mode in listed},
            }
            for number, (text, image) in enumerate(
                zip(self.pairs.texts, self.pairs.image_of_text, strict=True)
            )
        ]
        return rows + [
            {"image": str(image), "rank": {mode: listed[mode][1][number] for mode in listed}}
            for number, image in enumerate(self.pairs.images)
        ]

    def _folder(self, folder: Path | None) -> Path | None:
        """The part of `folder` that is for exactly these files and texts."""
        if folder is None:
            return None
        states = [(path, *file_state(path)) for path in self.pairs.images]
        text = repr((states, self.pairs.texts))
        own = folder / blake2b(text.encode(), digest_size=8).hexdigest()
        own.mkdir(parents=True, exist_ok=True)
        rows = {"images": [*map(str, self.pairs.images)], "texts": self.pairs.texts}
        (own / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return own


class _Matches:
    """Match scores of (image, text) pairs; none is computed twice."""

    def __init__(self, handle: Any, found: Pairs, batch_size: int) -> None:
        self.handle, self.pairs, self.batch_size = handle, found, batch_size
        self.known: dict[tuple[int, int], float] = {}

    def scores(self, wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """The scores of at least these pairs."""
        new = sorted({*wanted} - self.known.keys())  # by image
        with Progress("pairs matched", total=len(new)) as progress:
            for start in range(0, len(new), self.batch_size):
                part = new[start : start + self.batch_size]
                images = [self.pairs.images[i] for i, _ in part]
                texts = [self.pairs.texts[t] for _, t in part]
                found = self.handle.match(images, texts, batch_size=len(part))
                self.known.update(zip(part, found.tolist(), strict=True))
                progress.update(len(part))
        return self.known


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    """Values with a prefix, and their mean."""
    mean = sum(values.values()) / len(values)
    return {f"{prefix}_{name}": value for name, value in {**values, "mean_recall": mean}.items()}
