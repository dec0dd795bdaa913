"""Reads webdataset shards: uncompressed tars in which members of one stem are a sample."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.data.images import IMAGE_ENDINGS
from internvl.data.json_rows import parse
from internvl.errors import DataError


def shards(path: Path) -> list[Path]:
    """Lists the tars of a folder, or the single tar `path`.

    Raises:
        FileNotFoundError: `path` does not exist.
        DataError: the folder has no tars.
    """
    paths = [path] if path.is_file() else sorted(t for t in path.glob("*.tar") if _is_data(t.name))
    if not paths:
        if not path.is_dir():
            raise FileNotFoundError(path)
        raise DataError(f"there is no .tar file in {path}; check the path")
    return paths


def shard_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for each run of consecutive members with the same stem; skips hidden files.

    Keys: `where`, tar and stem; `slices`, its images as the fields of FileSlice; `row`, the content
    of its .json; `caption`, the text of its .txt; `bad`, why one of them cannot be read.

    Raises:
        DataError: not an uncompressed tar, or damaged.
    """
    row: dict[str, Any] | None = None
    for tar, member in _members(path):
        # A name that is not UTF-8 would not survive the JSON of an index.
        name = member.name.encode("utf-8", "backslashreplace").decode()
        if member.isdir() or not _is_data(name):
            continue
        # The stem ends at the first dot: "1.seg.png" belongs to sample "1", as in webdataset.
        dot, ending = name.rpartition("/")[2].partition(".")[1:]
        key = name.removesuffix(dot + ending)
        if row is None or row["where"] != f"{path.name} {key}":
            if row is not None:
                yield row
            row = {"where": f"{path.name} {key}", "slices": []}
        _add_member(row, tar, member, name, "." + ending.lower())
    if row is not None:
        yield row


def _is_data(name: str) -> bool:
    """True unless a file is hidden or added by macOS: `._x.jpg`, .DS_Store, __MACOSX/."""
    names = name.split("/")
    hidden = any(n.startswith(".") and n not in (".", "..") for n in names)
    return not hidden and "__MACOSX" not in names


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields (tar, member) in file order. Raises DataError."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115  # closed below, outside of this `try`
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check what it is") from None
    except Exception as error:  # see below
        raise DataError(f"{path} is no uncompressed tar ({error}); write it anew") from error
    with tar:
        members = iter(tar)
        while True:
            try:
                member = next(members, None)
            # tarfile parses untrusted headers and raises whatever that leads to: TarError,
            # ValueError, OverflowError, EOFError, RecursionError, OSError of a seek …
            except Exception as error:
                raise DataError(f"{path} is damaged ({error}); write it anew") from error
            if member is None:
                return
            if member.size < 0:  # tarfile would seek back and loop for ever
                raise DataError(
                    f"{path} is damaged (a member of {member.size} bytes); write it anew"
                )
            yield tar, member


def _add_member(
    row: dict[str, Any], tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, ending: str
) -> None:
    is_image = ending.endswith(IMAGE_ENDINGS)
    if not is_image and ending not in (".json", ".txt"):
        return
    if not member.isfile() or member.issparse():
        row["bad"] = f"{name} is a link or sparse; write the file itself into the tar"
    elif is_image:
        row["slices"].append([str(tar.name), member.offset_data, member.size, name])
    else:
        file = tar.extractfile(member)
        assert file is not None, "isfile was checked"
        try:
            data = file.read()
            if ending == ".json":
                row["row"] = parse(data)
            else:
                row["caption"] = data.decode("utf-8-sig")
        except (ValueError, RecursionError, tarfile.ReadError) as error:
            row["bad"] = f"{name} cannot be read ({error})"
