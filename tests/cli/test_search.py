"""`internvl index` and `internvl search`, as a user types them."""

import json
import socket

import photo_library
import pytest
from chat_folders import prompt_folder
from command_line import call
from photos import photo
from safetensors.torch import load_file, save_file

from internvl.search.searcher import Searcher


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    photo_library.load_dual(folder / "model")
    return folder


@pytest.fixture
def photos(tmp_path):
    return photo_library.library(tmp_path / "photos")


def test_index_then_search(capsys, project, photos, tmp_path):
    index, model = tmp_path / "index", project / "model"
    words = ("index", photos, "--to", index)
    code, _, err = call(capsys, *words)
    assert (code, "--model: a new index needs" in err) == (2, True)
    code, out, _ = call(capsys, *words, "--model", model, "--mode", "c,g")
    assert (code, out.splitlines()[0]) == (0, "5 photos: 5 new")
    assert f'internvl search {index} "a dog' in out
    # The index remembers its model, and loads it only if there is something to encode.
    code, out, err = call(capsys, *words)
    assert (code, out.splitlines()[0]) == (0, "5 photos: 5 as before")
    assert "model" not in err
    photo(photos / "f\n\x1b[31m.png", 60)
    exported = ("--export", "clip-retrieval", tmp_path / "clip")
    code, out, _ = call(capsys, *words, *exported)
    assert (code, out.splitlines()[0]) == (0, "6 photos: 1 new, 5 as before")
    assert (tmp_path / "clip/img_emb/img_emb_0.npy").is_file()

    code, out, _ = call(capsys, "search", index, "two cats", "--page-size", 3, "--thumbnails")
    assert code == 0
    assert [line[:5] for line in out.splitlines() if ".png" in line] == ["    1", "    2", "    3"]
    assert out.count("▀") > 3 * 32
    assert out.splitlines()[-1] == f"1 to 3 of 6 photos in {photos}; the next: --skip 3"
    code, out, _ = call(capsys, "search", index, "two cats")
    assert "f\\n\\x1b[31m.png" in out

    query = ("--text", "猫", "--weight", "-0.5", "--image", photos / "e.png", "--mode", "g")
    code, out, _ = call(capsys, "search", index, *query, "--rerank", 2, "--json")
    answer = json.loads(out)
    assert (code, answer["terms"]) == (0, ["猫 × -0.5", str(photos / "e.png")])
    assert answer["hits"][0]["match"] is not None
    assert {hit["path"] for hit in answer["hits"]} >= {str(photos / "e.png")}
    filters = ("--folder", "2023", "--folder", "2024", "--since", "2020", "--until", "2030-01")
    code, out, _ = call(capsys, "search", index, "a", *filters)
    assert (code, out.splitlines()[-1]) == (0, f"1 to 4 of 4 photos in {photos}")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["{index}"], 1, "nothing to look for: write words"),
        (["{index}", "people:-1"], 1, "no weight is above 0"),
        (["{index}", "a", "--weight", "2"], 2, "--weight follows the --text or --image"),
        (["{index}", "--image", "gone.png"], 1, "there is no image gone.png"),
        (["{index}", "a", "--mode", "g"], 1, "features of InternVL-C alone"),
        (["{index}", "a", "--since", "soon"], 1, "is no date"),
        (["{index}", "a", "--page-size", "0"], 1, "a page has at least 1 photo, not 0"),
        (["{index}", "a", "--skip", "-1"], 1, "at least 0 photos, not -1"),
        (
            ["{index}", "a", "--folder", "zzz", "--since", "2020"],
            1,
            "no photo fits --folder zzz --since 2020; change it: the index has 5 photos",
        ),
        (["{index}", "a", "--model", "{photos}"], 1, "config.json"),
    ],
)
def test_what_cannot_be_searched_is_a_sentence(
    capsys, project, photos, tmp_path, words, code, sentence
):
    index = project / "index"
    if not index.exists():
        call(capsys, "index", photos, "--to", index, "--model", project / "model")
    names = {"index": index, "photos": photos}
    words = [word.format(**names) for word in words]
    reached, _, err = call(capsys, "search", *words)
    assert (reached, sentence in err) == (code, True), err


def test_an_index_of_something_else_is_refused(capsys, project, photos, tmp_path):
    index, model = tmp_path / "index", project / "model"
    call(capsys, "index", photos, "--to", index, "--model", model)
    for words, sentence in (
        ((photos.parent, "--to", index), f"made with the photos of {photos}, not {photos.parent}"),
        ((photos, "--to", index, "--mode", "c,g"), "made with --mode c, not c,g"),
        (
            (photos, "--to", index, "--features-dtype", "float32"),
            "made with --features-dtype float16, not float32",
        ),
        ((photos, "--to", photos), "the folder of photos itself"),
        ((photos, "--to", index, "--export", "csv", "x"), "'csv' is none of clip-retrieval"),
        ((tmp_path / "gone", "--to", index), "no folder of photos"),
        ((photos, "--to", index, "--batch-size", 0), "--batch-size: at least 1, not 0"),
        ((photos, "--to", index, "--approximate", 99), "a share above 0"),
    ):
        code, _, err = call(capsys, "index", *words)
        assert (code, sentence in err) == (2, True), err
    other = tmp_path / "other"
    photo_library.load_dual(other)
    (weights,) = other.glob("*.safetensors")
    save_file({k: -v for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    chat = prompt_folder("internlm2.internlm2-chat", tmp_path / "chat")
    (tmp_path / "empty").mkdir()
    for words, sentence in (
        ((photos, "--to", photos.parent), "--model: a new index needs"),
        ((photos, "--to", tmp_path, "--model", model), "neither an index of photos nor empty"),
        ((tmp_path / "empty", "--to", tmp_path / "new", "--model", model), "holds no photo; name"),
        ((photos, "--to", index, "--model", chat), "needs an InternVL-14B model"),
        ((photos, "--to", tmp_path / "new", "--model", chat), "needs an InternVL-14B model"),
        ((photos, "--to", index, "--model", other), "is another model or has changed since"),
    ):
        code, _, err = call(capsys, "index", *words)
        assert (code > 0, sentence in err) == (True, True), err
    assert not (tmp_path / "new").exists()


def test_a_folder_of_photos_may_be_renamed(capsys, project, photos, tmp_path):
    index = tmp_path / "index"
    call(capsys, "index", photos, "--to", index, "--model", project / "model")
    photos.rename(tmp_path / "renamed")
    code, out, _ = call(capsys, "index", tmp_path / "renamed", "--to", index)
    assert (code, out.splitlines()[0]) == (0, "5 photos: 5 as before")
    code, out, _ = call(capsys, "search", index, "two cats", "--json")
    assert json.loads(out)["hits"][0]["path"].startswith(str(tmp_path / "renamed"))


def test_a_port_in_use_is_named(capsys, project, photos, tmp_path):
    index = tmp_path / "index"
    call(capsys, "index", photos, "--to", index, "--model", project / "model")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = call(capsys, "search", index, "--page", "--port", port)
    assert (code, f"--port {port}: in use by another program" in err) == (1, True)


def test_the_page_is_served_until_ctrl_c(capsys, project, photos, tmp_path, monkeypatch):
    from internvl.search.server import PageServer

    index = tmp_path / "index"
    call(capsys, "index", photos, "--to", index, "--model", project / "model")

    def interrupt(server):
        assert isinstance(server.searcher, Searcher)
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", interrupt)
    code, out, _ = call(capsys, "search", index, "--page", "--port", 0)
    assert (code, out.startswith("The page is http://127.0.0.1:")) == (130, True)
