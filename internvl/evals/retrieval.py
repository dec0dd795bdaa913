"""Retrieval: recall@k from texts to images and from images to texts.

Equal to CLIP_benchmark's (`metrics/zeroshot_retrieval.py`), where an image is a hit if at least one
of its captions is among the first k. Ties, which it leaves to torch.topk, go to the lower index.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl import dist
from internvl.config import RetrievalEval
from internvl.data.images import FileSlice
from internvl.data.pair_files import Pairs, leaks, read_pairs
from internvl.data.pairs import clean_caption
from internvl.errors import BadSample, UserError
from internvl.evals import sharing
from internvl.evals.features import (
    CHUNK_BATCHES,
    FeatureCache,
    nearest,
    ranks_both_ways,
    share_within,
    too_large,
)
from internvl.evals.scores import (
    LEFT_OUT,
    EvalScores,
    Table,
    TableRow,
    fingerprint,
    raise_or_log,
    raise_or_log_images,
    skipped_rows,
)
from internvl.parallel import lockstep

_DIRECTIONS = {"image_retrieval": "text → image", "text_retrieval": "image → text"}
"""CLIP_benchmark's name of a direction, by what is retrieved -> query and result."""

_SHOWN_QUERIES = 24
"""Queries of either end whose first candidates are listed."""
_SHOWN_CANDIDATES = 5

_REMEDY = (
    "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out, or to keep"
)


def recalls(image_ranks: Tensor, text_ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Computes CLIP_benchmark's metrics, from 0 to 1, in its order.

    Args:
        image_ranks: int64 (num_texts,), the rank of its image for every text.
        text_ranks: int64 (num_images,), the rank of the best of its texts for every image.
    """
    values: dict[str, float] = {}
    # Its names say what is retrieved: published tables call the first one text-to-image.
    for k in ks:
        values[f"image_retrieval_recall@{k}"] = share_within(image_ranks, k)
        values[f"text_retrieval_recall@{k}"] = share_within(text_ranks, k)
    return values


class Retrieval:
    """Recall@k in both directions, for InternVL-C and InternVL-G.

    Data: images with captions (data/pair_files.py). The model's own encoders resize images to a
    square, whatever their aspect ratio, and put `summarize:` before texts.

    Raises:
        UserError: the file cannot be used, has problems, or fewer candidates than `recall_k`.
    """

    def __init__(self, config: RetrievalEval) -> None:
        self.config = config
        pairs = read_pairs(
            config.annotations,
            config.images,
            config.form,
            clean=clean_caption if config.clean else None,
            split=config.split,
        )
        # By images, not by texts: an image keeps all of its captions.
        beyond = range(len(pairs.images))[config.limit :] if config.limit else ()
        pairs = pairs.without({*beyond})
        # Decoded before any model is loaded: a truncated file would end a long run otherwise.
        bad = sharing.broken(pairs.images)
        unreadable = [BadSample(str(pairs.images[i]), bad[i]) for i in bad]
        leaked = self._leaks(pairs)
        problems = [*pairs.problems, *(BadSample(str(pairs.images[i]), leaked[i]) for i in leaked)]
        policy = config.on_bad_sample
        raise_or_log_images(problems, unreadable, policy, _REMEDY)
        self.problems = [*problems, *unreadable]
        # "keep" measures on leaked images too.
        self.pairs = pairs.without({*bad, *(leaked if policy == "skip" else ())})
        self._check_recall_k()

    def _check_recall_k(self) -> None:
        # After skipping, which leaves fewer candidates; the original's topk would fail beyond them.
        annotations = self.config.annotations
        for candidates, count in (
            ("images", len(self.pairs.images)),
            ("texts", len(self.pairs.texts)),
        ):
            large = too_large(self.config.recall_k, count)
            if large:
                raise UserError(
                    f"{annotations}: recall_k has {large[0]}, but there are only {count} "
                    f"{candidates} to choose from; set recall_k (--recall-k) to smaller numbers"
                )

    def _leaks(self, pairs: Pairs) -> dict[int, str]:
        """Returns index -> evidence of images that the training data `train` holds too."""
        if self.config.train is None:
            return {}
        trained = read_pairs(self.config.train, self.config.images, split="train")
        return leaks(pairs, trained)

    def images(self) -> Sequence[str | FileSlice]:
        """Returns every image that will be opened."""
        return self.pairs.images

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"images": len(self.pairs.images), "texts": len(self.pairs.texts)}
        return counts | ({LEFT_OUT: len(self.problems)} if self.problems else {})

    def table(self) -> Table:
        """See `Evaluator.table`: directions by R@k for every mode, and for its re-ranked scores."""
        ks, rows = self.config.recall_k, []
        prefixes = {
            f"{mode}{suffix}": f"InternVL-{mode.upper()}{name}"
            for mode in self.config.modes
            for suffix, name in (("", ""), *([("_itm", " + ITM")] if self.config.rerank else []))
        }
        for prefix, name in prefixes.items():
            for metric, direction in _DIRECTIONS.items():
                # It is of both directions, so it follows the last one.
                mean = f"{prefix}_mean_recall" if metric == [*_DIRECTIONS][-1] else None
                metrics = tuple(f"{prefix}_{metric}_recall@{k}" for k in ks)
                rows.append(TableRow(f"{name}  {direction}", metrics, mean))
        return Table("recall in %", tuple(f"R@{k}" for k in ks), tuple(rows))

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Encodes with `handle` (Dual) and ranks; caches features in `folder`, if any."""
        handle = handle.as_dual("retrieval")
        cache, all_texts = FeatureCache(self._cache_folder(folder)), self.pairs.texts
        batch_size = self.config.batch_size

        def encode_texts(rows: range) -> Tensor:
            return handle.encode_texts(all_texts[rows.start : rows.stop])

        in_step = lockstep.in_step(handle.model)
        texts = cache.encode("texts", len(all_texts), encode_texts, in_step=in_step)
        texts = texts.to(handle.device)
        encoded = cache.encode_images(
            "images", handle, self.pairs.images, self.config.modes, batch_size=batch_size
        )
        texts = self._leave_out(encoded.unread, texts)
        features, image_of_text = encoded.modes, torch.tensor(self.pairs.image_of_text)
        # Rank 0 ranks alone: a query's rank among all candidates needs all features.
        ranked = dist.main_alone(
            lambda: {
                mode: ranks_both_ways(texts, images, image_of_text)
                for mode, images in features.items()
            }
        )
        candidates: dict[str, _Candidates] = {}
        scores: dict[tuple[int, int], float] = {}
        if self.config.rerank:
            if dist.is_main():
                candidates = {mode: self._nearest(texts, features[mode]) for mode in features}
            scores = self._match(handle, candidates.values(), cache)
        return dist.main_alone(
            lambda: self._score(
                ranked or {}, candidates, scores, self._first(texts, features, ranked or {})
            )
        )

    def _leave_out(self, unread: Mapping[int, str], texts: Tensor) -> Tensor:
        """Leaves out images (indices) that cannot be read any more, from now on, and their texts.

        Args:
            texts: features (num_texts, E) on rank 0.

        Returns:
            Those of the remaining texts.
        """
        if not unread:
            return texts
        # All ranks alike: pairs are dealt from what is left, and a later step has it too.
        lost = [BadSample(str(self.pairs.images[i]), why) for i, why in unread.items()]
        raise_or_log(lost, "skip", _REMEDY)
        self.problems += lost
        remaining = [t for t, image in enumerate(self.pairs.image_of_text) if image not in unread]
        self.pairs = self.pairs.without({*unread})
        self._check_recall_k()
        return texts[remaining] if dist.is_main() else texts

    def _score(
        self,
        ranked: Mapping[str, tuple[Tensor, Tensor]],
        candidates: Mapping[str, "_Candidates"],
        scores: Mapping[tuple[int, int], float],
        first: "_First",
    ) -> EvalScores:
        """Computes the recalls from `ranks_both_ways` of every mode, and the re-ranked ones."""
        values: dict[str, float] = {}
        all_ranks: dict[str, tuple[Tensor, Tensor]] = {}
        for mode, ranks in ranked.items():
            values |= _named(mode, recalls(*ranks, self.config.recall_k))
            all_ranks[mode] = ranks
            if mode in candidates:
                reranked = self._rerank(ranks, candidates[mode], scores)
                values |= _named(f"{mode}_itm", recalls(*reranked, self.config.recall_k))
                all_ranks[f"{mode}_itm"] = reranked
        ranks_by_mode = {
            mode: (ranks[0].tolist(), ranks[1].tolist()) for mode, ranks in all_ranks.items()
        }
        return EvalScores(values, [*self._rows(ranks_by_mode, first), *skipped_rows(self.problems)])

    def _first(
        self,
        texts: Tensor,
        features: Mapping[str, Tensor],
        ranked: Mapping[str, tuple[Tensor, Tensor]],
    ) -> "_First":
        """Returns the first candidates of the queries that a page shows."""
        by_text: dict[int, dict[str, list[str]]] = {}
        by_image: dict[int, dict[str, list[str]]] = {}
        for mode, images in features.items():
            # In the order of the ranks: rows, queries, what is searched, its names.
            directions = (
                (by_text, texts, images, self.pairs.images),
                (by_image, images, texts, self.pairs.texts),
            )
            # A few queries alone: sorting all scores takes longer than computing them.
            for direction, ranks in zip(directions, ranked[mode], strict=True):
                rows, queries, candidates, names = direction
                chosen = _shown_queries(ranks)
                order = nearest(queries[chosen], candidates, _SHOWN_CANDIDATES).tolist()
                for query, best in zip(chosen.tolist(), order, strict=True):
                    rows.setdefault(query, {})[mode] = [str(names[i]) for i in best]
        return _First(by_text, by_image)

    def _nearest(self, texts: Tensor, images: Tensor) -> "_Candidates":
        """Returns the first `rerank` candidates of features (num_texts, E) and (num_images, E)."""
        return _Candidates(
            nearest(texts, images, self.config.rerank).tolist(),
            nearest(images, texts, self.config.rerank).tolist(),
        )

    def _match(
        self, handle: Any, candidates: Iterable["_Candidates"], cache: FeatureCache
    ) -> dict[tuple[int, int], float]:
        """Matches the candidates of rank 0: (image, text) -> score, from 0 to 1, on rank 0."""
        # One set for all modes and directions: the score depends on neither, and they overlap.
        # Sorted by image: `match` encodes equal images of a batch that follow each other once.
        pairs = dist.from_main(sorted({pair for some in candidates for pair in some.pairs()}))
        images, texts, size = self.pairs.images, self.pairs.texts, self.config.batch_size

        def match(rows: range) -> Tensor:
            batch = pairs[rows.start : rows.stop]
            chosen = [images[i] for i, _ in batch], [texts[t] for _, t in batch]
            scores: Tensor = handle.match(*chosen, batch_size=size)
            return scores[:, None]

        in_step = lockstep.in_step(handle.model)
        # Named by its pairs: other weights or candidates have other scores.
        name = f"pairs_{blake2b(repr(pairs).encode(), digest_size=8).hexdigest()}"
        chunk = size if in_step else CHUNK_BATCHES * size
        scores = cache.encode(name, len(pairs), match, chunk=chunk, in_step=in_step)
        return dict(zip(pairs, scores.flatten().tolist(), strict=False))

    def _rerank(
        self,
        ranks: tuple[Tensor, Tensor],
        candidates: "_Candidates",
        scores: Mapping[tuple[int, int], float],
    ) -> tuple[Tensor, Tensor]:
        """Returns `ranks` with each query's candidates sorted by match score.

        Args:
            ranks: int64 (num_texts,) and (num_images,), see `recalls`.
        """
        image_of_text = self.pairs.image_of_text
        image_ranks, text_ranks = ranks[0].tolist(), ranks[1].tolist()
        for t, row in enumerate(candidates.images):
            order = sorted(row, key=lambda i: -scores[i, t])  # stable: ties stay as they were
            image = image_of_text[t]
            # Beyond the candidates a rank stays as it was, and never becomes one of the first.
            image_ranks[t] = order.index(image) if image in order else max(len(row), image_ranks[t])
        for i, row in enumerate(candidates.texts):
            order = sorted(row, key=lambda t: -scores[i, t])
            hits = [rank for rank, t in enumerate(order) if image_of_text[t] == i]
            text_ranks[i] = hits[0] if hits else max(len(row), text_ranks[i])
        return torch.tensor(image_ranks), torch.tensor(text_ranks)

    def _rows(
        self, ranks_by_mode: Mapping[str, tuple[list[int], list[int]]], first: "_First"
    ) -> list[dict[str, Any]]:
        """Texts with the rank of their image, then images with that of their best text; of a few,
        also their first candidates in every mode."""

        def row(direction: int, index: int, candidates: Mapping[int, Any]) -> dict[str, Any]:
            ranks = {mode: ranks[direction][index] for mode, ranks in ranks_by_mode.items()}
            listed = {"first": candidates[index]} if index in candidates else {}
            return {"rank": ranks, **listed}

        rows: list[dict[str, Any]] = [
            {"text": text, "image": str(self.pairs.images[image]), **row(0, t, first.of_texts)}
            for t, (text, image) in enumerate(
                zip(self.pairs.texts, self.pairs.image_of_text, strict=True)
            )
        ]
        return rows + [
            {"image": str(image), **row(1, i, first.of_images)}
            for i, image in enumerate(self.pairs.images)
        ]

    def _cache_folder(self, folder: Path | None) -> Path | None:
        """Creates and returns the cache folder for exactly these files and texts."""
        if folder is None:
            return None
        fingerprints = [(path, *fingerprint(path)) for path in self.pairs.images]
        key = repr((fingerprints, self.pairs.texts))
        cache_folder = folder / blake2b(key.encode(), digest_size=8).hexdigest()
        if not dist.is_main():
            return cache_folder
        cache_folder.mkdir(parents=True, exist_ok=True)
        # A hash names nothing: with the features kept, their row r is row r of this file.
        rows = {"images": [*map(str, self.pairs.images)], "texts": self.pairs.texts}
        text = json.dumps(rows, ensure_ascii=False)
        (cache_folder / "rows.json").write_text(text, encoding="utf-8")
        return cache_folder


@dataclass(frozen=True)
class _First:
    """First candidates of a few queries, best first: query -> mode -> names."""

    of_texts: Mapping[int, Mapping[str, list[str]]]
    of_images: Mapping[int, Mapping[str, list[str]]]


def _shown_queries(query_ranks: Tensor) -> Tensor:
    """Returns indices of the first queries and of those with the worst ranks, sorted."""
    worst = query_ranks.cpu().argsort(descending=True, stable=True)[:_SHOWN_QUERIES]
    earliest = torch.arange(min(_SHOWN_QUERIES, len(query_ranks)))
    return torch.cat([worst, earliest]).unique()


@dataclass(frozen=True)
class _Candidates:
    """Nearest candidates of every query, best first."""

    images: list[list[int]]
    """Of every text."""
    texts: list[list[int]]
    """Of every image."""

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yields (image, text) of both directions; pairs of both come twice."""
        yield from ((i, t) for t, row in enumerate(self.images) for i in row)
        yield from ((i, t) for i, row in enumerate(self.texts) for t in row)


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    """Returns the values with a prefix, and their mean as `mean_recall`."""
    mean = sum(values.values()) / len(values)
    return {f"{prefix}_{name}": value for name, value in {**values, "mean_recall": mean}.items()}
