"""One's own questions: every metric, several turns and images, video, broken samples, a judge."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pytest
import tiny_run
from chat_folders import prompt_folder
from original_runs import recorder
from PIL import Image
from pyarrow import parquet

from internvl import evals, evaluate, train
from internvl.config import eval_config
from internvl.errors import UserError
from internvl.evals import judges
from internvl.evals.scoring.answers import METRICS, Reference, amount, metric_of
from internvl.inference import load as loading

MODEL = {"image_size": 56, "checkpoint_argument": "a/b"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "m"
    return loading.load(prompt_folder("internlm2.internlm2-chat", folder), device="cpu")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 30)).save(tmp_path / name)
    return tmp_path


def written(folder, *rows):
    file = folder / "val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def turns(*texts, **more):
    roles = ("human", "gpt")
    values = [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": values, **more}


def evaluated(chat, folder, file, answers, **more):
    config = eval_config(type="qa", annotations=file, images=folder, **more)
    recorded = recorder(chat, MODEL, answers)
    evaluator = evals.build({"x": config})["x"]
    return evaluator, recorded, evaluator.run(recorded, None)


def test_every_turn_is_asked_with_the_files_answers_before_it(chat, folder):
    file = written(
        folder,
        turns("<image>\nHow many?", "3", "And there: <image>?", "No.", images=["a.png", "b.png"]),
        turns("<image>\nWhat colour?", "dark red", image="a.png", category="colour"),
    )
    evaluator, recorded, scores = evaluated(chat, folder, file, ["3 cats", "no", "dark rod"])
    assert evaluator.counts() == {"questions": 3}
    first, second, _ = recorded.requests
    assert [m.content for m in second.messages] == [
        "<image>\nHow many?",
        "3",
        "And there: <image>?",
    ]
    assert (len(first.images), len(second.images)) == (1, 2)
    assert scores.values == {
        "score": pytest.approx((1 + 1 + 7 / 8) / 3),
        "number": 1.0,
        "yes-no": 1.0,
        "anls": 7 / 8,
        "category_colour": 7 / 8,
        "exact": 0.0,
    }
    assert [row["metric"] for row in scores.rows] == ["number", "yes-no", "anls"]
    assert scores.rows[1]["turn"] == 2
    assert "questions by metric: number 1, yes-no 1, anls 1" in scores.notes


@pytest.mark.parametrize(
    ("question", "references", "metric"),
    [
        ("Where?", ["<ref>it</ref><box>[[10, 20, 500, 600]]</box>"], "boxes"),
        ("Is it?", ["Yes"], "yes-no"),
        ("是吗？", ["不是"], "yes-no"),
        ("Which?\nA. cat\nB. dog", ["B"], "choice"),
        ("Which letter?", ["B"], "anls"),
        ("How much?", ["$1,200.50"], "number"),
        ("How much?", ["12 %"], "number"),
        ("Who?", ["Dr. J. Smith"], "anls"),
        ("When?", ["14 March 1985"], "anls"),
        ("Who?", ["a", "b", "a"], "soft"),
        ("Describe it.", ["A long text " * 5], "judge"),
    ],
)
def test_the_metric_that_suits_an_answer(question, references, metric):
    assert metric_of(Reference(references, question)) == metric


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("exact", " RED ", ["red"], 1.0),
        ("exact", "red.", ["red"], 0.0),
        ("soft", "the Red.", ["red", "red", "blue"], 2 / 3),
        ("soft", "Two", ["2"], 1.0),
        ("anls", "colour", ["color"], 5 / 6),
        ("anls", "xyz", ["color"], 0.0),
        ("number", "about 1200.5 dollars", ["$1,200.50"], 1.0),
        ("number", "12%", ["0.12"], 1.0),
        ("number", "between 3 and 5", ["3"], 0.0),
        ("number", "three", ["3"], 0.0),
        ("number", "3 km", ["3"], 1.0),
        ("boxes", "[[0, 0, 500, 500]]", ["[[0, 0, 500, 500]]"], 1.0),
        ("boxes", "[0.0, 0.0, 0.5, 0.5]", ["[[0, 0, 500, 500]]"], 1.0),
        ("boxes", "[[0, 0, 500, 500], [600, 600, 900, 900]]", ["[[0, 0, 500, 500]]"], 0.5),
        ("boxes", "[[500, 500, 0, 0]]", ["[[0, 0, 500, 500]]"], 1.0),
        ("boxes", "[[1, 2, 3]]", ["[[0, 0, 500, 500]]"], 0.0),
        ("boxes", "none", ["[[0, 0, 500, 500]]"], 0.0),
        ("yes-no", "NO!", ["no"], 1.0),
        ("yes-no", "是的", ["Yes"], 1.0),
        ("yes-no", "不是", ["否"], 1.0),
        ("yes-no", "perhaps", ["yes"], 0.0),
    ],
)
def test_scores_of_answers(metric, answer, references, score):
    assert METRICS[metric](answer, Reference(references)) == pytest.approx(score)


def test_letters_and_tolerances():
    question = "Which?\nA. a red cat\nB. a dog\n(C) none"
    for answer, right in (
        ("B", 1.0),
        ("(b)", 1.0),
        ("The answer is B.", 1.0),
        ("It is a dog", 1.0),
        ("Because it is a dog", 1.0),
        ("A dog", 1.0),
        ("a red cat", 0.0),
        ("", 0.0),
    ):
        assert METRICS["choice"](answer, Reference(["B"], question)) == right, answer
    assert METRICS["number"]("95", Reference(["100"], tolerance=0.05)) == 1.0
    assert METRICS["number"]("94", Reference(["100"], tolerance=0.05)) == 0.0
    assert [amount(text) for text in ("1e3", "-5", ".5", "1,000", "5 m2", "1/2", "2020-01-02")] == [
        *(1000.0, -5.0, 0.5, 1000.0, 5.0),
        *(None, None),
    ]


def test_several_reference_answers_and_a_named_metric(chat, folder):
    file = written(
        folder,
        turns("<image>\nWhat?", "red", image="a.png", answers=["red"] * 3 + ["blue"] * 2),
        turns("No image at all?", "No"),
    )
    _, _, scores = evaluated(chat, folder, file, ["Blue", "no"])
    assert scores.values["soft"] == pytest.approx(2 / 3)
    _, recorded, scores = evaluated(chat, folder, file, ["red", "nope"], metric="exact", tiles=2)
    assert scores.values == {"score": 0.5, "exact": 0.5}
    assert recorded.requests[0].max_tiles == 2


def test_broken_samples_are_named_or_left_out(chat, folder):
    file = written(
        folder,
        turns("<image>\nWhat?", "red", image="gone.png"),
        turns("<image> <image>\nWhat?", "red", image="a.png"),
        turns("Fine?", "yes"),
        turns("<image>\nWhat?", "red", image="b.png"),
    )
    (folder / "b.png").write_bytes(b"no image")
    config = eval_config(type="qa", annotations=file, images=folder)
    with pytest.raises(UserError, match="gone.png"):
        evals.build({"x": config})
    _, _, scores = evaluated(chat, folder, file, ["yes"], on_bad_sample="skip")
    assert scores.values["score"] == 1.0
    reasons = [row["reason"] for row in scores.rows if "reason" in row]
    assert any("gone.png" in reason for reason in reasons)
    assert any("b.png" in reason or "image" in reason for reason in reasons)
    empty = written(folder, {"conversations": [{"from": "human", "value": "?"}]})
    with pytest.raises(UserError):
        evals.build({"x": eval_config(type="qa", annotations=empty, images=folder)})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (turns("<image>\nWhat?", "red", image="gone.png"), "gone.png; --images names the folder"),
        ({"question": "What?", "answer": "red"}, "its keys: 'question', 'answer'.*a row is a chat"),
        (turns("What?"), "no question with an answer"),
    ],
)
def test_a_file_without_a_question_left_says_why(folder, row, says):
    config = {"images": folder, "on_bad_sample": "skip"}
    with pytest.raises(UserError, match=says):
        evals.build({"x": eval_config(type="qa", annotations=written(folder, row), **config)})


def test_videos_become_frames(chat, folder):
    frames = folder / "clip"
    frames.mkdir()
    for n in range(1, 5):
        Image.new("RGB", (20, 20), (60 * n, 0, 0)).save(frames / f"frame_{n}.png")
    file = written(folder, turns("<video>\nHow many?", "4", video="clip/"))
    _, recorded, scores = evaluated(chat, folder, file, ["4"], frames=3)
    (request,) = recorded.requests
    assert len(request.videos[0]) == 3
    assert scores.values["number"] == 1.0


@pytest.mark.parametrize("kind", ["video", "cell"])
def test_answers_on_disk_are_of_the_media_as_they_are_now(chat, folder, tmp_path, kind):
    def write(color):
        image = Image.new("RGB", (40, 30), color)
        path = folder / ("c.gif" if kind == "video" else "new.png")
        image.save(path)
        if kind == "cell":
            row = turns("<image>\nWhat?", "It", image={"bytes": path.read_bytes()})
            parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "val.parquet")
            return {"annotations": folder / "val.parquet"}
        return {"annotations": written(folder, turns("<video>\nWhat?", "It", video="c.gif"))}

    written_again: dict[str, object] = {}
    for color, seen in (("red", 1), ("red", 0), ("#102030", 1)):
        # A file that is written again is another one, whatever it holds.
        written_again = write(color) if seen else written_again
        config = eval_config(type="qa", images=folder, **written_again)
        recorded = recorder(chat, MODEL, ["It"])
        evals.build({"x": config})["x"].run(recorded, tmp_path / "cache")
        assert len(recorded.requests) == seen


def test_long_answers_are_rated_by_a_judge(chat, folder, monkeypatch):
    monkeypatch.setattr(judges, "cache_folder", lambda: folder / "cache")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            reply = "Good.\nRating: 7" if "bright" in text else "Rating: 70"
            content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    long = "a long description of what can be seen here in many words " * 3
    file = written(
        folder,
        turns("<image>\nDescribe it.", f"bright {long}", image="a.png"),
        turns("<image>\nDescribe this.", long, image="b.png"),
    )
    address = f"http://127.0.0.1:{server.server_port}/v1"
    _, _, scores = evaluated(chat, folder, file, ["x", "y"], judge=address)
    server.shutdown()
    server.server_close()
    # The second reply's rating is out of range, and counts nowhere.
    assert scores.values == {"score": 0.7, "judge": 0.7, "exact": 0.0}
    _, _, scores = evaluated(chat, folder, file, ["x", "y"])
    assert scores.values == {"exact": 0.0}
    assert any("2 long answers are not scored" in note for note in scores.notes)


def test_a_run_measures_its_own_questions_in_training_and_after(tmp_path):
    project = tiny_run.make(tmp_path / "project")
    folder = project.parent
    held = f"{{type: qa, annotations: {folder / 'train.jsonl'}, images: {folder}, limit: 4}}"
    run = train.run(tiny_run.recipe_of(project, tmp_path, "steps=2", f"evals.held={held}"))
    inside = json.loads((run / "evals/000002.json").read_text())
    assert any(name.startswith("held/") for name in inside)
    outside = evaluate.measure(run, device="cpu").metrics
    assert outside == {name: inside[name] for name in outside}
    own = evaluate.measure(
        run,
        ["qa-file"],
        annotations=folder / "train.jsonl",
        images=folder,
        limit=4,
        device="cpu",
        to=tmp_path / "out",
    )
    assert [value for _, value in sorted(own.metrics.items())] == [
        value for _, value in sorted(outside.items())
    ]
