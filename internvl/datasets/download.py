"""Downloads files from public URLs, with resume and length check, and unpacks archives."""

import errno
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Collection
from pathlib import Path

from internvl.errors import DataError
from internvl.log import Progress, get_logger

_CHUNK = 1 << 20  # bytes read at once
_TIMEOUT_S = 60
_MIB = 1 << 20
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
"""File endings that `unpack` supports."""


def fetch(address: str, target: Path, *, sha256: str | None = None) -> Path:
    """Downloads a URL to a file and resumes an interrupted download.

    Args:
        sha256: expected digest, hexadecimal.

    Raises:
        DataError: no network, a proxy in the way, an HTTP error, or another length or digest than
            expected; one sentence with the URL.
    """
    # Renamed when it is complete, so that a file under its own name is always whole.
    partial = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    get_logger().info("fetching %s", address)
    try:
        expected = _append(address, partial)
    except urllib.error.HTTPError as error:
        raise DataError(f"{address}: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise DataError(
            f"{address} cannot be fetched ({reason}); check the network and the proxy "
            f"(https_proxy), or fetch it elsewhere and put it at {target}; the same command "
            "goes on where this one stopped"
        ) from None
    _check(address, partial, expected, sha256)
    os.replace(partial, target)
    return target


def _append(address: str, partial: Path) -> int | None:
    """Appends the rest of the file to `partial`; returns the whole length in bytes, if known."""
    have = partial.stat().st_size if partial.exists() else 0
    # Some servers refuse urllib's own User-Agent.
    request = urllib.request.Request(address, headers={"User-Agent": "internvl"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # 416: nothing lies beyond these bytes. They are the whole file, or another file's.
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if total.isdigit() and int(total) == have:
            return have
        partial.unlink()
        return _append(address, partial)
    with answer:
        # A server without ranges answers 200 and sends the file from its start.
        goes_on = answer.status == 206
        length = answer.headers.get("Content-Length")
        start = have if goes_on else 0
        total_bytes = start + int(length) if length else None
        mib = None if total_bytes is None else total_bytes // _MIB
        with (
            partial.open("ab" if goes_on else "wb") as file,
            Progress("MiB", total=mib) as progress,
        ):
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                progress.update(len(chunk) // _MIB)
    return total_bytes


def _check(address: str, partial: Path, expected: int | None, sha256: str | None) -> None:
    size = partial.stat().st_size
    # `read` does not raise if a connection ends early.
    if expected is not None and size < expected:
        raise DataError(
            f"{address}: the connection ended after {size:,} of {expected:,} bytes; "
            "the same command goes on from there"
        )
    if sha256 is None:
        return
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        partial.unlink()
        raise DataError(f"{address}: SHA-256 is {digest}, expected {sha256}; it was removed")


def fetch_snapshot(repository: str, folder: Path) -> None:
    """Downloads a data set of the Hugging Face hub into a folder; existing files are kept.

    Raises:
        DataError: the hub cannot be reached or refuses; one sentence.
    """
    # Here: the package is slow to import, and most commands download nothing.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    get_logger().info("fetching the data set %s from the hub", repository)
    try:
        snapshot_download(repository, repo_type="dataset", local_dir=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"the data set {repository} cannot be fetched from the hub ({reason}); check the "
            "network, the proxy (https_proxy) and HF_HUB_OFFLINE"
        ) from None


def unpack(archive: Path, folder: Path, *, whole: bool = True) -> bool:
    """Unpacks an archive so that its shallowest folder called `folder.name` becomes `folder`.

    Atomic: nothing is left of a failed call.

    Args:
        whole: True takes all of an archive without such a folder, False nothing.

    Returns:
        True if `folder` was written.

    Raises:
        DataError: the archive is broken.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        root = Path(temporary) / "all"
        root.mkdir()
        get_logger().info("unpacking %s", archive)
        _extract(archive, root)
        named = [path for path in root.rglob(folder.name) if path.is_dir()]
        if not named and not whole:
            return False
        if folder.is_dir():
            folder.rmdir()  # it is empty; what holds something is not unpacked over
        min(named, key=lambda path: len(path.parts), default=root).rename(folder)
    return True


def unpack_files(archive: Path, names: Collection[str], folder: Path) -> None:
    """Extracts the files called `names` from any folder of an archive into `folder`.

    Raises:
        DataError: the archive is broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacked-") as temporary:
        _extract(archive, Path(temporary))
        for path in Path(temporary).rglob("*"):
            if path.name in names and path.is_file():
                os.replace(path, folder / path.name)


def _extract(archive: Path, folder: Path) -> None:
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                # Refuses absolute paths, links that lead outside, and devices.
                tar.extractall(folder, filter="data")
    except OSError as error:
        # A path outside the archive is EINVAL; what else has a number is the disk's.
        if error.errno in (None, errno.EINVAL):
            raise DataError(_broken(archive, error)) from None
        raise OSError(error.errno, error.strerror, error.filename or str(folder)) from None
    except Exception as error:  # zlib's, struct's …: a damaged archive may raise anything
        raise DataError(_broken(archive, error)) from error


def _broken(archive: Path, error: Exception) -> str:
    return f"{archive} is a broken archive ({error}); remove it and fetch it again"
