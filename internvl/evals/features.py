"""Features of many images or texts: encoded in cached chunks, ranked without the matrix of scores.

Shapes: Q queries, N candidates, E width of a feature.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from internvl import dist
from internvl.data.images import FileSlice
from internvl.data.pair_files import broken
from internvl.errors import BadImage, UserError
from internvl.evals import sharing
from internvl.files import atomic_file
from internvl.models.weights import save_tensors
from internvl.parallel import lockstep

SCORES_AT_ONCE = 1 << 20
"""Scores in memory at the same time while ranking; about 20 bytes each with temporaries."""

CHUNK_ROWS = 1024
"""Rows of a product while ranking both ways."""

CHUNK_TEXTS = 256
"""Texts of a chunk of features: one batch of the encoder."""

CHUNK_BATCHES = 8
"""Batches of images of a chunk of features: what an interruption can cost a rank."""

TIE_MARGIN = 1e-6
"""Scores of unit vectors closer than this may be equal but for rounding."""


_BLACK = np.zeros((32, 32, 3), np.uint8)
"""Stands for a batch of which no image can be read: others may wait for this rank's forward."""

_last_images: ContextVar[list[tuple[Any, "ImageFeatures"]] | None] = ContextVar(
    "_last_images", default=None
)


@contextmanager
def images_once() -> Iterator[None]:
    """Lets evaluations of one model that follow each other share the features of equal images."""
    # The captions of a data set in two languages are two evaluations of the same images. Only the
    # last features: those of every data set would fill the memory.
    token = _last_images.set([])
    try:
        yield
    finally:
        _last_images.reset(token)


@dataclass(frozen=True)
class FeatureCache:
    """Features of one model and one data set on disk; `folder` None caches nothing."""

    # Files carry a name and row numbers only: another model or data set needs another folder.
    folder: Path | None

    def encode(
        self,
        name: str,
        total: int,
        encode_rows: Callable[[range], Tensor],
        *,
        chunk: int | None = None,
        in_step: bool = False,
        unread: Container[int] = (),
    ) -> Tensor:
        """Encodes rows in chunks shared out over the ranks, or reads chunks that are there.

        Args:
            name: of the files, and in messages.
            encode_rows: features of some rows, float (len(rows), E), on any device.
            chunk: rows of a file, by default CHUNK_TEXTS.
            in_step: see `sharing.Work`.
            unread: rows that `encode_rows` could not read; their chunks are not stored.

        Returns:
            float32 (total, E) on the CPU of rank 0; (0, 0) on the other ranks.

        Raises:
            UserError: a feature is not finite.
        """
        size = chunk or CHUNK_TEXTS
        chunks = [range(start, min(start + size, total)) for start in range(0, total, size)]
        files = [self._file(name, rows) for rows in chunks]
        done = {
            index: load_file(file)["features"]
            for index, file in enumerate(files)
            if dist.is_main() and file is not None and file.is_file()
        }

        def encode_chunk(rows: range) -> Tensor:
            return _finite(encode_rows(rows), name, rows)

        def keep(index: int, features: Tensor) -> None:
            file = files[index]
            if file is not None and not any(row in unread for row in chunks[index]):
                with atomic_file(file) as partial:
                    save_tensors({"features": features}, partial)

        # Without the modes, which the file's name has.
        unit = name.partition("_")[0]
        work = sharing.Work(unit, lambda rows: rows, encode_chunk, keep, in_step)
        encoded = work.run(chunks, sizes=[*map(len, chunks)], done=done)
        return torch.cat(encoded) if encoded else torch.empty(0, 0)

    def encode_images(
        self,
        name: str,
        handle: Any,
        paths: Sequence[str | FileSlice],
        modes: Sequence[str],
        *,
        batch_size: int,
        **options: Any,
    ) -> "ImageFeatures":
        """Encodes images in every mode, with one pass of the vision tower; see `images_once`.

        Args:
            handle: a Dual; `options` go to its `encode_images_of`.
        """
        # A folder has all features of its data set, so that the evaluation can go on from it.
        last = _last_images.get() if self.folder is None else None
        key = (handle.model, [*paths], [*modes], batch_size, options)
        if last and last[0][0] == key:
            return last[0][1]
        unread: dict[int, str] = {}

        # One cached tensor for all modes: after an interruption all are there, or none.
        def encode(images: Sequence[Any]) -> Tensor:
            features = handle.encode_images_of(images, modes, batch_size=batch_size, **options)
            return torch.cat([features[mode] for mode in modes], dim=1)

        def encode_rows(rows: range) -> Tensor:
            images = paths[rows.start : rows.stop]
            try:
                return encode(images)
            except BadImage:
                reasons = broken(images)
                if not reasons:
                    raise
            # It could be read when the evaluation began: it costs itself alone.
            for index, reason in reasons.items():
                unread[rows[index]] = reason.removeprefix(f"{images[index]}: ")
            readable = [index for index in range(len(images)) if index not in reasons]
            features = encode([images[index] for index in readable] or [_BLACK])
            filled = features.new_zeros(len(images), features.shape[1])
            filled[readable] = features[: len(readable)]
            return filled

        in_step = lockstep.in_step(handle.model)
        # In step every rank must run as many batches in a chunk, and the last chunk has fewer.
        chunk = batch_size if in_step else CHUNK_BATCHES * batch_size
        features = self.encode(
            f"{name}_{''.join(modes)}",
            len(paths),
            encode_rows,
            chunk=chunk,
            in_step=in_step,
            unread=unread,
        )
        unread = {
            row: why for of_rank in dist.gather_objects(unread) for row, why in of_rank.items()
        }
        if dist.is_main():
            features = features[[row for row in range(len(paths)) if row not in unread]]
        of_modes = features.to(handle.device).chunk(len(modes), dim=1)
        encoded = ImageFeatures(dict(zip(modes, of_modes, strict=False)), unread)
        if last is not None:
            last[:] = [(key, encoded)]
        return encoded

    def _file(self, name: str, rows: range) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{name}-{rows.start:07d}-{rows.stop:07d}.safetensors"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of the images that could be read."""

    modes: dict[str, Tensor]
    """Mode -> features, float32 (num_images, E), on rank 0; see `FeatureCache.encode`."""
    unread: dict[int, str]
    """Index of an image without features -> reason, on all ranks."""


def _finite(features: Tensor, name: str, rows: range) -> Tensor:
    """Returns the features of rows in float32 on the CPU. Raises UserError if one is not finite."""
    features = features.float().cpu().contiguous()
    # NaN compares as false with everything: every rank would be 0, a perfect recall.
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        row_number = rows[int(finite.int().argmin())] + 1
        raise UserError(
            f"the features of {name} hold no finite number in row {row_number}: the weights "
            "diverged, or their type has too small a range (try dtype float32)"
        )
    return features


def ranks(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Counts the candidates before the best positive of each query: int64 (Q,); N without one.

    Higher scores (inner products, float32) come first; among equal ones the lower index.

    Args:
        queries: float (Q, E); everything is computed on their device.
        candidates: float (N, E).
        query_ids: int64 (Q,); a candidate with the query's id is positive.
        candidate_ids: int64 (N,).
    """
    candidates = candidates.to(queries.device)
    query_ids, candidate_ids = query_ids.to(queries.device), candidate_ids.to(queries.device)
    order = torch.arange(len(candidates), device=queries.device)
    query_ranks = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    for rows, scores in scores_of(queries, candidates):
        query_ranks[rows] = ranks_of_scores(scores, query_ids[rows, None] == candidate_ids, order)
    return query_ranks


def ranks_of_scores(scores: Tensor, positive: Tensor, order: Tensor) -> Tensor:
    """`ranks`, int64 (Q,), of scores (Q, N); `positive` is bool (Q, N), `order` arange(N)."""
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    equal = scores == best
    # argmax takes no bool; of several maxima it returns the first, the lower index.
    first = (equal & positive).to(torch.uint8).argmax(dim=1, keepdim=True)
    before = (scores > best) | (equal & (order < first))
    return before.sum(dim=1).masked_fill(~positive.any(dim=1), scores.shape[1])


def ranks_both_ways(texts: Tensor, images: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """`ranks` of texts among images and of images among texts, from one product of the two.

    Args:
        texts: (num_texts, E), of unit length.
        images: (num_images, E), of unit length.
        image_of_text: int64 (num_texts,), index of every text's image.

    Returns:
        int64 (num_texts,) and (num_images,), on the device of `texts`.
    """
    texts, images = texts.float(), images.float().to(texts.device)
    image_of_text = image_of_text.to(texts.device)
    num_images = len(images)
    # (num_texts,): score of each text with its image. In chunks: images[indices] is a copy.
    positive_scores = torch.cat(
        [
            (chunk * images[indices]).sum(dim=1)
            for chunk, indices in zip(
                texts.split(CHUNK_ROWS), image_of_text.split(CHUNK_ROWS), strict=True
            )
        ]
    )
    best = positive_scores.new_full((num_images,), -torch.inf)
    best = best.scatter_reduce(0, image_of_text, positive_scores, "amax")
    # Filled in place: small results kept between large ones would keep the heap from shrinking.
    text_counts = torch.zeros(2, len(texts), dtype=torch.long, device=texts.device)
    image_counts = torch.zeros(2, num_images, dtype=torch.long, device=texts.device)
    for rows, scores in scores_of(texts, images):
        # Row 0 counts candidates that are surely better, row 1 also those within the margin.
        for row, margin in enumerate((TIE_MARGIN, -TIE_MARGIN)):
            above = scores > positive_scores[rows, None] + margin
            text_counts[row, rows] = torch.count_nonzero(above, dim=1)
            image_counts[row] += torch.count_nonzero(scores > best + margin, dim=0)
    close_positives = torch.zeros_like(image_counts[0])
    is_close = positive_scores > best[image_of_text] - 2 * TIE_MARGIN
    close_positives.index_add_(0, image_of_text, is_close.long())
    # A product and an elementwise sum may round differently. Within the margin should be the
    # positive alone (1); any other query is ranked again, by scores of one product.
    tied_texts = (text_counts[1] - text_counts[0] != 1).nonzero().flatten()
    tied_images = (image_counts[1] - image_counts[0] != 1) | (close_positives != 1)
    tied_images = tied_images.nonzero().flatten()
    ids = torch.arange(num_images, device=texts.device)
    text_ranks, image_ranks = text_counts[0], image_counts[0]
    text_ranks[tied_texts] = ranks(texts[tied_texts], images, image_of_text[tied_texts], ids)
    image_ranks[tied_images] = ranks(images[tied_images], texts, ids[tied_images], image_of_text)
    return text_ranks, image_ranks


def nearest(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Returns the k best candidates of each query, best first, int64 (Q, k); ties as in `ranks`."""
    indices = [
        # A stable sort, not topk: topk leaves the order of equal scores open.
        scores.sort(dim=1, descending=True, stable=True)[1][:, :k]
        for _, scores in scores_of(queries, candidates.to(queries.device))
    ]
    return torch.cat(indices)


def scores_of(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows of `queries`, their scores with all candidates, float32 (len(rows), N))."""
    queries, candidates = queries.float(), candidates.float()
    step = max(1, SCORES_AT_ONCE // max(1, len(candidates)))
    precision = torch.get_float32_matmul_precision()
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        # No TF32, no autocast: both would round scores together. Restored for the caller's code.
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries[rows] @ candidates.T
        torch.set_float32_matmul_precision(precision)
        yield rows, scores


def share_within(query_ranks: Tensor, k: int) -> float:
    """Returns the share (0 to 1) of ranks below k."""
    # A mean in float32, as CLIP_benchmark: its printed decimals are then ours.
    return (query_ranks < k).float().mean().item()


def too_large(ks: Sequence[int], candidates: int) -> list[int]:
    """Returns those k that exceed the number of candidates."""
    return [k for k in ks if k > candidates]
