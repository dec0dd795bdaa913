"""What a user sees: exit codes and one sentence with the remedy."""

import json
import subprocess
import sys

import dual_folders
import pytest
import tiny_run

from internvl import cli
from internvl.models import hub


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def call(capsys, *words):
    """(exit code, standard output, standard error) of a command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def last_line(err):
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_is_instant(verb):
    """No verb imports torch to explain itself, which alone takes seconds."""
    code = (
        "import sys\nfrom internvl import cli\n"
        f"try: cli.main({[*([verb] if verb else []), '--help']})\n"
        "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: internvl" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["optm.lr=1"], 2, "optm: unknown key; did you mean optim?"),
        (["optim.lr=fast"], 2, "optim.lr: input should be a valid number"),
        (["data.sources.0.annotations=gone.jsonl"], 1, "there is no annotation file gone.jsonl"),
        (["model.id=gone/model"], 1, "gone/model"),
        (["data.tiles.size=60"], 1, "data.tiles.size = 60 does not fit this model"),
    ],
)
def test_wrong_recipes(capsys, project, tmp_path, overrides, code, said):
    found, _, err = call(capsys, "train", project, f"run={tmp_path / 'run'}", *overrides)
    assert (found, said in err) == (code, True), err
    assert "Traceback" not in err


def _with_lines(project, tmp_path, *lines):
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return [
        f"data.sources.0.annotations={file}",
        f"data.sources.0.images={tmp_path}",
        f"run={tmp_path / 'run'}",
        "global_batch=1",
        "steps=1",
    ]


def _line(question, answer, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **more})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "is empty; it holds no sample"),
        (["{cut"], "lines.jsonl line 1: not JSON"),
        ([_line("<image>\nx", "y", image="gone.png")], "line 1: there is no image"),
        ([_line("<image>\nx", "y", image="cut.jpg")], "cut.jpg: the image cannot be decoded"),
        ([_line("x <image> <image>", "y", image="good.png")], "2 <image> mark(s)"),
        ([_line("x", "")], "an answer is empty"),
        ([_line("x " * 400, "y")], "would lose every answer. Raise data.max_tokens"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_wrong_data(capsys, project, tmp_path, lines, said, verb):
    from PIL import Image

    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    picture.save(tmp_path / "good.png")
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:600])
    code, out, err = call(capsys, verb, project, *_with_lines(project, tmp_path, *lines))
    assert code == 1
    assert said in out + err, out + err
    assert "Traceback" not in err


def test_a_conversation_of_one(capsys, project, tmp_path):
    image = project.parent / "red-circle.png"
    words = ("chat", project.parent / "start", "--image", image, "--prompt", "What is this?")
    code, out, _ = call(capsys, *words, "--max-new-tokens", 3)
    assert (code, out != "") == (0, True)
    code, _, err = call(
        capsys, "chat", project.parent / "start", "--image", "gone.png", "--prompt", "x"
    )
    assert (code, "there is no image gone.png" in err) == (1, True)


def test_evaluate_and_export(capsys, project, tmp_path):
    folder = project.parent
    words = ("evaluate", folder / "start", "--annotations", folder / "captions.json", "--limit", 3)
    code, out, _ = call(
        capsys, *words, "--images", folder, "--prompt", "What is this?", "--to", tmp_path / "scores"
    )
    assert code == 0
    assert "caption-file/exact" in out
    code, out, _ = call(capsys, "export", folder / "start", "--to", tmp_path / "out")
    assert (code, (tmp_path / "out" / "config.json").exists()) == (0, True)
    code, _, err = call(capsys, "export", folder / "start", "--to", tmp_path / "out")
    assert (code, "exists and is not empty" in err) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["retrieval-flickr30"], "no task 'retrieval-flickr30'; did you mean retrieval-flickr30k?"),
        (["retrieval-folder"], "retrieval-folder needs --annotations"),
        (["retrieval-xtd", "--language", "de"], "has no language 'de'; it has en, es"),
        (["caption-coco"], "lacks 3 file(s) or folder(s)"),
        (["caption-coco"], "coco_karpathy_test.json: from https://github.com/OpenGVLab/"),
        (["retrieval-folder", "--annotations", "x", "--mode", "h"], "modes.0: input should be"),
    ],
)
def test_tasks_that_cannot_run_load_no_model(capsys, tmp_path, words, said):
    code, _, err = call(capsys, "evaluate", "no/model", *words, "--root", tmp_path)
    assert (code, said in err) == (2, True), err


def test_models_downloads_by_name_or_id(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download", lambda name, to: asked.append(name) or to)
    for name in ("internvl2-2b", "OpenGVLab/InternVL3-1B-hf"):
        assert call(capsys, "models", name, "--download", "--to", "x")[:2] == (0, "x\n")
    assert asked == ["OpenGVLab/InternVL2-2B", "OpenGVLab/InternVL3-1B-hf"]


def test_models_and_doctor(capsys):
    code, out, _ = call(capsys, "models")
    assert (code, "InternVL2-2B" in out) == (0, True)
    code, out, _ = call(capsys, "models", "InternVL2-2B")
    assert (code, "internlm2" in out.lower()) == (0, True)
    code, _, err = call(capsys, "models", "InternVL2-2BB")
    assert (code, "InternVL2-2B" in err) == (2, True)
    code, out, _ = call(capsys, "doctor")
    assert "torch" in out


def test_debug_shows_the_traceback(project, tmp_path):
    with pytest.raises(Exception, match="there is no annotation file"):
        cli.main(
            [
                "train",
                str(project),
                "--debug",
                "data.sources.0.annotations=gone",
                f"run={tmp_path}/r",
            ]
        )


def test_no_conversation_with_a_retrieval_model(capsys, tmp_path):
    folder = dual_folders.dual_folder(tmp_path / "dual")
    code, _, err = call(capsys, "chat", folder, "--prompt", "What is this?")
    assert code == 1
    assert "does not converse" in last_line(err)
