"""What a user sees: exit codes and one sentence with the remedy."""

import errno
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import dual_folders
import pytest
import tiny_run
from command_line import call

import internvl
from internvl import cli
from internvl.errors import BadImage, BadSample, ConfigError, DataError, UnknownModel, UserError
from internvl.models import hub


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def last_line(err):
    return err.strip().splitlines()[-1]


def test_help_is_instant():
    """No verb imports torch to explain itself, which alone takes seconds."""
    code = (
        "import sys\nfrom internvl import cli\n"
        "for words in [[], *([verb] for verb in cli.VERBS)]:\n"
        "    print(*words, end=': ')\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("", *cli.VERBS):
        assert f"{verb}: usage: internvl" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["optm.lr=1"], 2, "optm: unknown key; did you mean optim?"),
        (["optim.lr=fast"], 2, "optim.lr: must be a number"),
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
        ([_line("x <image> <image>", "y", image="good.png")], "2 <image> marks"),
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
    words += ("--metrics", "without-meteor")
    code, out, _ = call(
        capsys, *words, "--images", folder, "--prompt", "What is this?", "--to", tmp_path / "scores"
    )
    assert code == 0
    assert "caption-file/exact" in out
    assert "caption-file/cider" in out
    assert "meteor" not in out
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
        (["caption-coco"], "caption-coco: 3 files or folders are missing"),
        (["caption-coco"], "coco_karpathy_test.json: from https://github.com/OpenGVLab/"),
        (["retrieval-folder", "--annotations", "x", "--mode", "h"], "modes.0: must be"),
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


def raising(monkeypatch, error):
    """A verb that fails with an error."""

    def verb(args):
        raise error

    monkeypatch.setitem(cli.VERBS, "doctor", verb)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.png: cut; replace it"), 1, "a.png: cut; replace it"),
        (DataError("x.jsonl: gone; check it"), 1, "x.jsonl: gone; check it"),
        (BadSample("x.jsonl line 3", "no text"), 1, "x.jsonl line 3: no text"),
        (BadImage("there is no image a.png"), 1, "there is no image a.png"),
        (UnknownModel("no model X; nearest: Y"), 1, "no model X; nearest: Y"),
        (ConfigError("optim.lr: wrong"), 2, "optim.lr: wrong"),
        (OSError(errno.EACCES, "x", "out"), 1, "out: permission denied; allow it"),
        (OSError(errno.ENOSPC, "x", "out/a"), 1, "out/a: the disk is full; free some space"),
        (OSError(errno.EROFS, "x", "out"), 1, "out: the file system is read-only; choose"),
        (OSError(errno.EISDIR, "x", b"out"), 1, "out: this is a folder, and a file is expected"),
        (OSError(errno.ENOTDIR, "x", "out/a"), 1, "out/a: this is a file or lies below one"),
        (OSError(errno.ENOENT, "x", "a", None, "b"), 1, "a: there is no such file or folder"),
        (OSError(errno.EPIPE, "Broken pipe", "fifo"), 1, "fifo: what reads at the other end is"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "what reads at the other end is gone"),
        (OSError(errno.EMFILE, "x", "a"), 1, "a: too many files are open at once; raise"),
        (OSError("Invalid IPC stream"), 1, "Invalid IPC stream; check the file (--debug shows"),
        (MemoryError("Unable to allocate 9 GiB"), 1, "memory ran out (Unable to allocate 9 GiB)"),
        (
            ModuleNotFoundError("No module named 'av'"),
            1,
            "(No module named 'av'); `internvl doctor",
        ),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), 1, "SIGKILL"),
        (RuntimeError("Connection closed by peer [::1]:1"), 1, "another process of this run ended"),
        (KeyError("x"), 1, "KeyError: 'x'. This is a bug in internvl: --debug shows where"),
        (RuntimeError("first\nsecond"), 1, "RuntimeError: first. This is a bug"),
        (AssertionError(), 1, "AssertionError. This is a bug"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_is_a_sentence(capfd, monkeypatch, error, code, said):
    raising(monkeypatch, error)
    found, _, err = call(capfd, "doctor")
    assert (found, said in err) == (code, True), err
    assert "Traceback" not in err
    assert bool(err) == bool(said)
    if said:
        assert err.startswith("internvl: ")
        assert err.count("\n") == 1


def test_a_bug_says_which_sample_it_was_about(capsys, monkeypatch):
    error = KeyError("x")
    error.add_note("while reading a.jsonl line 3")
    error.add_note("Traceback\n  of a worker")
    raising(monkeypatch, error)
    last = call(capsys, "doctor")[2]
    assert last.startswith("internvl: KeyError: 'x', while reading a.jsonl line 3. This is a bug")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["chat", "{model}", "--image", "{tmp}", "--prompt", "x"], 1, "{tmp} is a folder"),
        (["chat", "{model}", "--image", "{tmp}/text.png", "--prompt", "x"], 1, "not an image"),
        (["chat", "{model}", "--video", "{tmp}/gone.mp4", "--prompt", "x"], 1, "{tmp}/gone.mp4"),
        (["chat", "{model}", "--video", "x", "--frames", "0"], 2, "--frames: at least 1, not 0"),
        (["chat", "{tmp}/gone", "--prompt", "x"], 1, "{tmp}/gone: no such folder"),
        (["chat", "{tmp}/text.png", "--prompt", "x"], 1, "{tmp}/text.png"),
        (["chat", "{tmp}", "--prompt", "x"], 1, "config.json"),
        (["evaluate", "{model}", "--annotations", "{tmp}/gone.json"], 1, "{tmp}/gone.json"),
        (["evaluate", "{model}", "--annotations", "{tmp}"], 1, "{tmp}"),
        (["evaluate", "{model}", "--annotations", "{tmp}/text.png"], 1, "{tmp}/text.png"),
        (["export", "{model}", "--to", "{tmp}/text.png/out"], 1, "{tmp}/text.png"),
        (["export", "{tmp}/gone", "--to", "{tmp}/out"], 1, "{tmp}/gone: no such folder"),
        (["merge", "{tmp}/gone", "--to", "{tmp}/out"], 1, "{tmp}/gone"),
        (["merge", "{model}", "--to", "{tmp}/out"], 1, "has no adapters to merge"),
        (["data", "convert", "captions", "{tmp}/gone", "{tmp}/out"], 1, "there is no {tmp}/gone"),
        (["data", "convert", "captions", "{tmp}", "{tmp}/out"], 1, "{tmp}"),
        (["data", "convert", "frames", "{tmp}", "{tmp}/out"], 1, "no conversion 'frames'"),
        (["data", "convert", "captions", "{tmp}/c.txt", "{tmp}/text.png/out"], 1, "text.png"),
        (["data", "prepare", "cocoa", "--root", "{tmp}"], 1, "no data set 'cocoa' to prepare"),
        (["check", "{tmp}"], 2, "{tmp} is a folder and no run"),
        (["check", "{tmp}/gone.yaml"], 2, "there is no recipe {tmp}/gone.yaml"),
        (["check", "{tmp}/text.png"], 2, "{tmp}/text.png holds no keys"),
        (
            ["check", "{recipe}", "data.template=chatml"],
            1,
            "unknown conversation template 'chatml'",
        ),
        (["check", "{recipe}", "--report", "{tmp}/text.png/a.html"], 1, "text.png"),
        (["train", "{recipe}", "run={tmp}/text.png"], 1, "text.png"),
        (["train", "{recipe}", "run={tmp}/text.png/run"], 1, "text.png"),
        (["models", "InternVL9-1B"], 2, "'InternVL9-1B'; nearest"),
        (
            ["chat", "pretrained/InternVL2-2B"],
            1,
            "`internvl models InternVL2-2B --download --to pretrained/InternVL2-2B`",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_paths_are_named(capsys, project, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("text", encoding="utf-8")
    (tmp_path / "c.txt").write_text("image,caption\na.jpg,red\n", encoding="utf-8")
    names = {"tmp": tmp_path, "model": project.parent / "start", "recipe": project}
    found, out, err = call(capsys, *(word.format(**names) for word in words))
    assert found == code, out + err
    last = last_line(err) if err.strip() else last_line(out)
    assert said.format(**names) in out + err, out + err
    assert "Traceback" not in err
    assert "This is a bug" not in last


_LONG = """
import sys
from pathlib import Path
from internvl import cli, files, log

def chatter(args):
    for n in range(100_000):
        print(n)
        with files.names_file(Path("a.jsonl")):
            log.get_logger().info("line %d", n)
    return 0

cli.VERBS["doctor"] = chatter
cli.main(["doctor"])
"""


@pytest.mark.parametrize("pipe", ["| head -n 1", "2>&1 | head -n 1", "2>&1 >/dev/null | head -n 1"])
def test_output_that_nobody_reads_is_no_error(tmp_path, pipe):
    """Whether lines or messages go nowhere, and whatever file was open when it happened."""
    (tmp_path / "long.py").write_text(_LONG, encoding="utf-8")
    script = f"{{ {sys.executable} long.py; echo $? >code; }} {pipe}"
    done = subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert (tmp_path / "code").read_text() == "141\n"
    assert "Broken pipe" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("words", ["models", "--help", "models nowhere", "", "train gone.yaml"])
def test_no_verb_complains_of_a_reader_that_left(words):
    script = f"{{ {sys.executable} -m internvl {words}; }} 2>&1 | true"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_without_a_verb_all_are_listed(capsys):
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert all(f"\n    {verb} " in err for verb in cli.VERBS)


def test_the_version_is_the_package_s(capsys):
    with open(Path(cli.__file__).parents[2] / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert call(capsys, "--version") == (0, f"internvl {version}\n", "")
    assert internvl.__version__ == version


def test_output_that_cannot_be_written_is_said():
    command = [sys.executable, "-m", "internvl", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("internvl: a file cannot be read or written: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_a_character_shows_its_escape(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setitem(cli.VERBS, "doctor", lambda args: sys.stdout.write("图\n") * 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    assert (stopped.value.code, narrow.buffer.getvalue()) == (0, b"\\u56fe\n")


def test_no_conversation_with_a_retrieval_model(capsys, tmp_path):
    folder = dual_folders.dual_folder(tmp_path / "dual")
    code, _, err = call(capsys, "chat", folder, "--prompt", "What is this?")
    assert code == 1
    assert "does not converse" in last_line(err)


def test_options_of_evaluate_are_those_of_its_sections():
    words = ["evaluate", "m", "--mode", "c,g", "--recall-k", "1,5", "--clean", "--num-beams", "3"]
    args = cli.parse(words)
    assert (args.modes, args.recall_k) == (["c", "g"], ["1", "5"])
    assert (args.clean, args.num_beams, args.flat, args.limit) == (True, 3, None, None)
    assert not hasattr(args, "every")


def test_what_a_set_lacks_is_counted_and_the_download_is_offered(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "data", "prepare", "nocaps")
    assert (code, out) == (1, "")
    head, *rows = err.splitlines()
    assert head.startswith(f"nocaps: {len(rows)} files or folders are missing; --download")
    assert all(": from http" in row for row in rows)
