"""Fetching from a server that stops half-way, knows ranges or not; archives taken apart safely."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from internvl.datasets import download as fetch
from internvl.errors import DataError

CONTENT = bytes(range(256)) * 64


class Handler(BaseHTTPRequestHandler):
    """/file knows ranges, /plain does not, /short ends early, everything else is not there."""

    ranges: list[str] = []  # noqa: RUF012 - one server per test, and the test reads it

    def do_GET(self) -> None:
        kind = self.path.strip("/")
        wanted = self.headers.get("Range")
        start = 0
        if wanted:
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if kind == "file" else 0
        if kind not in ("file", "plain", "short"):
            self.send_error(404)
        elif start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start : 1000 if kind == "short" else None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.ranges.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_fetch(server: str, tmp_path: Path) -> None:
    target = tmp_path / "new/file.bin"
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert fetch.fetch(f"{server}/file", target, sha256=digest) == target
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("have", [1, 5000, len(CONTENT)])
def test_an_interrupted_fetch_goes_on(server: str, tmp_path: Path, have: int) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    fetch.fetch(f"{server}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert Handler.ranges == [f"bytes={have}-"]


@pytest.mark.parametrize("kind", ["plain", "file"])
def test_a_part_that_cannot_be_gone_on_with_is_fetched_anew(
    server: str, tmp_path: Path, kind: str
) -> None:
    have = 100 if kind == "plain" else len(CONTENT) + 1
    (tmp_path / "file.part").write_bytes(b"x" * have)
    fetch.fetch(f"{server}/{kind}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_cut_connection_is_one_sentence_and_keeps_the_part(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ended after 1,000 of 16,384 bytes"):
        fetch.fetch(f"{server}/short", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file.part"]


def test_a_wrong_sum_is_refused(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 00"):
        fetch.fetch(f"{server}/file", tmp_path / "file", sha256="00")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_one_sentence(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the server answers 404"):
        fetch.fetch(f"{server}/other", tmp_path / "file")


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot be fetched .* proxy \(https_proxy\)"):
        fetch.fetch("http://example.invalid/file", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_without_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be fetched from the hub"):
        fetch.fetch_snapshot("owner/name", tmp_path)


def make_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (("train/a.jpg", "train/deep/b.jpg"), ["a.jpg", "deep/b.jpg"]),
        (("Data Set/train/a.jpg", "Data Set/test/b.jpg"), ["a.jpg"]),
        (("a.jpg", "00/b.jpg"), ["00/b.jpg", "a.jpg"]),  # no such folder: taken whole
    ],
)
def test_unpack(tmp_path: Path, members: tuple[str, ...], expected: list[str]) -> None:
    archive = make_zip(tmp_path / "a.zip", *members)
    assert fetch.unpack(archive, tmp_path / "data/train")
    assert names_in(tmp_path / "data/train") == expected
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train"]


def test_unpack_only_a_folder_of_that_name(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", "images/a.jpg")
    assert not fetch.unpack(archive, tmp_path / "data/abc_images", whole=False)
    assert list((tmp_path / "data").iterdir()) == []


def test_unpack_tar_stays_inside(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        member = tarfile.TarInfo("../outside.jpg")
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="broken archive"):
        fetch.unpack(archive, tmp_path / "data/train")
    assert names_in(tmp_path) == ["a.tar.gz"]


def test_unpack_a_broken_archive_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="remove it and fetch it again"):
        fetch.unpack(tmp_path / "a.zip", tmp_path / "data/train")
    assert names_in(tmp_path) == ["a.zip"]


def test_unpack_files_by_name(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", "x/opensource/a.jsonl", "b.jsonl", "c.txt")
    fetch.unpack_files(archive, {"a.jsonl", "b.jsonl"}, tmp_path / "out")
    assert names_in(tmp_path / "out") == ["a.jsonl", "b.jsonl"]
