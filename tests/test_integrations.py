"""Models of lmms-eval and VLMEvalKit: the answers are those of `Chat.answer`."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chat_folders import prompt_folder
from photos import COLORS, photo

import internvl
from internvl.errors import UserError

ROOT = Path(__file__).parents[1]
TASK = """
task: drawn_colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
process_results: !function utils.score
metric_list: [{{metric: color, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
from PIL import Image


def images(row):
    return [Image.open(path).convert("RGB") for path in row["images"]]


def question(row, kwargs=None):
    return row["question"]


def score(row, answers):
    return {"color": float(row["answer"] in answers[0])}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_folder("internlm2.internlm2-chat", tmp_path_factory.mktemp("tiny") / "org/model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    root = tmp_path_factory.mktemp("drawn")
    rows = []
    for index, color in enumerate(COLORS[:6]):
        # One image, two, and none; a mark in the text is a word.
        names = [str(root / f"{index}-{n}.png") for n in range(index % 3)]
        for n, name in enumerate(names):
            photo(Path(name), 10 * index + n)
        rows.append({"question": f"Is it {color} or <image>?", "answer": color, "images": names})
    return rows


def expected(folder: Path, rows: list[dict]) -> list[str]:
    chat = internvl.load(folder, device="cpu", dtype="float32")
    texts = [row["question"].replace("<image>", "\\<image>") for row in rows]
    requests = [
        internvl.Request("<image>\n" * len(row["images"]) + text, row["images"])
        for row, text in zip(rows, texts, strict=True)
    ]
    return chat.answer(requests, max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (pip install lmms-eval; some 500 MB with what it needs)",
)
def test_lmms_eval_runs_a_task(folder: Path, rows: list[dict], tmp_path: Path) -> None:
    task = tmp_path / "tasks/drawn"
    task.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (task / "rows.jsonl").write_text(lines)
    (task / "drawn.yaml").write_text(TASK.format(rows=task / "rows.jsonl"))
    (task / "utils.py").write_text(UTILS)
    words = ["--model", "internvl_load", "--tasks", "drawn_colors", "--batch_size", "1"]
    words += ["--model_args", f"pretrained={folder},device=cpu,dtype=float32"]
    words += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    words += ["--log_samples"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "integrations/lmms_eval_internvl.py"), *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    samples = [*(tmp_path / "out").rglob("*samples_drawn_colors.jsonl")]
    assert samples, done.stdout + done.stderr
    answered = [json.loads(line) for line in samples[0].read_text().splitlines()]
    answered.sort(key=lambda row: row["doc_id"])
    texts = [text.strip() for text in expected(folder, rows)]
    assert [row["filtered_resps"] for row in answered] == texts
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    score = results["results"]["drawn_colors"]["color,none"]
    right = [row["answer"] in text for row, text in zip(rows, texts, strict=True)]
    assert score == pytest.approx(sum(right) / len(right))


class Base:
    """VLMEvalKit's class, as far as a model sees it."""

    def __init__(self) -> None:
        self.dump_image_func = None

    def set_dump_image(self, function: object) -> None:
        self.dump_image_func = function

    def generate(self, message: list[dict], dataset: str | None = None) -> str:
        assert all({*part} == {"type", "value"} for part in message)
        assert {part["type"] for part in message} <= {*self.allowed_types}
        return self.generate_inner(message, dataset)


@pytest.fixture
def vlmeval(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = Base
    monkeypatch.syspath_prepend(str(ROOT / "integrations"))
    monkeypatch.delitem(sys.modules, "vlmeval_internvl", raising=False)
    return importlib.import_module("vlmeval_internvl")


def test_vlmevalkit_asks_from_many_threads(
    vlmeval: types.ModuleType, folder: Path, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vlmeval.InternVL(folder, device="cpu", dtype="float32", max_new_tokens=4)
    assert (model.is_api, model.INTERLEAVE) == (True, True)
    calls = []
    answer = type(model.chat).answer

    def counted(chat: object, requests: list, **settings: object) -> list[str]:
        calls.append(len(requests))
        return answer(chat, requests, **settings)

    monkeypatch.setattr(type(model.chat), "answer", counted)
    messages = [
        [{"type": "image", "value": path} for path in row["images"]]
        + [{"type": "text", "value": row["question"]}]
        for row in rows
    ]
    with ThreadPoolExecutor(6) as threads:
        texts = [*threads.map(model.generate, messages)]
    monkeypatch.undo()
    assert texts == expected(folder, rows)
    assert len(calls) < len(rows)  # together, not one by one
    two = [{"role": "user", "content": messages[0]}, {"role": "assistant", "content": [
        {"type": "text", "value": "Yes."}]}, {"role": "user", "content": messages[3]}]  # fmt: skip
    assert isinstance(model.chat_inner(two), str)
    broken = [{"type": "image", "value": "gone.png"}, {"type": "text", "value": "What?"}]
    with ThreadPoolExecutor(2) as threads:
        good, bad = (threads.submit(model.generate, m) for m in (messages[1], broken))
        assert good.result() == texts[1]
        with pytest.raises(UserError, match=r"gone\.png"):
            bad.result()
