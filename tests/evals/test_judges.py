"""Judges behind a real HTTP server: rubrics, replies kept by content, errors, and judged keys."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chat_folders import prompt_folder
from original_runs import expected, lay_out, recorder

from internvl import evals
from internvl.config import eval_config
from internvl.errors import UserError
from internvl.evals import judges
from internvl.evals.judges import Judge
from internvl.inference import load as loading


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "m"
    return loading.load(prompt_folder("internlm2.internlm2-chat", folder), device="cpu")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that answers by `server.replies` or `server.reply`, and keeps the requests."""
    monkeypatch.setattr(judges, "cache_folder", lambda: tmp_path / "cache")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.requests.append((self.path, self.headers.get("Authorization"), body))
            status, content = running.answer(body)
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *words):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.requests = []
    running.address = f"http://127.0.0.1:{running.server_port}/v1"
    running.answer = lambda body: (200, completion("8 7\nGood."))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def completion(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def judged(chat, key, root, server, answers, **more):
    config = eval_config(
        type="benchmark", task=key, annotations=root, tiles="one", judge=server.address, **more
    )
    model = {"image_size": 56, "checkpoint_argument": "pretrained/stub-2b"}
    return evals.build({"x": config})["x"].run(recorder(chat, model, answers), None)


def test_llava_benchs_reviews_are_the_originals(chat, tmp_path, server):
    described = expected("llava-bench")
    root = lay_out("llava-bench", tmp_path)
    review = described["review"]
    replies = {
        request["messages"][-1]["content"]: reply
        for request, reply in zip(review["requests"], review["replies"], strict=True)
    }
    server.answer = lambda body: (200, completion(replies[body["messages"][-1]["content"]]))
    answers = [call["answer"] for call in described["runs"][0]["calls"]]
    scores = judged(chat, "llava-bench", root, server, answers)
    bodies = [body for _, _, body in server.requests]
    assert sorted(bodies, key=str) == sorted(review["requests"], key=str)
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    rows = review["outputs"]["results/llava_bench_results_review.jsonl"]["jsonl"]
    lines = scores.files["llava_bench_results_review.jsonl"].splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert scores.values == {"complex": 55.0, "conv": 87.5, "detail": 100.0, "score": 67.6}
    assert "1 reviews have no two scores and count as -1" in scores.notes
    # All are answered from the cache now, whatever the server would say.
    server.answer = lambda body: (500, {})
    assert judged(chat, "llava-bench", root, server, answers).values == scores.values
    assert len(server.requests) == 3


def test_without_a_judge_the_file_is_written(chat, tmp_path):
    root = lay_out("mmvet", tmp_path)
    config = eval_config(type="benchmark", task="mmvet", annotations=root, tiles="one")
    model = {"image_size": 56, "checkpoint_argument": "a/b"}
    scores = evals.build({"x": config})["x"].run(recorder(chat, model, ["a", "b", "c"]), None)
    assert scores.values == {"answered": 3.0}
    assert any("--judge URL" in note and "MM-Vet_Evaluator" in note for note in scores.notes)


def test_mm_vet_with_its_own_answers(chat, tmp_path, server):
    root = lay_out("mmvet", tmp_path)
    key = {f"v1_{n}": {"answer": "-1<AND>-5" if n == 0 else "b"} for n in range(3)}
    (root / "mm-vet/mm-vet.json").write_text(json.dumps(key))
    replies = iter(["0.5", "1.0", "maybe"])
    server.answer = lambda body: (200, completion(next(replies)))
    scores = judged(chat, "mmvet", root, server, ["-1", "b", "c"])
    assert scores.values == {"score": 75.0}
    prompts = sorted(
        body["messages"][0]["content"].splitlines()[-1] for _, _, body in server.requests
    )
    assert prompts[0].startswith("Describe the cactus. Be brief. | b | b | ")
    assert any("-1 <AND> -5 | -1 | " in prompt for prompt in prompts)


def test_mathvista_asks_for_what_no_rule_extracts(chat, tmp_path, server):
    described = expected("mathvista-testmini")
    root = lay_out("mathvista-testmini", tmp_path)
    server.answer = lambda body: (200, completion("7"))
    answers = ["No", "It has seven pieces.", "1.42", "8"]
    scores = judged(chat, "mathvista-testmini", root, server, answers)
    ((_, _, body),) = server.requests
    query = described["runs"][0]["calls"][1]["question"]
    ending = f"\n\n{query}\n\nIt has seven pieces.\n\nExtracted answer: "
    assert body["messages"][0]["content"].endswith(ending)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-3.5-turbo", 0.0, 256)
    assert scores.values == {"accuracy": 1.0}


def test_mmhals_ratings(chat, tmp_path, server):
    (tmp_path / "data/mm-halbench").mkdir(parents=True)
    image = tmp_path / "x.png"
    from PIL import Image

    Image.new("RGB", (30, 20)).save(image)
    rows = [
        {
            "question": f"What is it? {n} ",
            "image_path": str(image),
            "image_content": ["Cat", "Dog"],
            "gt_answer": "A cat.",
            "question_type": "attribute",
        }
        for n in range(3)
    ]
    file = tmp_path / "data/mm-halbench/mmhal-bench_with_image.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratings = iter(["Rating: 6", "Rating: 2", "Rating: 10"])
    server.answer = lambda body: (200, completion(next(ratings)))
    scores = judged(
        chat, "mmhal", tmp_path / "data", server, ["Answer: a", "x Answer: b", "c"], cot=True
    )
    assert scores.values["score"] == 3.0
    assert scores.values["hallucination_rate"] == pytest.approx(2 / 3)
    assert not any("no single rating" in note for note in scores.notes)
    server.answer = lambda body: (200, completion("Six, I think."))
    answers = ["Answer: d", "e", "f"]
    unrated = judged(chat, "mmhal", tmp_path / "data", server, answers, cot=True)
    assert unrated.values["score"] == 0.0
    assert "3 replies of the judge hold no single rating and count as 0" in unrated.notes
    contents = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert all("### Image Contents\nCat, Dog\n" in text for text in contents)
    name = next(n for n in scores.files if n.endswith("_gpt4o.json"))
    assert len(json.loads(scores.files[name])) == 3
    written = json.loads(scores.files[name.replace("_gpt4o", "")])
    assert [row["model_answer"] for row in written] == ["a", "b", "c"]


def test_busy_servers_are_asked_again_and_others_are_named(tmp_path, server, monkeypatch):
    waits: list[float] = []
    judge = Judge(server.address, "m", tmp_path / "replies", waits.append)
    rubric = judges.rubrics()["qa"]
    answers = iter([(429, {}), (503, {}), (200, completion("Rating: 3"))])
    server.answer = lambda body: next(answers)
    monkeypatch.setenv("INTERNVL_JUDGE_KEY", "secret")
    assert judge.ask(rubric, "x") == "Rating: 3"
    assert waits == [2.0, 4.0]
    assert server.requests[-1][1] == "Bearer secret"
    assert server.requests[-1][2]["model"] == "m"
    server.answer = lambda body: (401, {})
    with pytest.raises(UserError, match="401 Unauthorized"):
        judge.ask(rubric, "y")
    server.answer = lambda body: (200, {"error": "no"})
    with pytest.raises(UserError, match="form of OpenAI"):
        judge.ask(rubric, "z")
    config = eval_config(type="qa", annotations=tmp_path, judge="localhost:8000")
    with pytest.raises(UserError, match="is no address"):
        Judge.of(config)


def test_thoughts_of_a_judge_are_no_rating_and_half_of_them_no_reply(tmp_path, server):
    """As vLLM gives Qwen3's, without a parser of its reasoning."""
    judge = Judge(server.address, "m", tmp_path / "replies")
    rubric = judges.rubrics()["qa"]
    thought = "<think>Rating: 2 or Rating: 3?</think>"
    for text, verdict in (
        (f"{thought}\n\nRating: 5", "Rating: 5"),
        ("Rating: 2?</think> Rating: 4", "Rating: 4"),
        ("Rating: 1", "Rating: 1"),
    ):
        server.answer = lambda body, text=text: (200, completion(text))
        assert judge.ask(rubric, text) == verdict
        server.answer = lambda body: (500, {})
        assert judge.ask(rubric, text) == verdict
    for cut in ("<think>Rating: 2, or", f"{thought}", None):
        server.answer = lambda body, cut=cut: (200, completion(cut))
        assert judge.ask(rubric, "cut") == ""
    server.answer = lambda body: (200, completion("Rating: 6"))
    assert judge.ask(rubric, "cut") == "Rating: 6"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"error": {"message": "The model `x`\n does not exist."}},
            r"404 Not Found: The model `x` ",
        ),
        ({"object": "error", "message": "no model x"}, "404 Not Found: no model x"),
        (b"no such route", "404 Not Found: no such route"),
        (b"<html>nginx</html>", r"404 Not Found\)"),
        ({"error": "text"}, r"404 Not Found: "),
        ([1], r"404 Not Found: "),
    ],
)
def test_what_a_server_says_of_its_error_is_passed_on(tmp_path, server, body, words):
    judge = Judge(server.address, "x", tmp_path / "replies")
    server.answer = lambda asked: (404, body)
    with pytest.raises(UserError, match=words):
        judge.ask(judges.rubrics()["qa"], "q")
