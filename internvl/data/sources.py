"""Opens annotation files as sources of samples, indexed and read line by line.

Only offsets and group ids are held in memory. A source that is not JSONL is converted to it once,
in the cache folder (data/index.py), except tables, which Arrow memory-maps.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl.config import DataConfig, SourceConfig
from internvl.config.types import MOST_TILES
from internvl.data import captions, formats, tars
from internvl.data.index import (
    LineIndex,
    convert_once,
    digest_of,
    digests_of,
    file_content,
    index_lines,
    write_once,
)
from internvl.data.json_rows import entries, is_list, parse, parse_row
from internvl.data.records import Sample
from internvl.data.tables import Table
from internvl.data.texts import printable
from internvl.errors import BadSample, DataError, counted

Parse = Callable[[str, dict[str, Any], SourceConfig], Sample]

_META_KEYS = {
    "root": "images",
    "annotation": "annotations",
    "repeat_time": "repeat",
    "data_augment": "augment",
    "length": "num_samples",
    "max_dynamic_patch": "max_tiles",
}


@dataclass(frozen=True)
class Content:
    """Fingerprint of a source's annotations, by which a resumed run detects changes."""

    samples: int
    size: int
    """Bytes of the lines; 0 if the source is no JSONL."""
    digest: str


class Source(Protocol):
    """Samples by index, from 0 on."""

    @property
    def config(self) -> SourceConfig: ...

    def __len__(self) -> int: ...

    @property
    def groups(self) -> np.ndarray:
        """int32 (len,): group ids, equal for samples with the same images."""
        ...

    def samples(self, indices: Sequence[int]) -> Iterator[Sample | BadSample]:
        """Yields the samples of `indices` in order; BadSample in place of a bad one."""
        ...

    def content(self) -> Content:
        """Returns a fingerprint of the annotations; their path and the media files do not count."""
        ...

    def begins_with(self, content: Content) -> bool:
        """True if these annotations are those of `content`, perhaps with samples appended."""
        ...


@dataclass(frozen=True)
class LineSource:
    """A source whose rows are the lines of a JSONL file."""

    config: SourceConfig
    index: LineIndex
    parse: Parse
    converted: bool = False
    """True for lines that we wrote from a file of another form; `where` names a row there."""
    unit: str = "line"
    """Noun for a row in messages, followed by its number from 1."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def groups(self) -> np.ndarray:
        return self.index.groups

    def samples(self, indices: Sequence[int]) -> Iterator[Sample | BadSample]:
        """See `Source.samples`."""
        for index, line in zip(indices, self.index.lines(indices), strict=True):
            name = f"{self.config.annotations} {self.unit} {index + 1}"
            try:
                row = parse_row(name, line)
                # A user knows the line of the original file, not that of the cache.
                if self.converted:
                    name = f"{self.config.annotations} {row['where']}"
                if "bad" in row and self.converted:
                    raise BadSample(name, row["bad"])
                yield self.parse(name, row, self.config)
            except BadSample as bad:
                yield bad

    def content(self) -> Content:
        """See `Source.content`."""
        folder = self._folder()
        if folder:
            return Content(len(self), 0, digest_of(self.index.path, None, folder))
        return Content(len(self), self.index.size, self.index.digest)

    def begins_with(self, content: Content) -> bool:
        """See `Source.begins_with`."""
        if content.samples > len(self):
            return False
        folder = self._folder()
        end = int(self.index.starts[content.samples])
        if folder:
            return digest_of(self.index.path, end, folder) == content.digest
        if digests_of(self.index.path, end)[1] == content.digest:
            return True
        # Older runs digested the bytes; the last line may have had no line end (\n or \r\n) yet.
        old = content.size in (end, end - 1, end - 2)
        return old and digest_of(self.index.path, content.size) == content.digest

    def _folder(self) -> bytes:
        """Returns the folder of the tars, JSON-escaped as in cached rows; b"" if not converted."""
        if not self.converted:
            return b""
        # Left out of the digest, so that a run may go on after its data set was moved.
        path = os.path.abspath(self.config.annotations)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        return json.dumps(folder + os.sep, ensure_ascii=False)[1:-1].encode()


@dataclass(frozen=True)
class TableSource:
    """A source whose rows are those of Parquet or Arrow files."""

    config: SourceConfig
    table: Table

    def __len__(self) -> int:
        return len(self.table)

    @property
    def groups(self) -> np.ndarray:
        return self.table.groups

    def samples(self, indices: Sequence[int]) -> Iterator[Sample | BadSample]:
        """See `Source.samples`."""
        for index in indices:
            name = f"{self.config.annotations} row {index + 1}"
            try:
                row = self.table.row(index)
            # Arrow checks no text when a file is written or mapped, only when it is read.
            except UnicodeDecodeError:
                yield BadSample(name, "a text in it is not UTF-8; write the table anew")
                continue
            try:
                yield formats.table_row(name, row, self.config)
            except BadSample as bad:
                yield bad

    def content(self) -> Content:
        """See `Source.content`."""
        return Content(len(self), 0, self.table.digest())

    def begins_with(self, content: Content) -> bool:
        """See `Source.begins_with`."""
        # Tables grow by whole files: only the end of a file can be the end of an older state.
        ends = self.table.ends.tolist()
        if content.samples not in ends:
            return False
        return self.table.digest(ends.index(content.samples) + 1) == content.digest


def open_source(
    config: SourceConfig, *, check_count: bool = True, meta: Path | None = None
) -> Source:
    """Opens and indexes a source.

    Args:
        check_count: whether another number of samples than `num_samples` is an error.
        meta: the meta file that lists it; messages name it.

    Raises:
        DataError: its file is missing, unreadable, empty, or does not hold `num_samples` samples.
    """
    try:
        source = SOURCES[config.type](config)
    except FileNotFoundError:
        key = "`annotations` of this source in the recipe"
        if meta is not None:
            key = f"`annotation` of this entry in {meta}"
        raise DataError(
            f"source {config.name}: there is no annotation file {config.annotations}; check {key}"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"source {config.name}: {config.annotations} is not UTF-8; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):  # which is a ValueError
            raise
        # Python refuses a path with a NUL character by a ValueError.
        reason = f"cannot read {str(config.annotations)!r}: {error}; check the path"
        raise DataError(f"source {config.name}: {reason}") from None
    if not len(source):
        raise DataError(f"source {config.name}: {config.annotations} is empty; it holds no sample")
    problem = wrong_count(source, meta) if check_count else None
    if problem is not None:
        raise DataError(f"source {config.name}: {problem}")
    return source


def wrong_count(source: Source, meta: Path | None = None) -> str | None:
    """Returns why the number of samples is not the source's `num_samples`, else None."""
    expected = source.config.num_samples
    # A file that was cut while it was copied is valid JSONL.
    if expected in (None, len(source)):
        return None
    return (
        f"{source.config.annotations} holds {len(source):,} samples, not {expected:,} as its "
        f"num_samples (`length` in {'a meta file' if meta is None else meta}) says; set it to "
        f"{len(source)}, or fetch the whole file"
    )


def open_sources(data: DataConfig) -> list[Source]:
    """Opens all sources of a recipe.

    Raises:
        DataError: the problem of each that cannot be opened, one a line.
    """
    sources, problems = [], []
    for config in source_configs(data):
        try:
            sources.append(open_source(config, meta=_meta_of(config, data)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return sources


def meta_entries(path: Path) -> dict[str, Any]:
    """Parses a meta file: data set name -> its entry, not yet checked.

    Raises:
        DataError: it is missing, or no JSON object.
    """
    try:
        tree = parse(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"there is no meta file {path}; check data.meta") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the meta file {path}: {error}; check data.meta") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: a JSON object of data sets by name is expected")
    if not tree:
        raise DataError(f"{path} names no data set; write one")
    return tree


def source_configs(data: DataConfig) -> list[SourceConfig]:
    """Lists the recipe's sources, those of its meta file first.

    Raises:
        DataError: the meta file is missing or wrong; lists all its problems.
    """
    configs, problems = readable_configs(data)
    if problems:
        texts = [f"{problem.name}: {problem.reason}" for problem in problems]
        raise DataError("\n".join([f"{data.meta}: {counted(len(problems), 'problem')}", *texts]))
    return configs


def readable_configs(data: DataConfig) -> tuple[list[SourceConfig], list[BadSample]]:
    """Lists the sources that can be read, and the problems of the meta file by data set.

    A wrong `length` is a problem, but hides no other: its data set is listed without it.

    Raises:
        DataError: the meta file is missing, or no JSON object.
    """
    if data.meta is None:
        return list(data.sources), []
    taken = {source.name for source in data.sources}
    configs, problems = [], []
    for name, entry in meta_entries(data.meta).items():
        wrong = dict(_meta_problems(entry))
        if name in taken:
            wrong[""] = "data.sources has this name too"
        problems += [BadSample(name, text) for text in wrong.values()]
        if "length" in wrong:
            entry = {key: value for key, value in entry.items() if key != "length"}
            del wrong["length"]
        if not wrong:
            configs.append(_from_meta(name, entry))
    return [*configs, *data.sources], problems


def check_files(data: DataConfig) -> None:
    """Checks that the meta file and every annotation file are there; reads no annotations.

    Raises:
        DataError: one is missing, or the meta file is wrong.
    """
    for config in source_configs(data):
        if not config.annotations.exists():
            # It raises, in words for each type.
            open_source(config, meta=_meta_of(config, data))


def _meta_of(config: SourceConfig, data: DataConfig) -> Path | None:
    """Returns the meta file that lists a source; None for one of the recipe itself."""
    return None if config in data.sources else data.meta


def _meta_problems(entry: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, problem)."""
    if not isinstance(entry, dict):
        yield "", "a JSON object is expected"
        return
    root, annotation = entry.get("root"), entry.get("annotation")
    if root is not None and not isinstance(root, str):
        yield "root", "`root` must be a folder"
    if not isinstance(annotation, str) or not annotation:
        yield "annotation", "`annotation` must be the path of a file"
    for key in ("repeat_time", "length", "max_dynamic_patch"):
        value = entry.get(key, 1)
        if not _is_positive(value):
            yield key, f"`{key}` must be a number above 0, not {value!r}"
        elif key != "repeat_time" and value != int(value):
            yield key, f"`{key}` must be a whole number, not {value!r}"
        elif key == "max_dynamic_patch" and value > MOST_TILES:
            yield key, f"`{key}` must be {MOST_TILES:,} at most, not {value:,}"
    if not isinstance(entry.get("data_augment", False), bool):
        yield "data_augment", "`data_augment` must be true or false"


def _is_positive(value: Any) -> bool:
    """True for a number above 0 that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):  # True is an int
        return False
    # JSON has integers of any length; `float` of a longer one raises OverflowError.
    return 0 < value <= sys.float_info.max


def _from_meta(name: str, entry: dict[str, Any]) -> SourceConfig:
    """Converts a meta entry to a source under the original's rules."""
    fields = {ours: entry[key] for key, ours in _META_KEYS.items() if key in entry}
    fields["annotations"] = Path(fields["annotations"])
    # Without a root, paths are absolute or start from the working directory, as in the original.
    fields["images"] = entry.get("root") or ""
    for key in ("num_samples", "max_tiles"):
        if key in fields:
            fields[key] = int(fields[key])
    # The original adds a missing mark silently; a recipe's own sources report it instead.
    return SourceConfig(name=name, insert_image_mark=True, **fields)


def _json(config: SourceConfig, parse: Parse) -> Source:
    """Opens JSON Lines, or a JSON list, whose entries are written to the cache as lines once."""
    path = config.annotations
    if not is_list(path):
        return LineSource(config, index_lines(path), parse)
    key = [b"list", *file_content(path)]
    index = write_once(str(path), key, lambda: (entry.encode() for entry in entries(path)))
    return LineSource(config, index, parse, unit="entry")


def _chat(config: SourceConfig) -> Source:
    return _json(config, formats.chat)


def _preference(config: SourceConfig) -> Source:
    return _json(config, formats.preference)


def _table(config: SourceConfig) -> Source:
    return TableSource(config, Table(config.annotations))


# `auto` goes by name and content; the other types name the form that the original's class reads.
_FORMS = {
    "coco-captions": "coco",
    "captions": "auto",
    "flickr_format": "flickr",
    "coco_format": "karpathy",
    "pairs": "auto",
}
"""Source type -> key of `captions.FORMS`, or "auto"."""


def _captioned(config: SourceConfig) -> Source:
    """Opens a caption file, converted to one row for every caption and every problem."""
    path, form = config.annotations, _FORMS[config.type]
    # Sources of pairs put the captions of a COCO image together, in the order of its image list.
    by_image = config.type in ("pairs", "coco_format")
    in_tars = form == "auto" and captions.form_of(path) == "webdataset"

    def rows() -> Iterator[dict[str, Any]]:
        file = captions.read(path, form, split="train")
        names = [i.name if i.slice is None else astuple(i.slice) for i in file.images]
        locations, indices, texts = file.locations, file.image_indices, file.texts
        if by_image and file.form == "coco":
            order = file.by_image()
            locations, indices = [locations[n] for n in order], [indices[n] for n in order]
            texts = [texts[n] for n in order]
        for location, image_index, text in zip(locations, indices, texts, strict=True):
            # Problems are rows too: they are reported, or skipped, as bad lines of a JSONL are.
            if image_index == captions.BAD:
                yield {"where": location, "bad": text}
            else:
                yield {"where": location, "image": names[image_index], "caption": text}

    files = tars.shards(path) if in_tars else path.rglob("*") if path.is_dir() else None
    content = file_content(path) if files is None else _fingerprints(files)
    # The number is raised when the same file gives other rows, so that old caches are not used.
    key = [b"one row a caption 2", repr((form, by_image, str(path))).encode(), *content]
    try:
        index = convert_once(str(path), key, rows)
    except DataError as error:
        raise DataError(f"source {config.name}: {error}") from None
    parse = formats.sliced_caption if in_tars else formats.caption
    return LineSource(config, index, parse, converted=True)


def _fingerprints(files: Iterable[Path]) -> list[bytes]:
    """Returns path, size and mtime_ns of files as a cache key."""
    # Tars and folders of images are too large to digest their content.
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    return [repr(stats).encode()]


def _webdataset(config: SourceConfig) -> Source:
    path = config.annotations
    files = tars.shards(path)

    def rows() -> Iterator[dict[str, Any]]:
        for tar in files:
            for row in tars.shard_rows(tar):
                # Names of members may be any bytes; the cache is UTF-8.
                slices = [[*location, printable(name)] for *location, name in row["slices"]]
                yield row | {"slices": slices}

    index = convert_once(str(path), [b"webdataset", *_fingerprints(files)], rows)
    return LineSource(config, index, formats.shard_row, converted=True)


SOURCES: dict[str, Callable[[SourceConfig], Source]] = {
    "chat": _chat,
    "coco-captions": _captioned,
    "captions": _captioned,
    "preference": _preference,
    "parquet": _table,
    "webdataset": _webdataset,
    "pairs": _captioned,
    "flickr_format": _captioned,
    "coco_format": _captioned,
}
