"""Features of many images or texts: encoded in chunks that outlive an interruption, and ranked
without the matrix of all scores.

Shapes: Q queries, N candidates, E width of a feature.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.data.images import FileSlice
from internvl.errors import UserError
from internvl.files import atomic_file
from internvl.log import Progress

SCORES_AT_ONCE = 1 << 20
"""Scores that exist at the same time while ranking; with what is computed from them about
20 bytes each."""

ROWS = 1024
"""Rows of a file of features, and what an interruption can cost."""

NEAR = 1e-6
"""Scores of unit vectors that are closer than this may be equal but for rounding."""


@dataclass(frozen=True)
class Store:
    """Where features lie between a start and the next; `folder` None keeps them in memory only.

    The folder must be of one model and one data set: files are told apart by name and number.
    """

    folder: Path | None

    def encode(self, name: str, total: int, rows: Callable[[range], Tensor]) -> Tensor:
        """float32 (total, E) on the CPU: `rows` of every chunk, or what an earlier call kept.

        Raises:
            UserError: a feature is no finite number.
        """
        found = []
        with Progress(name, total=total) as progress:
            for start in range(0, total, ROWS):
                part = range(start, min(start + ROWS, total))
                found.append(self._chunk(name, part, rows))
                progress.update(len(part))
        return torch.cat(found)

    def encode_images(
        self,
        name: str,
        handle: Any,
        paths: Sequence[str | FileSlice],
        modes: Sequence[str],
        **how: Any,
    ) -> dict[str, Tensor]:
        """Features of images in each mode, float32 (len(paths), E), on the device of `handle`
        (Dual), which looks at every image once. `how` goes to its `encode_images_of`.
        """

        def rows(part: range) -> Tensor:
            found = handle.encode_images_of(paths[part.start : part.stop], modes, **how)
            return torch.cat([found[mode] for mode in modes], dim=1)

        features = self.encode(f"{name}_{''.join(modes)}", len(paths), rows).to(handle.device)
        return dict(zip(modes, features.chunk(len(modes), dim=1), strict=True))

    def _chunk(self, name: str, part: range, rows: Callable[[range], Tensor]) -> Tensor:
        file = None
        if self.folder is not None:
            file = self.folder / f"{name}-{part.start:07d}-{part.stop:07d}.safetensors"
            if file.is_file():
                return load_file(file)["features"]
        features = rows(part).float().cpu().contiguous()
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            number = part[int(finite.int().argmin())] + 1
            raise UserError(
                f"the features of {name} hold no finite number in row {number}: the weights "
                "diverged, or their type has too small a range (try dtype float32)"
            )
        if file is None:
            return features
        with atomic_file(file) as partial:
            save_file({"features": features}, partial)
        return features


def ranks(queries: Tensor, candidates: Tensor, of_query: Tensor, of_candidate: Tensor) -> Tensor:
    """int64 (Q,): how many candidates come before the best positive of each query.

    A candidate is positive where `of_candidate` (N,) equals the query's `of_query` (Q,). Higher
    scores (inner products, float32) come first; among equal ones the candidate of the lower
    index. A query without a positive gets N. Everything is computed on the device of `queries`.
    """
    candidates = candidates.to(queries.device)
    of_query, of_candidate = of_query.to(queries.device), of_candidate.to(queries.device)
    order = torch.arange(len(candidates), device=queries.device)
    found = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    for part, scores in _scores(queries, candidates):
        found[part] = ranks_of_scores(scores, of_query[part, None] == of_candidate, order)
    return found


def ranks_of_scores(scores: Tensor, positive: Tensor, order: Tensor) -> Tensor:
    """`ranks` of scores (Q, N) that are there; `positive` bool (Q, N), `order` arange(N)."""
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    equal = scores == best
    first = (equal & positive).to(torch.uint8).argmax(dim=1, keepdim=True)  # the first of several
    before = (scores > best) | (equal & (order < first))
    found = before.sum(dim=1)
    return found.masked_fill(~positive.any(dim=1), scores.shape[1])


def ranks_both_ways(texts: Tensor, images: Tensor, of_text: Tensor) -> tuple[Tensor, Tensor]:
    """`ranks` of texts among images and of images among texts, from one product of the two.

    Whether a positive comes first is counted against its score, computed beforehand; two sums of
    the same products may differ by rounding, so what has another candidate within NEAR of it is
    ranked again by itself.

    Args:
        texts: (num_texts, E), of unit length.
        images: (num_images, E), of unit length.
        of_text: int64 (num_texts,), the image of every text.

    Returns:
        int64 (num_texts,) and (num_images,), on the device of `texts`.
    """
    texts, images = texts.float(), images.float().to(texts.device)
    of_text = of_text.to(texts.device)
    num_images = len(images)
    own = torch.cat(
        [
            (part * images[numbers]).sum(dim=1)
            for part, numbers in zip(texts.split(ROWS), of_text.split(ROWS), strict=True)
        ]
    )
    best = own.new_full((num_images,), -torch.inf).scatter_reduce(0, of_text, own, "amax")
    # Filled in place: small results kept between large ones would keep the heap from shrinking.
    text_counts = torch.zeros(2, len(texts), dtype=torch.long, device=own.device)
    image_counts = torch.zeros(2, num_images, dtype=torch.long, device=own.device)
    for part, scores in _scores(texts, images):
        for row, margin in enumerate((NEAR, -NEAR)):
            above = scores > own[part, None] + margin
            text_counts[row, part] = torch.count_nonzero(above, dim=1)
            image_counts[row] += torch.count_nonzero(scores > best + margin, dim=0)
    positives = torch.zeros_like(image_counts[0])
    positives.index_add_(0, of_text, (own > best[of_text] - 2 * NEAR).long())
    again_texts = (text_counts[1] - text_counts[0] != 1).nonzero().flatten()
    again_images = ((image_counts[1] - image_counts[0] != 1) | (positives != 1)).nonzero().flatten()
    numbers = torch.arange(num_images, device=own.device)
    of_texts, of_images = text_counts[0], image_counts[0]
    of_texts[again_texts] = ranks(texts[again_texts], images, of_text[again_texts], numbers)
    of_images[again_images] = ranks(images[again_images], texts, numbers[again_images], of_text)
    return of_texts, of_images


def nearest(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """int64 (Q, k): the k best candidates of each query, best first; ties as in `ranks`."""
    found = [
        scores.sort(dim=1, descending=True, stable=True)[1][:, :k]
        for _, scores in _scores(queries, candidates.to(queries.device))
    ]
    return torch.cat(found)


def _scores(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, and their scores among all candidates, in float32 throughout: also
    under autocast, and where TF32 is allowed."""
    queries, candidates = queries.float(), candidates.float()
    step = max(1, SCORES_AT_ONCE // max(1, len(candidates)))
    allowed = torch.get_float32_matmul_precision()
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries[part] @ candidates.T
        torch.set_float32_matmul_precision(allowed)
        yield part, scores


def share_within(found: Tensor, k: int) -> float:
    """Share of ranks below k, a mean in float32 as CLIP_benchmark prints it."""
    return (found < k).float().mean().item()


def too_large(ks: Sequence[int], candidates: int) -> list[int]:
    """Those k that exceed the number of candidates."""
    return [k for k in ks if k > candidates]
