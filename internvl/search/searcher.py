"""Finds photos: features of what is looked for, ranks, filters, pages, and the match head."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from internvl import log
from internvl.data.pairs import square
from internvl.errors import BadImage, UserError, counted, explain
from internvl.search.encoder import Encoder
from internvl.search.query import Filters, Term, check_page, check_terms
from internvl.search.ranking import Approximate, Exact, read_approximate
from internvl.search.scan import upright
from internvl.search.store import PhotoRow, Store

_CANCELLED = 1e-5
"""Length of a query, as a share of its weights, below which rounding alone is left of it."""


@dataclass(frozen=True)
class Hit:
    """A photo that was found."""

    rank: int
    """From 1."""
    photo: PhotoRow
    score: float
    """Cosine with what was looked for."""
    match: float | None = None
    """Probability that photo and text match, if it was re-ranked."""

    def as_json(self) -> dict[str, Any]:
        """Returns what programs and the page are told."""
        return {
            "rank": self.rank,
            "path": self.photo.path,
            "score": self.score,
            "match": self.match,
            "taken": self.photo.taken,
            "width": self.photo.width,
            "height": self.photo.height,
        }


@dataclass(frozen=True)
class Results:
    """A page of hits."""

    hits: list[Hit]
    total: int
    """Photos that were ranked: all, or those that the filters leave."""
    skip: int
    """Hits before these."""


class Searcher:
    """Searches an index; may be used by several threads.

    >>> with Store(Path("photos.index")) as store:  # doctest: +SKIP
    ...     searcher = Searcher(store, Encoder(lambda: internvl.load(MODEL), store.settings))
    ...     searcher.find([Term("a dog in the snow")]).hits[0].photo.path
    """

    def __init__(self, store: Store, encoder: Encoder, *, approximate: bool = False) -> None:
        """
        Args:
            approximate: rank by the index of faiss.
        """
        self.store = store
        self.encoder = encoder
        self.approximate = approximate
        # One search at a time: the model's memory is that of a batch.
        self._lock = threading.Lock()
        self._ranking: dict[str, Exact | Approximate] = {}
        self._version = -1
        self._allowed: dict[Filters, np.ndarray | None] = {}

    def find(
        self,
        terms: Sequence[Term],
        *,
        mode: str | None = None,
        filters: Filters | None = None,
        page_size: int = 20,
        skip: int = 0,
        rerank: int = 0,
    ) -> Results:
        """Returns a page of the photos nearest to the weighted sum of the terms.

        Args:
            mode: "c" or "g", which the index must have; by default the first that it has.
            skip: hits before the page.
            rerank: so many of the best are sorted by the match head.

        Raises:
            UserError: nothing to look for, a mode that the index lacks, or a number out of range.
            BadImage: an image of the terms cannot be read.
        """
        check_terms(terms)
        check_page(page_size, skip, rerank)
        with self._lock:
            mode = mode or self.store.settings.modes[0]
            return self._find(terms, mode, filters or Filters(), page_size, skip, rerank)

    def _find(
        self,
        terms: Sequence[Term],
        mode: str,
        filters: Filters,
        page_size: int,
        skip: int,
        rerank: int,
    ) -> Results:
        self._refresh()
        ranking = self._ranking_of(mode)
        if filters not in self._allowed:
            self._allowed[filters] = self._rows(filters)
        allowed = self._allowed[filters]
        query = self._query(terms, mode)
        rows, scores = ranking.top(query, max(skip + page_size, rerank), allowed)
        # A page deep in the list needs the photos of that page alone.
        first = 0 if rerank else skip
        hits = self._hits(rows[first:].tolist(), scores[first:].tolist(), first)
        if rerank:
            hits = [*self._rerank(hits[:rerank], terms), *hits[rerank:]][skip:]
        total = self.store.num_rows if allowed is None else len(allowed)
        return Results(hits[:page_size], total, skip)

    def _hits(self, rows: list[int], scores: list[float], skip: int) -> list[Hit]:
        photos = {photo.row: photo for photo in self.store.photos(rows)}
        return [
            Hit(rank, photos[row], score)
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), skip + 1)
            if row in photos
        ]

    def _refresh(self) -> None:
        """Forgets what was read before another process changed the index."""
        # A page stays open for days, and photos come every day.
        version = self.store.version()
        if version != self._version:
            self._version = version
            self._ranking, self._allowed = {}, {}

    def _ranking_of(self, mode: str) -> Exact | Approximate:
        if mode not in self._ranking:
            exact = Exact(self.store.features(mode), self.encoder.dual.device)
            self._ranking[mode] = self._read_approximate(mode, exact) if self.approximate else exact
        return self._ranking[mode]

    def _read_approximate(self, mode: str, exact: Exact) -> Approximate:
        file, built = self.store.approximate(mode)
        if built is None:
            raise UserError(
                f"{self.store.folder}: no approximate index of mode {mode}; make it with "
                "`internvl index` and --approximate, or search exactly"
            )
        return read_approximate(file, built["probes"], exact)

    def _rows(self, filters: Filters) -> np.ndarray | None:
        """Returns the rows that the filters leave, ascending; None for all rows there are."""
        # None as long as no photo is deleted: nothing has to be gathered.
        if filters == Filters() and self.store.count() == self.store.num_rows:
            return None
        return self.store.rows(*filters.condition())

    def _query(self, terms: Sequence[Term], mode: str) -> Tensor:
        """Returns the weighted sum of the terms' unit vectors, of unit length: float32 (E,)."""
        total = sum((term.weight * self._feature(term, mode) for term in terms), torch.zeros(()))
        size = sum(abs(term.weight) for term in terms)
        if float(total.norm()) < _CANCELLED * size:
            labels = ", ".join(term.label for term in terms)
            raise UserError(f"{labels}: they cancel one another; change a weight")
        return F.normalize(total, dim=0)

    def _feature(self, term: Term, mode: str) -> Tensor:
        if term.text:
            return self.encoder.texts([term.text])[0]
        if term.image is not None:
            return self.encoder.image(term.image, mode)
        photo = self.store.photo_of(term.digest)
        if photo is None:
            raise UserError("that photo is no longer in the index; search again")
        return torch.from_numpy(self.store.features(mode)[photo.row].astype(np.float32))

    def _rerank(self, hits: Sequence[Hit], terms: Sequence[Term]) -> list[Hit]:
        """Sorts hits by the weighted matches of the texts; photos that cannot be read come last."""
        # The match head reads no second image.
        texts = [term for term in terms if term.text]
        if not texts:
            raise UserError("re-ranking compares photos with words; look for words too")
        squares: dict[int, Tensor] = {}
        for hit in hits:
            # Squares alone are kept: a thousand decoded photos would fill the memory.
            try:
                image = upright(self.store.root / hit.photo.path)
                squares[hit.photo.row] = square(image, self.encoder.dual.image_size)
            except (BadImage, OSError) as error:
                log.get_logger().warning("%s", explain(error))
        sums = np.zeros(len(squares))
        for term in texts if squares else ():
            sums += term.weight * np.array(self.encoder.match([*squares.values()], term.text))
        matches = dict(zip(squares, sums.tolist(), strict=True))
        lowest = float("-inf")
        # A stable sort: equal matches stay in the order of their cosines.
        order = sorted(hits, key=lambda hit: -matches.get(hit.photo.row, lowest))
        return [
            Hit(rank, hit.photo, hit.score, matches.get(hit.photo.row))
            for rank, hit in enumerate(order, 1)
        ]


def describe_results(results: Results) -> str:
    """Describes the page: "1 to 20 of 1,234 photos"."""
    if not results.hits:
        return f"none of {counted(results.total, 'photo')}"
    first, last = results.skip + 1, results.skip + len(results.hits)
    return f"{first:,} to {last:,} of {counted(results.total, 'photo')}"
