"""Webdataset shards: uncompressed tars whose members of one stem are a sample."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.data.images import IMAGE_ENDINGS
from internvl.data.json_rows import parse
from internvl.data.records import DataError


def shards(path: Path) -> list[Path]:
    """The tars of a folder, or the one that is named.

    Raises:
        FileNotFoundError: there is neither.
        DataError: a folder without tars.
    """
    found = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not found:
        if not path.is_dir():
            raise FileNotFoundError(path)
        raise DataError(f"there is no .tar file in {path}")
    return found


def shard_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A row for every run of members with the same stem.

    Keys: `where`, tar and stem; `slices`, its pictures as the fields of FileSlice; `row`, what its
    .json holds; `caption`, the text of its .txt; `bad`, why one of the two cannot be read.

    Raises:
        DataError: the file is no uncompressed tar.
    """
    row: dict[str, Any] | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                dot, ending = member.name.rpartition("/")[2].partition(".")[1:]
                key = member.name.removesuffix(dot + ending)
                if row is None or row["where"] != f"{path.name} {key}":
                    if row is not None:
                        yield row
                    row = {"where": f"{path.name} {key}", "slices": []}
                _add_member(row, tar, member, "." + ending.lower())
    except tarfile.TarError as error:
        raise DataError(f"{path} is no uncompressed tar ({error})") from None
    if row is not None:
        yield row


def _add_member(
    row: dict[str, Any], tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str
) -> None:
    if ending.endswith(IMAGE_ENDINGS):
        row["slices"].append([str(tar.name), member.offset_data, member.size, member.name])
    elif ending in (".json", ".txt"):
        file = tar.extractfile(member)
        assert file is not None, "isfile was checked"
        try:
            data = file.read()
            if ending == ".json":
                row["row"] = parse(data)
            else:
                row["caption"] = data.decode("utf-8-sig")
        except ValueError as error:
            row["bad"] = f"{member.name} cannot be read ({error})"
