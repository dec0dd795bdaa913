"""Brings an index up to date with its folder: reads what is new or changed, forgets what is gone.

Imports no torch before a photo must be encoded.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl import log
from internvl.errors import UserError, counted, one_line
from internvl.log import Progress
from internvl.search.scan import Entry, ReadPhoto, Scan, read_photo
from internvl.search.store import PhotoRow, Store

MOST_WAITING = 1024
"""Photos of a transaction of which none must be encoded."""

FEWEST_DEAD = 1000
"""Rows of deleted photos for which the features are not written anew."""

logger = log.get_logger()


class Squares(Protocol):
    """What encodes photos; see `Encoder`."""

    def squares(self, pixels: Sequence[Any], modes: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeds squares, uint8 (3, S, S): mode -> float32 (B, E)."""
        ...


@dataclass
class Update:
    """What an update has done."""

    counts: Counter[str] = field(default_factory=Counter)
    """new, changed, moved, unchanged (touched alone), deleted -> photos."""
    total: int = 0
    """Photos of the index now."""
    broken: int = 0
    """Files that cannot be read."""

    def __str__(self) -> str:
        """Describes it: "406 photos: 400 new, 2 moved, 4 as before; 1 file cannot be read"."""
        changes = [
            f"{self.counts[name]:,} {name}"
            for name in ("new", "changed", "moved")
            if self.counts[name]
        ]
        before = self.total - sum(self.counts[name] for name in ("new", "changed", "moved"))
        if before:
            changes.append(f"{before:,} as before")
        if self.counts["deleted"]:
            changes.append(f"{self.counts['deleted']:,} deleted")
        text = f"{counted(self.total, 'photo')}: {', '.join(changes) or 'none'}"
        return text + (f"; {counted(self.broken, 'file')} cannot be read" if self.broken else "")


def no_photos(folder: Path, scan: Scan) -> str:
    """Returns the sentence about a folder in which a scan lists no photo."""
    foreign = " and ".join(counted(count, f"{name} file") for name, count in scan.foreign.items())
    remedy = f"convert its {foreign} to JPEG" if foreign else "name the folder of your photos"
    return f"{folder}: holds no photo; {remedy}"


def update(
    store: Store,
    encoder: Squares,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    rehash: bool = False,
) -> Update:
    """Brings an index up to date; every batch is saved when it is encoded.

    Args:
        workers: threads that read and decode.
        rehash: read every file, not only those whose size or time has changed.

    Raises:
        UserError: the folder holds no photo.
    """
    scan = Scan(store.root, store.folder.resolve())
    # Listed first: moved files are told by which old paths are gone.
    num_files = _list_files(store, scan)
    if not num_files and not store.count():
        raise UserError(no_photos(store.root, scan))
    # A disk that is not mounted is an empty folder.
    if not num_files:
        raise UserError(
            f"{store.root}: holds no photo, and the index has {store.count():,}; is the disk "
            f"mounted? If they are meant to be gone, delete {store.folder}"
        )
    paths = store.to_read(rehash=rehash)
    work = _Work(store, encoder, Update(), batch_size)
    # More than 16 would decode faster than a GPU encodes.
    threads = workers or min(16, os.cpu_count() or 1)
    # Two batches: a batch is decoded while another is encoded.
    ahead = 2 * batch_size + threads
    with Progress("photos", total=len(paths)) as progress:
        for photo in _read_ahead(paths, work.read, threads, ahead):
            work.take(photo)
            progress.update()
        work.finish()
    done = work.done
    # Last, when no moved file needs their features any more.
    done.counts["deleted"] = store.delete_gone(scan)
    dead = store.num_rows - store.count()
    if dead > max(FEWEST_DEAD, store.num_rows // 4):
        store.compact()
    elif done.counts["deleted"] or done.counts["changed"]:
        store.remove_leftovers()
    for sentence in scan.problems:
        logger.warning("%s", one_line(sentence))
    for suffix, count in scan.foreign.items():
        logger.warning("%s: not read; convert them to JPEG", counted(count, f"{suffix} file"))
    broken = store.broken()
    for path, reason in broken:
        # Those that were read in this update have had their line.
        if path not in work.broken:
            logger.warning("%s", one_line(reason))
    done.total, done.broken = store.count(), len(broken)
    return done


def _list_files(store: Store, scan: Scan) -> int:
    with Progress("files listed") as progress:

        def listed() -> Iterator[Entry]:
            for entry in scan.entries():
                progress.update()
                yield entry

        return store.begin_scan(listed())


@dataclass
class _Work:
    """Photos that are read and not yet in the index."""

    store: Store
    encoder: Squares
    done: Update
    batch_size: int
    decoded: list[ReadPhoto] = field(default_factory=list)
    adopted: list[ReadPhoto] = field(default_factory=list)
    """Photos whose content is in the index."""
    broken: set[str] = field(default_factory=set)
    """Paths of files that could not be read."""

    def read(self, path: str) -> ReadPhoto:
        return self._read(path, self.store.has_digest)

    def _read(self, path: str, is_indexed: Callable[[bytes], bool]) -> ReadPhoto:
        return read_photo(self.store.root, path, self.store.settings.image_size, is_indexed)

    def take(self, photo: ReadPhoto) -> None:
        """Takes a photo; saves a full batch."""
        if photo.problem:
            logger.warning("%s", one_line(photo.problem))
            self.broken.add(photo.path)
            self.store.add_broken(photo.path, photo.size, photo.mtime_ns, photo.problem)
            return
        (self.adopted if photo.pixels is None else self.decoded).append(photo)
        if len(self.decoded) >= self.batch_size or len(self.adopted) >= MOST_WAITING:
            self._save()

    def finish(self) -> None:
        """Saves the rest."""
        while self.decoded or self.adopted:
            self._save()

    def _save(self) -> None:
        modes, width = self.store.settings.modes, self.store.settings.width
        features = {mode: np.empty((0, width), np.float32) for mode in modes}
        if self.decoded:
            features = self.encoder.squares([photo.pixels for photo in self.decoded], modes)
        photos = [_row(photo) for photo in (*self.adopted, *self.decoded)]
        counts, lost = self.store.add(photos, features)
        self.done.counts += counts
        # Only now: an exception must not lose a photo that another batch would take for saved.
        self.decoded, self.adopted = [], []
        for path in lost:
            # The photo of the same content has changed after this one was read.
            self.take(self._read(path, lambda digest: False))


def _row(photo: ReadPhoto) -> PhotoRow:
    values = vars(photo)
    return PhotoRow(**{name: values.get(name, 0) for name in PhotoRow.__annotations__})


def _read_ahead(
    paths: Sequence[str], read: Callable[[str], ReadPhoto], threads: int, ahead: int
) -> Iterator[ReadPhoto]:
    """Yields read photos in order; threads read up to `ahead` of them meanwhile."""
    # Threads are enough: hashing, decoding and resizing release the GIL.
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[ReadPhoto]] = deque()
        try:
            for path in paths:
                waiting.append(pool.submit(read, path))
                if len(waiting) == ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Ctrl-C does not wait for photos that nobody will take.
            pool.shutdown(cancel_futures=True)
