"""Annotation files as sources of samples: each kind opened, indexed, and read line by line.

Nothing is held in memory but numbers. A source that is not JSONL is turned into it once, in the
cache folder (data/index.py), except tables, which Arrow maps.
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
from internvl.errors import BadSample, DataError

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
    """What a source's annotations hold, to tell later whether they were changed."""

    samples: int
    size: int
    """Bytes of the lines; 0 where they are of another form."""
    digest: str


class Source(Protocol):
    """Samples by number, from 0 on."""

    @property
    def config(self) -> SourceConfig: ...

    def __len__(self) -> int: ...

    @property
    def groups(self) -> np.ndarray:
        """int32 (len,): the same number for samples that show the same images."""
        ...

    def samples(self, indices: Sequence[int]) -> Iterator[Sample | BadSample]:
        """Some samples, in order; a bad one yields what is wrong with it."""
        ...

    def content(self) -> Content:
        """What the annotations hold, wherever they lie; images and videos are not looked at."""
        ...

    def begins_with(self, content: Content) -> bool:
        """Whether these annotations are those of `content` with samples added at their end."""
        ...


@dataclass(frozen=True)
class LineSource:
    """A source whose rows are the lines of a JSONL file."""

    config: SourceConfig
    index: LineIndex
    parse: Parse
    converted: bool = False
    """The lines are ours, made of a file of another form: `where` says what a row was there."""
    unit: str = "line"
    """What a row is called, with its number from 1 on."""

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
                if self.converted:
                    name = f"{self.config.annotations} {row['where']}"
                if "bad" in row and self.converted:
                    raise BadSample(name, row["bad"])
                yield self.parse(name, row, self.config)
            except BadSample as bad:
                yield bad

    def content(self) -> Content:
        """See `Source.content`."""
        without = self._folder()
        if without:
            return Content(len(self), 0, digest_of(self.index.path, None, without))
        return Content(len(self), int(self.index.starts[-1]), self.index.digest)

    def begins_with(self, content: Content) -> bool:
        """See `Source.begins_with`."""
        if content.samples > len(self):
            return False
        without = self._folder()
        end = int(self.index.starts[content.samples])
        if without:
            return digest_of(self.index.path, end, without) == content.digest
        if digests_of(self.index.path, end)[1] == content.digest:
            return True
        # Runs that are older digested the bytes; the last line may have had no end yet.
        old = content.size in (end, end - 1, end - 2)
        return old and digest_of(self.index.path, content.size) == content.digest

    def _folder(self) -> bytes:
        """What rows of tars hold besides their content: where the tars lie."""
        if not self.converted:
            return b""
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
        """See `Source.begins_with`: tables grow by whole files."""
        ends = self.table.ends.tolist()
        if content.samples not in ends:
            return False
        return self.table.digest(ends.index(content.samples) + 1) == content.digest


def open_source(config: SourceConfig) -> Source:
    """A source, indexed.

    Raises:
        DataError: its file is missing, unreadable, empty, or does not hold `num_samples` samples.
    """
    try:
        source = SOURCES[config.type](config)
    except FileNotFoundError:
        raise DataError(
            f"source {config.name}: there is no annotation file {config.annotations}; "
            "check `annotations` of this source in the recipe"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"source {config.name}: {config.annotations} is not UTF-8; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        # Python refuses a path with a NUL character by a ValueError.
        what = f"cannot read {str(config.annotations)!r}: {error}; check the path"
        raise DataError(f"source {config.name}: {what}") from None
    if not len(source):
        raise DataError(f"source {config.name}: {config.annotations} is empty; it holds no sample")
    if config.num_samples not in (None, len(source)):
        raise DataError(
            f"source {config.name}: {config.annotations} holds {len(source):,} samples, not "
            f"{config.num_samples:,} as its num_samples (`length` in a meta file) says"
        )
    return source


def meta_entries(path: Path) -> dict[str, Any]:
    """What a meta file says, data set by data set, not yet checked.

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
    """The recipe's sources, those of its meta file first.

    Raises:
        DataError: the meta file is missing or wrong; all its problems at once.
    """
    if data.meta is None:
        return list(data.sources)
    tree = meta_entries(data.meta)
    taken = {source.name for source in data.sources}
    problems = [f"{name}: data.sources has this name too" for name in tree if name in taken]
    problems += [
        f"{name}: {what}" for name, entry in tree.items() for what in _meta_problems(entry)
    ]
    if problems:
        raise DataError("\n".join([f"{data.meta}: {len(problems)} problem(s)", *problems]))
    return [*(_from_meta(name, entry) for name, entry in tree.items()), *data.sources]


def _meta_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield "a JSON object is expected"
        return
    root, annotation = entry.get("root"), entry.get("annotation")
    if root is not None and not isinstance(root, str):
        yield "`root` must be a folder"
    if not isinstance(annotation, str) or not annotation:
        yield "`annotation` must be the path of a file"
    for key in ("repeat_time", "length", "max_dynamic_patch"):
        value = entry.get(key, 1)
        if not _is_positive(value):
            yield f"`{key}` must be a number above 0, not {value!r}"
        elif key != "repeat_time" and value != int(value):
            yield f"`{key}` must be a whole number, not {value!r}"
        elif key == "max_dynamic_patch" and value > MOST_TILES:
            yield f"`{key}` must be {MOST_TILES:,} at most, not {value:,}"
    if not isinstance(entry.get("data_augment", False), bool):
        yield "`data_augment` must be true or false"


def _is_positive(value: Any) -> bool:
    """Whether this is a number above 0 that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def _from_meta(name: str, entry: dict[str, Any]) -> SourceConfig:
    """A meta entry under the original's rules: a mark is put where a single image has none."""
    known = {ours: entry[key] for key, ours in _META_KEYS.items() if key in entry}
    known["annotations"] = Path(known["annotations"])
    # As in the original, paths are then absolute, or start from the working directory.
    known["images"] = entry.get("root") or ""
    for key in ("num_samples", "max_tiles"):
        if key in known:
            known[key] = int(known[key])
    return SourceConfig(name=name, insert_image_mark=True, **known)


def _json(config: SourceConfig, parse: Parse) -> Source:
    """JSON Lines, or a JSON list, whose entries are written as lines into the cache once."""
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


_FORMS = {
    "coco-captions": "coco",
    "captions": "auto",
    "flickr_format": "flickr",
    "coco_format": "karpathy",
    "pairs": "auto",
}
"""Source type -> form of data/captions/."""


def _captioned(config: SourceConfig) -> Source:
    """One row for every caption, and one for everything that is wrong with the file."""
    path, form = config.annotations, _FORMS[config.type]
    # Sources of pairs put the captions of a COCO image together, as the image list has them.
    by_image = config.type in ("pairs", "coco_format")
    in_tars = form == "auto" and captions.form_of(path) == "webdataset"

    def rows() -> Iterator[dict[str, Any]]:
        file = captions.read(path, form, split="train")
        names = [i.name if i.slice is None else astuple(i.slice) for i in file.images]
        places, numbers, texts = file.places, file.numbers, file.texts
        if by_image and file.form == "coco":
            order = file.by_image()
            places, numbers = [places[n] for n in order], [numbers[n] for n in order]
            texts = [texts[n] for n in order]
        for where, number, text in zip(places, numbers, texts, strict=True):
            if number == captions.BAD:
                yield {"where": where, "bad": text}
            else:
                yield {"where": where, "image": names[number], "caption": text}

    files = tars.shards(path) if in_tars else path.rglob("*") if path.is_dir() else None
    content = file_content(path) if files is None else _states(files)
    key = [b"one row a caption 2", repr((form, by_image, str(path))).encode(), *content]
    try:
        index = convert_once(str(path), key, rows)
    except DataError as error:
        raise DataError(f"source {config.name}: {error}") from None
    parse = formats.sliced_caption if in_tars else formats.caption
    return LineSource(config, index, parse, converted=True)


def _states(files: Iterable[Path]) -> list[bytes]:
    """Name, size and time of files, where their content is too large to read for a key."""
    found = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    return [repr(found).encode()]


def _webdataset(config: SourceConfig) -> Source:
    path = config.annotations
    files = tars.shards(path)

    def rows() -> Iterator[dict[str, Any]]:
        for tar in files:
            for row in tars.shard_rows(tar):
                slices = [[*place, printable(name)] for *place, name in row["slices"]]
                yield row | {"slices": slices}

    index = convert_once(str(path), [b"webdataset", *_states(files)], rows)
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
