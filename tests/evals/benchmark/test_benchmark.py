"""Every key against the original: questions, tiles, settings of generation, files and scores.

`EXEMPT` and the tests named after it say where the original stops or is mended, and what holds
there instead.
"""

import io
import json
import re
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from chat_folders import prompt_folder
from original_runs import Recorder, expected, flag, keys, lay_out, recorder, tiles_of

from internvl import evals
from internvl.config import eval_config
from internvl.data.images import read_rgb
from internvl.datasets import tasks
from internvl.errors import ConfigError, UserError
from internvl.evals.call import jobs
from internvl.evals.call.lines import write_captions
from internvl.evals.metrics import one_meteor
from internvl.evals.scores import EvalScores
from internvl.inference import load as loading
from internvl.report.results.items import item_of
from internvl.report.results.statistics import statistics

CAPTIONS = ("caption-coco", "caption-flickr30k")
KEY_OF = {"rsvqa-lr": "rsvqa-hr-test2", "rsvqa-hr-test2": "rsvqa-lr"}
"""evaluate.sh gives these two keys each other's data set; here they have their own."""
EXEMPT = {
    "mmmu-val": "palette images are enlarged before they become RGB: other pixels",
    "mmmu-dev": "likewise",
    "mathvista-testmini": "palette images are tiled before they become RGB",
}
"""Keys whose tile means differ for some images; here every image becomes RGB first."""
PRO = {
    ("standard (10 options)", "direct"): "standard_direct",
    ("standard (10 options)", "cot"): "standard_cot",
    ("vision", "direct"): "vision_direct",
    ("vision", "cot"): "vision_cot",
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "m"
    return loading.load(prompt_folder("internlm2.internlm2-chat", folder), device="cpu")


FAST = ("vqa-okvqa-val-1", "mantis-1", "mmmu-val-1", "refcoco-0", "pope-3", "mmbench-dev-en-0")
"""A run of every way in which questions and images are put together."""


def run_params(keep):
    return [
        pytest.param(
            key,
            index,
            id=f"{key}-{index}",
            marks=[] if f"{key}-{index}" in FAST else [pytest.mark.slow],
        )
        for key in keys()
        for index, run in enumerate(expected(key)["runs"])
        if key not in CAPTIONS and keep(run)
    ]


def configs(key, run, model, root, **more):
    """Name of an evaluation -> its config, for the flags of a run of the original."""
    flags = run.get("flags", [])
    options = {
        "annotations": root,
        "tiles": tiles_of(key, flags),
        "checkpoint": model["checkpoint_argument"],
        "cot": "--cot" in flags,
        "num_beams": int(flag(flags, "--num-beams", "1")),
        "temperature": float(flag(flags, "--temperature", "0")),
        "total_tiles": int(flag(flags, "--total-max-num", "64")),
    }
    if "--subtask" in flags:
        options["subtask"] = flag(flags, "--subtask", "")
    if "--num_segments" in flags:
        options["segments"] = int(flag(flags, "--num_segments", "16"))
    name = KEY_OF.get(key, key)
    names = tasks.find(name).keys or (name,)
    return {n: eval_config(type="benchmark", task=n, **{**options, **more}) for n in names}


def evaluated(chat, key, run, model, folder, **more):
    """(calls of the model, scores by evaluation) of a run of the original, asked by us."""
    calls = run["calls"] + run.get("calls_of_rank_1", [])
    root = lay_out(key, folder)
    evaluators = evals.build(configs(key, run, model, root, **more))
    recorded = recorder(chat, model, [c.get("answer") or "" for c in calls])
    scores = {name: evaluator.run(recorded, None) for name, evaluator in evaluators.items()}
    return recorded.calls, scores


def files_of(scores: dict[str, EvalScores]) -> dict[str, str | bytes]:
    """All files of some evaluations by name, the time replaced; lines of a summary joined."""
    files: dict[str, str | bytes] = {}
    for result in scores.values():
        files |= {re.sub(r"\d{12}", "<yymmddHHMMSS>", n): c for n, c in result.files.items()}
        for name, lines in result.lines.items():
            files[name] = files.get(name, "") + lines
    return files


def sheet(content: bytes) -> dict[str, list]:
    """Columns and rows of an .xlsx file."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tree = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in tree.iter(f"{space}row"):
        cells = {}
        for cell in row.iter(f"{space}c"):
            column = re.match("[A-Z]+", cell.get("r"))[0]
            text = "".join(part.text or "" for part in cell.iter() if part.tag[-1] in "tv")
            cells[ord(column) - ord("A")] = text if cell.get("t") == "inlineStr" else int(text)
        rows.append(cells)
    head = [rows[0][n] for n in range(len(rows[0]))]
    return {"columns": head, "rows": [[r.get(n) for n in range(len(head))] for r in rows[1:]]}


@pytest.mark.parametrize(
    ("key", "index"), run_params(lambda run: "arguments" not in run and "stops_with" not in run)
)
def test_the_originals_questions_tiles_and_files(chat, tmp_path, key, index):
    described = expected(key)
    run = described["runs"][index]
    model = described["model"] | run.get("model", {})
    ours, scores = evaluated(chat, key, run, model, tmp_path)
    theirs = run["calls"] + run.get("calls_of_rank_1", [])
    assert len(ours) == len(theirs)
    for call, golden in zip(ours, theirs, strict=True):
        check_call(key, call, golden)
    check_files(described, run, files_of(scores))
    lines = shown(key, scores, model)
    assert [line for line in lines if line not in run["printed"]] == []
    for name, result in scores.items():
        check_statistics(name, result)


NO_STATISTICS = {"exact_reply", "answered"}
"""Metrics whose rows do not give them again: the letter of the row, not of the scored file."""


def check_statistics(name, result):
    """A comparison computes every metric again from the rows, as sums that can be resampled."""
    items = [item_of(row) for row in result.rows if "reason" not in row]
    computed = statistics(name, items, result.values)
    assert set(result.values) - set(computed) <= NO_STATISTICS, name
    assert all(item.references or item.score is None for item in items), name


def check_call(key, call, golden):
    question = call.text
    if golden["prefix_added_by_chat"]:
        assert question.startswith("<image>\n")
        question = question.removeprefix("<image>\n")
    assert question == golden["question"]
    assert sum(map(len, call.blocks)) == golden["pixel_values_shape"][0]
    assert {tuple(b.shape[1:]) for b in call.blocks} == {tuple(golden["pixel_values_shape"][1:])}
    if golden["num_patches_list"] is not None:
        assert [len(block) for block in call.blocks] == golden["num_patches_list"]
    generation = golden["generation_config"]
    assert call.settings["max_new_tokens"] == generation["max_new_tokens"]
    assert call.settings["min_new_tokens"] == generation.get("min_new_tokens", 0)
    assert call.settings["temperature"] == pytest.approx(generation.get("temperature", 0))
    # Where it tiles, the original sets one beam whatever the flag says.
    assert call.settings["num_beams"] == generation["num_beams"]
    for name in ("top_k", "top_p"):
        assert name not in generation or call.settings[name] == generation[name]
    if key not in EXEMPT:
        assert call.means == pytest.approx(golden["tile_means"], abs=0.005)


def check_files(described, run, files):
    folder = flag(run.get("flags", []), "--out-dir", "results")
    for name, content in run.get("outputs", {}).items():
        # Ours are all below the folder of the results.
        ours = name.removeprefix(f"{folder}/").removeprefix("eval/").removeprefix("data/gqa/")
        ours = ours.replace("mmmu_pro/results/", "mmmu_pro/")
        assert ours in files, (ours, sorted(files))
        if "sheet" in content:
            assert sheet(files[ours]) == content["sheet"]
        elif "text" in content:
            assert files[ours] == content["text"]
        elif "jsonl" in content:
            lines = files[ours].split("\n")[:-1]
            assert [json.loads(line) for line in lines] == content["jsonl"]
        elif "scorer" in described:
            # The original's scorer, which its script does not find, writes into this file.
            rewritten = described["scorer"]["rewritten_file"]["json"]
            assert json.loads(files[ours])["outputs"] == content["json"]
            if content["json"] == rewritten["outputs"]:
                assert json.loads(files[ours]) == rewritten
        elif run.get("processes") == 2 and isinstance(content["json"], list):
            # MVBench's script loses the second process's rows here.
            rows = json.loads(files[ours])
            assert rows[: len(content["json"])] == content["json"]
        else:
            assert json.loads(files[ours]) == content["json"]


def shown(key, scores, model):
    """The lines in which the original prints the scores of a run, from ours."""
    values = {
        metric: value for result in scores.values() for metric, value in result.values.items()
    }
    if key in ("vqa-infovqa-val", "vqa-mpdocvqa-val"):
        return [f"Overall ANLS: {values['anls']:.4f}"]
    if key == "pope":
        return [f"Overall F1: {values['f1'] * 100:.2f}"]
    if key == "scienceqa":
        return [f"Acc@1: {values['accuracy']}"]
    if key == "mmvp":
        return [f"The accuracy is {values['accuracy']}"]
    if key == "mantis":
        return [f"Overall Accuracy: {values['accuracy']:.4f}"]
    if key == "seed":
        return [
            f"Acc@1: {values['exact_reply']}",
            f"Total accuracy: {values['accuracy'] * 100:.2f}%",
            f"Image accuracy: {values['image'] * 100:.2f}%",
            f"Video accuracy: {values['video'] * 100:.2f}%",
        ]
    if key == "mme-realworld":
        return [f"++++++++++++++++\t Acc {values['accuracy']:.4f}"]
    if key == "mathvista-testmini":
        return [
            line for line in ("Correct: 4, Total: 4, Accuracy: 100.0%",) if values["accuracy"] == 1
        ]
    return []


def test_mme_and_mmmu_totals(chat, tmp_path):
    run = expected("mme")["runs"][1]
    _, scores = evaluated(chat, "mme", run, expected("mme")["model"], tmp_path / "mme")
    values = scores["mme"].values
    printed = run["calculation"]["printed"]
    totals = [float(line.split(": ")[1]) for line in printed if line.startswith("total")]
    assert [values["perception"], values["cognition"]] == totals
    tasks_printed = dict(re.findall(r"\t (\w+)  score: ([\d.]+)", "\n".join(printed)))
    assert {t: values[t] for t in tasks_printed} == {t: float(v) for t, v in tasks_printed.items()}
    run = expected("mmmu-val")["runs"][1]
    _, scores = evaluated(chat, "mmmu-val", run, expected("mmmu-val")["model"], tmp_path / "mmmu")
    table = next(line for line in run["printed"] if line.startswith("{'Overall-"))
    assert f"'Overall': {{'num': 5, 'acc': {scores['mmmu-val'].values['accuracy']}}}" in table
    assert scores["mmmu-val"].values["Business"] == 1.0


@pytest.mark.parametrize(
    ("key", "index"), run_params(lambda run: "arguments" in run and "stops_with" not in run)
)
def test_mmmu_pro(chat, tmp_path, key, index):
    described = expected(key)
    run = described["runs"][index]
    arguments = run["arguments"]
    name = flag(arguments, "--model", "")
    prefix = PRO[flag(arguments, "--setting", ""), flag(arguments, "--mode", "")]
    root = lay_out(key, tmp_path)
    model = described["model"] | {"checkpoint_argument": name}
    config = eval_config(type="benchmark", task=key, annotations=root, checkpoint=name, tiles=12)
    evaluator = evals.build({key: config})[key]
    evaluator.asked_sets = [part for part in evaluator.asked_sets if part.prefix == f"{prefix}_"]
    recorded = recorder(chat, model, [call["answer"] for call in run["calls"]])
    scores = evaluator.run(recorded, None)
    for call, golden in zip(recorded.calls, run["calls"], strict=True):
        # All images stand before the text, whose <image> are words.
        assert (
            call.text.removeprefix("<image>\n").replace("\\<image>", "<image>") == golden["prompt"]
        )
        assert len(call.blocks) == 1
        assert call.settings["max_new_tokens"] == 4096
        assert not call.settings["temperature"]
    check_files(described, run, files_of({key: scores}))


@pytest.mark.parametrize(("key", "index"), run_params(lambda run: "stops_with" in run))
def test_exempt_what_stops_the_original(chat, tmp_path, key, index):
    """Several images without tiling, and models of other names, are asked like any others."""
    described = expected(key)
    run = described["runs"][index]
    root = lay_out(key, tmp_path)
    config = eval_config(type="benchmark", task=key, annotations=root, tiles="one")
    evaluator = evals.build({key: config})[key]
    count = sum(len(part.items) for part in evaluator.asked_sets)
    recorded = recorder(chat, described["model"], ["A"] * count)
    scores = evaluator.run(recorded, None)
    assert len(recorded.calls) == count
    for call, golden in zip(recorded.calls, run["calls"], strict=False):
        assert call.text.removeprefix("<image>\n") == golden["question"]
        assert all(len(block) == 1 for block in call.blocks)
        assert len(call.blocks) == golden["pixel_values_shape"][0]
    assert scores.values


def test_every_key_of_the_originals_list_is_there():
    from internvl.datasets import published

    names = {*tasks.tasks(), *(n for n in published.TASKS if n.startswith("caption-"))}
    assert len(names) == 71
    assert tasks.find("mme—realworld") is tasks.find("mme-realworld")
    assert tasks.find("gone") is None
    for task in tasks.tasks().values():
        assert bool(task.sets) != bool(task.keys)
        for name in task.keys:
            assert name in names
        for dataset in task.sets.values():
            check_entry(dataset)


def check_entry(dataset):
    """Every name in an entry is of something that exists."""
    from internvl.evals.benchmark import judged, readers, results, scores

    for version in (dataset, dataset.replaced(dataset.corrected), dataset.replaced(dataset.cot)):
        assert version.reader in readers.READERS
        assert version.parse in ("", *scores.PARSERS)
        assert version.score in ("", *scores.SCORES)
        assert version.judge in ("", *judged.JUDGED)
        layout = version.layout or version.output.rpartition(".")[2]
        assert layout in results.LAYOUTS
        # What is neither scored nor judged says where its file goes, but for MMMU's examples.
        assert version.score or version.judge or version.submit or version.split == "dev"


def test_missing_files_are_named_with_their_addresses(tmp_path):
    with pytest.raises(ConfigError) as caught:
        evals.build(
            {"x": eval_config(type="benchmark", task="vqa-docvqa-val", annotations=tmp_path)}
        )
    assert "docvqa/val.jsonl: from https://" in str(caught.value)
    with pytest.raises(ConfigError, match="no benchmark 'gone'"):
        evals.build({"x": eval_config(type="benchmark", task="gone", annotations=tmp_path)})


def test_a_missing_file_has_no_misspelt_path(tmp_path):
    """The original's folder lacks a slash; one of that name is read where it alone exists."""
    (dataset,) = tasks.tasks()["mme-realworld"].sets.values()
    places = tasks.Places(tmp_path / "data", dataset)
    right = tmp_path / "InternVL-Domain-Adaptation-Data/MME-RealWorld/val/MME_RealWorld.json"
    assert places.missing()[0].startswith(f"{right}: from ")
    misspelt = tmp_path / "InternVL-Domain-Adaptation-DataMME-RealWorld/val/MME_RealWorld.json"
    misspelt.parent.mkdir(parents=True)
    misspelt.touch()
    assert places.file("questions") == misspelt
    right.parent.mkdir(parents=True)
    right.touch()
    assert places.file("questions") == right


def test_options_that_a_key_lacks_are_refused(tmp_path):
    root = lay_out("vqa-okvqa-val", tmp_path)
    for option, text in (("cot", "no prompt with reasoning"), ("subtask", "has none")):
        value = True if option == "cot" else "x"
        config = {"task": "vqa-okvqa-val", "annotations": root, option: value}
        with pytest.raises(ConfigError, match=text):
            evals.build({"x": eval_config(type="benchmark", **config)})
    with pytest.raises(ConfigError, match="tiles: 'many' is neither"):
        eval_config(type="benchmark", task="vqa-okvqa-val", annotations=root, tiles="many")


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_broken_image_costs_its_line(chat, tmp_path, policy):
    root = lay_out("vqa-okvqa-val", tmp_path)
    images = sorted((root / "okvqa/images").glob("*.jpg"))
    images[1].write_bytes(b"no image")
    config = {"task": "vqa-okvqa-val", "annotations": root, "on_bad_sample": policy}
    evaluator = evals.build({"x": eval_config(type="benchmark", **config)})["x"]
    recorded = recorder(chat, expected("vqa-okvqa-val")["model"], ["2", "cactus", "No"])
    if policy == "raise":
        with pytest.raises(UserError, match="okvqa_val question 2"):
            evaluator.run(recorded, None)
        return
    scores = evaluator.run(recorded, None)
    assert len(recorded.calls) == 3
    assert scores.rows[-1]["sample"] == "okvqa_val question 2"
    assert "okvqa_val_1.jpg" in scores.rows[-1]["reason"]
    images[1].unlink()
    evaluator = evals.build({"x": eval_config(type="benchmark", **config)})["x"]
    assert evaluator.counts() == {"questions": 4, "left out": 1}


def test_answers_go_on_after_those_on_disk(chat, tmp_path):
    """Another metric, too, is computed from the same answers."""
    root = lay_out("vqa-chartqa-test-human", tmp_path)
    config = {"task": "vqa-chartqa-test-human", "annotations": root, "batch_size": 1}
    model = expected("vqa-chartqa-test-human")["model"]
    answers = ["13", "0.5", "COMPASS", "0.0"]
    first = recorder(chat, model, answers[:2])
    evaluator = evals.build({"x": eval_config(type="benchmark", **config)})["x"]
    with pytest.raises(IndexError):
        evaluator.run(first, tmp_path / "cache")
    second = recorder(chat, model, answers[2:])
    mended = evals.build({"x": eval_config(type="benchmark", corrected=True, **config)})["x"]
    scores = mended.run(second, tmp_path / "cache")
    assert [call.text.partition("\n")[2][:4] for call in second.calls] == ["  Wh", "Is t"]
    # 0.0 for 0 is wrong by the original, whose comparison of a zero is one of texts.
    assert scores.values == {"accuracy": 0.75, "corrected_accuracy": 1.0}
    assert recorder(chat, model, []).calls == []
    assert evaluator.run(recorder(chat, model, []), tmp_path / "cache").values == {"accuracy": 0.75}


def test_the_tiling_is_that_of_the_published_scores(chat, tmp_path):
    root = lay_out("vqa-textvqa-val", tmp_path)
    entry = {"task": "vqa-textvqa-val", "annotations": root}
    model = expected("vqa-textvqa-val")["model"]
    for name, tiles, option, words in (
        ("InternVL-Chat-V1-2", 1, None, "1 tile an image (the model does not tile)"),
        ("InternVL2-2B", 12, None, "up to 6 tiles an image (published scores)"),
        ("InternVL-Chat-V1-5", 12, None, "up to 24 tiles"),
        ("InternVL2-2B", 12, "checkpoint", "up to 12 tiles an image (--tiles checkpoint)"),
        ("InternVL2-2B", 12, 3, "up to 3 tiles an image (--tiles 3)"),
        ("InternVL2-2B", 12, "one", "1 tile an image (--tiles one)"),
    ):
        evaluator = evals.build({"x": eval_config(type="benchmark", tiles=option, **entry)})["x"]
        recorded = recorder(chat, model | {"checkpoint_argument": f"x/{name}"}, ["a"] * 4)
        recorded = replace(recorded, tiles=replace(recorded.tiles, max=tiles))
        scores = evaluator.run(recorded, None)
        settings = json.loads(scores.files["vqa-textvqa-val_settings.json"])
        assert settings["textvqa_val"]["tiles"].startswith(words)
        assert any(words in note for note in scores.notes)


def test_chartqas_mean_and_mmbenchs_own_accuracy(chat, tmp_path):
    root = lay_out("vqa-chartqa-test-human", tmp_path)
    file = root / "chartqa/test_human.jsonl"
    (root / "chartqa/test_augmented.jsonl").write_text(file.read_text().splitlines()[2] + "\n")
    config = eval_config(type="benchmark", task="vqa-chartqa-test", annotations=root)
    model = expected("vqa-chartqa-test-human")["model"]
    answers = ["13", "0.5", "COMPASS", "0.0", "Compass"]
    scores = evals.build({"x": config})["x"].run(recorder(chat, model, answers), None)
    assert scores.values == {"human_accuracy": 0.75, "augmented_accuracy": 1.0, "accuracy": 0.875}
    root = lay_out("mmbench-test-cn", tmp_path / "cn")
    config = eval_config(type="benchmark", task="mmbench-test-cn", annotations=root)
    scores = evals.build({"x": config})["x"].run(recorder(chat, model, ["B"] * 4), None)
    assert scores.values == {"answered": 4.0}
    assert any("MMBench's server" in note for note in scores.notes)


def test_the_world_header_is_mended_beside(chat, tmp_path):
    """The corrected version has the English header: it is asked anew."""
    root = lay_out("mme-realworld", tmp_path)
    config = eval_config(
        type="benchmark", task="mme-realworld", annotations=root, corrected=True, tiles="one"
    )
    answers = ["A", "B", "Because of (C) grey", "D", "A", "B", "Because of (C) amber", "D"]
    recorded = recorder(chat, expected("mme-realworld")["model"], answers)
    scores = evals.build({"x": config})["x"].run(recorded, None)
    assert "选项如下所示" in recorded.calls[0].text
    assert "\nThe choices are listed below:\n(A) " in recorded.calls[4].text
    assert scores.values["accuracy"] == 0.5
    assert scores.values["corrected_accuracy"] == 0.75


def test_tables_as_pandas_reads_them():
    from internvl.evals.benchmark import table

    text = "index\tA\tB\tC\tD\n1\t3\t4\tTrue\t\n2\tNA\t5\tFalse\tx\n"
    columns = table.parse_columns(text)
    assert columns == {
        "index": [1, 2],
        "A": [3.0, None],
        "B": [4, 5],
        "C": [True, False],
        "D": [None, "x"],
    }


@pytest.fixture(scope="module")
def meteor():
    """One process for all: it loads its tables for seconds."""
    with one_meteor():
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "index"),
    [
        (key, n)
        for key in CAPTIONS
        for n, run in enumerate(expected(key)["runs"])
        # Captions are greedy or of beams here: the run that samples has no counterpart.
        if "--temperature" not in run["flags"]
    ],
)
def test_captions(chat, meteor, tmp_path, key, index):
    """Prompt, tiles, lengths and scores."""
    described = expected(key)
    run = described["runs"][index]
    (result,) = [c["json"] for n, c in run["outputs"].items() if n.endswith(".json")]
    root = lay_out(key, tmp_path)
    options = {"tiles": tiles_of(key, run["flags"])}
    ((_, job),) = jobs.of_tasks([key], {}, options, root, None, [], "test", "m").items()
    evaluator = evals.EVALS["caption"](job.config)
    texts = {evaluator.paths[row["image_id"]]: row["caption"] for row in result}
    asked, tiles = [], []

    class Captioner(Recorder):
        def caption(self, images, prompt, **settings):
            asked.append((prompt, settings["max_new_tokens"], settings["min_new_tokens"]))
            tiles.append(self.tiles)
            by_pixels = {read_rgb(path).tobytes(): text for path, text in texts.items()}
            return [by_pixels[image.tobytes()] for image in images]

    model = described["model"] | run.get("model", {})
    base = recorder(chat, model, [])
    captioner = Captioner(chat.model, chat.tokenizer, chat.template, base.tiles, None, base.folder)
    scores = evaluator.run(captioner, None)
    calls = run["calls"] + run.get("calls_of_rank_1", [])
    own = calls[0]["generation_config"]
    settings = (own["max_new_tokens"], own["min_new_tokens"])
    assert set(asked) == {(calls[0]["question"], *settings)}
    shown = replace(captioner, tiles=tiles[0])
    counts = [c["pixel_values_shape"][0] for c in calls]
    assert sorted(map(shown.num_tiles, evaluator.images())) == sorted(counts)
    (line,) = [c["text"] for n, c in run["outputs"].items() if n.endswith(".txt")]
    numbers = [float(text) for text in re.findall(r"\d+\.\d+", line)]
    names = ("average_length", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
    assert [scores.values[name] for name in names] == pytest.approx(numbers)
    out = tmp_path / "out"
    out.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in scores.rows)
    (out / f"{key}.jsonl").write_text(rows, encoding="utf-8")
    write_captions(out, key, job, scores.values, model["checkpoint_argument"])
    for name, content in run["outputs"].items():
        start, _, ending = name.rpartition("/")[2].partition("<yymmddHHMMSS>")
        (file,) = out.glob(f"{start}{'?' * 12 if ending else ''}{ending}")
        text = file.read_text(encoding="utf-8")
        if "json" in content:
            assert json.loads(text) == content["json"]
        else:
            # Equal to the last digit but for what the processor's summation leaves.
            assert re.sub(r"\d\.\d+", "#", text) == re.sub(r"\d\.\d+", "#", content["text"])
            assert numbers == pytest.approx([float(n) for n in re.findall(r"\d+\.\d+", text)])
