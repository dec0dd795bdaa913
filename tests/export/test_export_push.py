"""Pushed exports: the model card, and a hub of this machine asked by the real client."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import local_hub
import pytest
import tiny_run
import yaml
from command_line import call
from dual_folders import dual_folder
from huggingface_hub import HfApi

from internvl import export, train
from internvl.config import recipes
from internvl.config.recipes import load_recipe, resolve
from internvl.errors import ExportError
from internvl.export import card, push
from internvl.inference import load as loading
from internvl.inference.opened import open_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps that was evaluated twice, and its export."""
    made = tmp_path_factory.mktemp("pushed")
    recipe = tiny_run.make(made, steps=2)
    (made / "start/README.md").write_text("---\nlicense: mit\n---\n# Start\n", encoding="utf-8")
    train.run(load_recipe(recipe))
    evals = made / "run/evals"
    evals.mkdir()
    for step, value in ((0, 0.125), (1, 0.5), (3, 0.75)):
        (evals / f"{step:06d}.json").write_text(json.dumps({"test-en/exact": value}), "utf-8")
    export.run(made / "run", made / "out")
    return made


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def hub():
    with local_hub.running() as running:
        yield running


def api(hub, token=local_hub.WRITES):
    return HfApi(endpoint=hub.url, token=token)


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_a_card_says_what_the_run_says(folder):
    text = card.build(folder / "out", "ada/shapes", open_model(folder / "run"), "hf")
    assert front_matter(text) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["internvl"],
    }
    assert "# shapes\n\n`start`, trained further for 2 steps" in text
    # Of the newest evaluation that is not newer than the weights.
    assert "at step 1" in text
    assert "| test-en | exact | 0.5 |" in text
    assert "internvl serve ada/shapes --name shapes" in text
    # Not a word of where it was trained.
    assert str(folder) not in text


def test_the_recipe_of_a_card_is_the_run_s(folder):
    text = card.build(folder / "out", "ada/shapes", open_model(folder / "run"), "hf")
    (shown,) = blocks(text, "yaml")
    tree, recipe = yaml.safe_load(shown), load_recipe(folder / "run/recipe.yaml")
    assert tree["data"]["sources"] == [
        {"name": "shapes", "type": "chat", "annotations": "train.jsonl", "images": folder.name}
    ]
    assert "compute" not in tree or "loss_chunk" not in tree["compute"]
    again = resolve(tree)
    for section in ("optim", "compute", "parallel", "objective", "global_batch", "steps", "seed"):
        assert getattr(again, section) == getattr(recipe, section), section


def test_the_python_of_a_card_runs(folder):
    text = card.build(folder / "out", "ada/shapes", open_model(folder / "run"), "hf")
    ours, theirs = blocks(text, "python")
    here = {}
    image = folder / "red-circle.png"
    local = ours.replace("ada/shapes", str(folder / "out")).replace("cat.jpg", str(image))
    exec(local, here)
    assert here["model"].folder == folder / "out"
    assert "AutoProcessor" in theirs


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        ("pretrained/InternVL2-2B", "OpenGVLab/InternVL2-2B"),
        ("InternVL3-8B-hf", "OpenGVLab/InternVL3-8B"),
        ("InternVL2_5-8B-MPO", "OpenGVLab/InternVL2_5-8B-MPO"),
        ("internvl2-2b", "OpenGVLab/InternVL2-2B"),
        ("internvl_c_13b_224px.pth", None),
        ("InternVL2-2B-mine", None),
    ],
)
def test_a_download_is_known_by_its_name(folder, tmp_path, name, base_model):
    opened = open_model(folder / "out")
    opened = dataclasses.replace(opened, name=name, local=tmp_path / name)
    head = front_matter(card.build(folder / "out", "ada/x", opened, "hf"))
    assert head.get("base_model") == base_model
    assert "license" not in head


def test_a_model_of_the_hub_is_the_base_model(folder):
    opened = open_model(folder / "out")
    opened = dataclasses.replace(opened, name="OpenGVLab/InternVL2-2B", local=None)
    text = card.build(folder / "out", "ada/x", opened, "hf")
    assert front_matter(text)["base_model"] == "OpenGVLab/InternVL2-2B"
    assert front_matter(text)["base_model_relation"] == "finetune"
    assert "[OpenGVLab/InternVL2-2B](https://huggingface.co/OpenGVLab/InternVL2-2B)" in text


def test_a_base_is_no_model_of_the_hub_from_elsewhere(folder):
    # As a run names its base that is read from another folder than the one it was trained in.
    opened = dataclasses.replace(open_model(folder / "out"), name="runs/secret-start")
    text = card.build(folder / "out", "ada/x", opened, "hf")
    assert "base_model" not in front_matter(text)
    assert "huggingface.co/runs" not in text


def test_the_address_of_a_judge_has_no_password(folder):
    evals = {"v": {"type": "benchmark", "task": "mmvet", "judge": "http://me:pw@host:8000/v1"}}
    recipe = load_recipe(folder / "run/recipe.yaml")
    recipe = resolve({**recipes.to_tree(recipe), "evals": evals})
    assert card.public_recipe(recipe)["evals"]["v"]["judge"] == "http://host:8000/v1"


def test_a_prompt_is_no_path(folder):
    """Though it begins like one; a section that is called `prompt` is cut as any other."""
    recipe = load_recipe(folder / "run/recipe.yaml")
    section = {"type": "caption", "annotations": "/data/a.json", "prompt": "/think ../a/b?"}
    tree = recipes.to_tree(recipe) | {"evals": {"prompt": section}}
    tree["data"]["system_message"] = "~/ is your home / nothing else"
    shown = card.public_recipe(resolve(tree))
    assert shown["data"]["system_message"] == "~/ is your home / nothing else"
    assert shown["evals"]["prompt"]["annotations"] == "a.json"
    assert shown["evals"]["prompt"]["prompt"] == "/think ../a/b?"


def test_a_card_of_internvl_14b(tmp_path):
    dual = dual_folder(tmp_path / "InternVL-14B-224px")
    (dual / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    export.run(dual, tmp_path / "out", "official")
    text = card.build(tmp_path / "out", "ada/finds", open_model(dual), "official")
    assert front_matter(text) == {
        "license": "mit",
        "base_model": "OpenGVLab/InternVL-14B-224px",
        "base_model_relation": "finetune",
        # Without the original's Python files nothing else opens it.
        "library_name": "internvl",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["internvl"],
    }
    assert "model.similarity(" in text
    assert "AutoProcessor" not in text


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.y/z\n---\n", "qwen"),
        ("no front matter", None),
        ("---\nlicense: [a\n---\n", None),
        ("---\nlicense: 7\n---\n", None),
        ("---\n- mit\n---\n", None),
    ],
)
def test_a_licence_is_what_the_base_states(tmp_path, text, license):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    stated = card.license_of(tmp_path)
    assert stated.get("license_name") == license
    assert (stated == {}) == (license is None)


@pytest.mark.parametrize(
    ("link", "name", "linked"),
    [
        ("LICENSE", "OpenGVLab/InternVL2-2B", "OpenGVLab/InternVL2-2B/blob/main/LICENSE"),
        ("./LICENSE.md", "OpenGVLab/InternVL2-2B", "OpenGVLab/InternVL2-2B/blob/main/LICENSE.md"),
        ("https://huggingface.co/a/LICENSE", "OpenGVLab/InternVL2-2B", "a/LICENSE"),
        # Of no repository: the file is not there.
        ("LICENSE", "start", None),
    ],
)
def test_the_file_of_a_licence_is_linked_where_it_is(folder, tmp_path, link, name, linked):
    text = f"---\nlicense: other\nlicense_name: qwen\nlicense_link: {link}\n---\n"
    base = write(tmp_path / name, {"README.md": text})
    opened = open_model(folder / "out")
    files = dataclasses.replace(opened.files, folder=base)
    opened = dataclasses.replace(opened, name=name, files=files, local=tmp_path / name)
    built = card.build(folder / "out", "ada/x", opened, "hf")
    address = linked and f"https://huggingface.co/{linked}"
    assert front_matter(built).get("license_link") == address
    assert (f"[qwen]({address})" if linked else "`qwen`") + ", as " in built


def test_a_push_creates_and_fills_a_private_repository(folder, hub):
    small = {"config.json": "{}", "sub/notes.txt": "", "README.md": "---\nlicense: mit\n---\n"}
    repository = push.open_repository("shapes", api=api(hub))
    assert repository.id == "ada/shapes"
    out = write(folder / "small", small)
    assert push.send(repository, out, "a first export") == f"{hub.url}/ada/shapes"
    stored = hub.repositories["ada/shapes"]
    assert stored["private"] is True
    assert {name: content.decode() for name, content in stored["files"].items()} == small
    assert stored["messages"][0].startswith("a first export")


def test_an_update_leaves_no_earlier_shard(tmp_path, hub):
    hub.add("ada/old", **{"model-00002-of-00002.json": "old", ".gitattributes": "x"})
    with pytest.raises(ExportError, match="is there already; choose another name, or add --update"):
        push.open_repository("ada/old", api=api(hub))
    repository = push.open_repository("ada/old", update=True, api=api(hub))
    push.send(repository, write(tmp_path / "new", {"config.json": "{}"}), "again")
    assert set(hub.repositories["ada/old"]["files"]) == {"config.json", ".gitattributes"}


def test_what_an_export_that_failed_has_created_is_filled(hub):
    hub.add("ada/empty", **{".gitattributes": "x"})
    assert push.open_repository("ada/empty", api=api(hub)).is_new
    hub.add("ada/written", **{".gitattributes": "x", "README.md": "# Soon"})
    with pytest.raises(ExportError, match="is there already"):
        push.open_repository("ada/written", api=api(hub))


@pytest.mark.parametrize(
    ("repo_id", "token", "options", "said"),
    [
        ("ada/x", False, {}, "there is no token of the hub; make one that may write at"),
        ("ada/x", "hf_wrong", {}, "the hub does not accept the token"),
        ("ada/x", local_hub.READS, {}, "the token 'of a test' may only read; make one that may"),
        ("eve/x", local_hub.WRITES, {}, "the token has no right to write to eve; name an owner"),
        ("a b", local_hub.WRITES, {}, "--push a b: no hub id"),
        ("ada/there", local_hub.WRITES, {"update": True, "public": True}, "--public is for a new"),
    ],
)
def test_refusals_are_sentences(hub, repo_id, token, options, said):
    hub.add("ada/there", **{"config.json": "{}"})
    with pytest.raises(ExportError, match=re.escape(said)) as refused:
        push.open_repository(repo_id, api=api(hub, token), **options)
    assert "\n" not in str(refused.value)


def test_nothing_answers():
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=local_hub.WRITES)
    with pytest.raises(ExportError, match="127.0.0.1:9 cannot be reached .*export without --push"):
        push.open_repository("ada/x", api=nowhere)


def test_an_upload_that_breaks_off_names_the_command_that_goes_on(tmp_path, hub):
    repository = push.open_repository("ada/x", api=api(hub))
    hub.is_full = True
    out = write(tmp_path / "out", {"config.json": "{}"})
    with pytest.raises(
        ExportError, match=rf"complete, .*limit reached.*`hf upload ada/x {out}` goes on"
    ):
        push.send(repository, out, "x")
    # Of an update it deletes as well.
    repository = dataclasses.replace(repository, is_new=False)
    with pytest.raises(ExportError, match=rf"`hf upload ada/x {out} --delete '\*'` goes on"):
        push.send(repository, out, "x")


@pytest.mark.slow
def test_the_command_line_pushes_what_it_has_exported(folder, tmp_path, hub):
    """In a process of its own: the client reads the hub's address when it is imported."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    # Large files by the protocol that this hub speaks.
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": local_hub.WRITES}
    # Verbs that other tests call in this process leave it behind.
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    to = tmp_path / "out"
    command = [sys.executable, "-m", "internvl", "export", str(folder / "run"), "--to", str(to)]
    command += ["--push", "ada/shapes"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(to), f"{hub.url}/ada/shapes"]
    # The bar of the upload, and none of what is loaded.
    assert "model.safetensors: 100%" in done.stderr
    assert "Loading weights" not in done.stderr
    stored = hub.repositories["ada/shapes"]
    assert stored["private"] is True
    assert stored["files"] == {file.name: file.read_bytes() for file in to.iterdir()}
    assert stored["messages"] == ["Exported by internvl, step 2"]
    # The folder is the model that it says it is.
    assert loading.load(to).folder == to


def test_no_connection_without_a_push(capsys, folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    code, _, _ = call(capsys, "export", folder / "run", "--to", tmp_path / "plain")
    assert (code, (tmp_path / "plain" / card.NAME).exists()) == (0, False)
    # A target that is taken is refused before the hub is asked.
    words = ("export", folder / "run", "--to", tmp_path / "plain", "--push", "ada/x")
    code, _, err = call(capsys, *words)
    assert (code, "exists and is not empty" in err) == (1, True)


def test_options_of_a_push_need_one(capsys, folder, tmp_path):
    code, _, err = call(capsys, "export", folder / "run", "--to", tmp_path / "x", "--public")
    assert (code, "--public and --update are options of --push ID" in err) == (1, True)
