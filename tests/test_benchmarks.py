"""The scripts behind the figures run: on a CPU, with tiny models, through the real loop."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import picture
from ranks import Script

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).parent.parent
TOWERS = ["vision_tower", "language_model"]


def run(script, *words):
    if script in (
        "dual.py",
        "memory.py",
        "rehearse.py",
        "many_gpus.py",
        "serve.py",
    ):  # a busy machine would leave out rows after minutes
        words += ("--budget-s", "1e6")
    process = Script(ROOT / "benchmarks" / script, *words)
    out, err = process.communicate()
    assert process.poll() == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_training_rates():
    (row,) = run("train.py", "--tiny", "2b_coco_shared")
    assert row["samples_per_step"] == 10
    assert len(row["loss"]) == 4
    assert 0 < row["fill"] <= 1


def test_loading_of_shards():
    rows = run("load_shards.py", "InternVL2-2B", "--tiny", "--train", "lora", "full")
    assert [row["layout"] for row in rows] == ["official"] * 2 + ["hf"] * 2
    assert all(row["shard_gib"] < row["folder_gib"] / 2 for row in rows)


def test_beams_of_captions_beside_a_plain_search():
    (row,) = run("answers.py", "--tiny", "captions_14b", "--rounds", "1")
    assert row["equal_texts"] == row["plain_batch"] == row["requests"]
    assert row["new_tokens"] == 5


def test_memory_table():
    (row,) = run("memory.py", "--tiny", "2b_lora_selective")
    assert row["error"]["states"] == pytest.approx(0, abs=1e-3)
    assert len(row["step_s"]) == 3
    assert row["predicted"]["total_gib"] > row["predicted"]["allocated_gib"] > 0


def test_ranks_are_evened_out():
    rows = run("balance.py", "--steps", "3", "--ranks", "8")
    assert [row["row"] for row in rows] == ["one tile, 8 ranks", "mixture, 8 ranks"]
    for row in rows:
        assert max(row["balanced"].values()) < 0.03 < max(row["unbalanced"].values())


def test_several_gpus():
    (row,) = run("many_gpus.py", "--tiny", "2b_coco")
    assert "failed" not in row
    assert len(row["alone_samples_per_s"]) == row["ranks"] == 2
    assert row["share"] > 0
    assert [save["gib"] > 0 for save in row["saves"]] == [True, True]
    assert row["resume_s"] > 0


def test_one_rank_of_many():
    pairs, chat = run("rehearse.py", "--tiny", "14b_head_4", "40b_full_8")
    assert pairs["allocated_gib"] > 0
    assert pairs["tokens"] > 0
    assert [chat[length]["samples"] for length in ("96", "48")] == [2, 5]
    assert chat["96"]["tokens"] == 2 * 96
    assert chat["96"]["hours_waiting"] > chat["96"]["hours"] > 0


def test_preference_rates_beside_two_plain_models():
    lora, _ = run("preference.py", "--tiny", "2b_lora", "--arms", "ours")
    full, two, trl, ratios = run("preference.py", "--tiny", "2b_full")
    assert (lora["reference"], full["reference"]) == ("adapters", "precomputed")
    assert ratios["2b_full pairs_per_s / loop"] > 0
    assert full["loss"][0] == pytest.approx(full["expected_first_loss"], abs=2e-3)
    assert full["pairs_per_s_with_reference"] < full["pairs_per_s"]
    assert two["pairs_per_s"] == max(two["tried"].values())
    assert "skipped" in trl or trl["pairs_per_s"] > 0


def test_the_two_plain_models_have_our_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import preference

    row, cpu = preference.ROWS["2b_full"], torch.device("cpu")
    torch.manual_seed(0)
    chat = preference.chat_of(row, cpu, tiny=True)
    objective, units = preference.encoded_units(chat, 3)
    models = preference.TwoModels(row, chat, cpu, checkpointing=False)
    models.policy.load_state_dict(chat.model.state_dict())
    models.reference.load_state_dict(chat.model.state_dict())
    theirs = models.loss([preference.encoded(unit, cpu) for unit in units])
    (batch,) = objective.batches(units)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logps = objective.logps(chat.model, batch)
    # Equal answers under both models: 0.8 ln 2 + 0.4 ln 2, and the chosen answers.
    ours = 0.83178 - logps[:, 0].sum() / batch.lengths[:, 0].sum()
    assert theirs.item() == pytest.approx(ours.item(), abs=5e-3)


def test_preferences_are_learned_from_own_answers(tmp_path):
    captions = {}
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as packed:
        for split, count in (("train", 12), ("val", 6), ("test", 6)):
            for number in range(count):
                name = f"{split}/{number}.jpg"
                color = ("red", "blue")[number % 2]
                packed.write(picture(tmp_path / name, (128, 128), color), name)
                # Nothing in a photo tells which: answers are right and wrong by chance.
                animal = ("dog", "boy")[number // 2 % 2]
                english = f"A {color} {animal} runs over the wide green field ."
                texts = {"en": [english] * 5, "zh": ["照片。"] * 5}
                captions[name] = {"split": split, **texts}
        packed.writestr("captions.json", json.dumps(captions))
    small = tmp_path / "small.zip"
    assert run("preference_learning.py", str(tmp_path / "photos.zip"), "--pack", str(small)) == []
    words = [str(small), "--to", str(tmp_path / "to"), "--tiny", "--seeds", "0"]
    seed, arms = run("preference_learning.py", *words)
    for counts in seed["made"].values():
        assert min(counts["questions"], counts["captions"]) > 0
    assert {"pair_accuracy", "right_answers", "cider"} <= seed["base"].keys()
    mean = arms["mpo"]["reward_accuracy"]["mean"]
    assert mean == pytest.approx(seed["mpo"]["reward_accuracy"], abs=1e-4)
    assert run("preference_learning.py", *words) == [arms]  # not again


def test_captions_are_ranked_by_cider_as_published(monkeypatch):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import preference_learning as learned

    truths = [
        ["a dog runs on the grass", "the brown dog is running", "a dog"],
        ["two men stand by a lake", "men near the water", "two people stand"],
        ["a red car on a street", "the car is red", "a street with a car"],
    ]
    captions = ["a dog runs", "two men stand by the water on a street", "the car is red red"]
    for caption, texts in zip(captions, truths, strict=True):
        scorer += (caption, texts)
    _, published = scorer.compute_score()
    cider = learned.Cider(truths)
    ours = [cider.score(text, texts) for text, texts in zip(captions, truths, strict=True)]
    assert ours == pytest.approx([*published], abs=1e-9)


def test_a_rate_that_keeps_captions_is_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import preference_learning as learned

    measured = {
        1e-4: {"reward_accuracy": 0.7, "cider": 0.5},
        3e-4: {"reward_accuracy": 0.8, "cider": 0.4},
        1e-3: {"reward_accuracy": 0.9, "cider": 0.1},
    }
    assert [learned.chosen_lr(measured, cider) for cider in (0.6, 0.5, 0.3)] == [1e-4, 1e-4, 3e-4]


def archive(folder, **counts):
    """A zip of photos with captions: how many of each split."""
    captions = {}
    with zipfile.ZipFile(folder / "photos.zip", "w") as packed:
        for split, count in counts.items():
            for number in range(count):
                name = f"{split}/{number}.jpg"
                packed.write(picture(folder / name, (128, 128)), name)
                texts = {"en": [f"A photo {number} ."] * 5, "zh": [f"照片{number}。"] * 5}
                captions[name] = {"split": split, **texts}
        packed.writestr("captions.json", json.dumps(captions))
    return [str(folder / "photos.zip"), "--to", str(folder / "to"), "--tiny"]


def test_learning_goes_on_where_it_stopped(tmp_path):
    words = [*archive(tmp_path, train=4, val=2), "--seeds", "0"]
    ran, arms = run("learning.py", *words, "--arms", "shared")
    assert ran["samples"] == 640
    assert {"loss", "en_cider", "zh_bleu_4"} <= ran.keys()
    tree = json.loads((tmp_path / "to" / "learning.json").read_text())
    losses = tree["results"]["shared-0"]["train_loss"]
    assert losses[-1] < losses[0]
    assert run("learning.py", *words, "--arms", "shared") == [arms]  # not again


@pytest.mark.slow
def test_learning_in_float8_beside_bfloat16(tmp_path):
    words = [*archive(tmp_path, train=4, val=2), "--seeds", "0"]
    english, bfloat16, float8, arms = run(
        "learning.py", *words, "--arms", "english", "bfloat16", "float8"
    )
    assert [key for key in english if key.endswith("cider")] == ["en_cider"]
    assert [key for key in float8 if key.endswith("cider")] == ["zh_cider"]
    results = json.loads((tmp_path / "to" / "learning.json").read_text())["results"]
    layers = results["float8-0"]["float8_layers"]
    assert layers == {"frozen": 2 * 6 + 2 * 7, "forward": 2 * 6 + 2 * 7, "backward": 2 * 7}
    ours, wanted = (results[name]["train_loss"] for name in ("float8-0", "bfloat16-0"))
    assert ours != wanted
    assert ours == pytest.approx(wanted, rel=1e-2)
    assert wanted[-1] < wanted[0]
    (point,) = arms["float8_minus_bfloat16"]["points"]
    for key in ("loss", "loss_in_float8"):
        assert point[key]["mean"] == pytest.approx(float8[key] - bfloat16["loss"], abs=1e-5)
    joined = ("--to", str(tmp_path / "joined"), "--join", str(tmp_path / "to"))
    assert run("learning.py", *joined) == [arms]


def test_effect_of_an_arm_is_taken_seed_by_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import curves

    losses = {"old-0": (4, 2), "old-1": (6, 3), "new-1": (7, 4), "new-0": (4, 3), "new-2": (9, 9)}
    results = {
        name: {
            "curve": [{"step": n, "samples": 8 * n, "loss": loss} for n, loss in enumerate(of, 1)],
            "train_loss": list(of),
        }
        for name, of in losses.items()
    }
    found = curves.effect(results, "new", "old")
    assert found["seeds"] == 2
    assert found["train_loss"] == [0.5, 1]
    first, last = (point["loss"] for point in found["points"])
    half = pytest.approx(0.5**0.5, abs=1e-5)
    assert first == {"mean": 0.5, "spread": half, "spread_of_old": pytest.approx(2**0.5, abs=1e-5)}
    assert last == {"mean": 1, "spread": 0, "spread_of_old": half}
    assert curves.last_points(results)["old"] == {"seeds": 2, "loss": {"mean": 2.5, "spread": half}}


def test_exactness_of_shared_rows_and_of_float8():
    names = ("shared", "shared, bfloat16, float8")
    shared, float8 = run("exactness.py", "--cpu", "--methods", "lora", "--only", *names)
    assert shared["within"]
    assert float8["within"]
    assert shared["loss"] < 1e-6
    assert float8["gradient"] > 0.02  # bfloat16 alone is five times nearer


def test_recall_beside_the_dense_matrix():
    chunked, dense = run("recall.py", "--small")
    assert (chunked["method"], dense["method"]) == ("chunked", "dense")
    assert chunked["metrics"] == dense["metrics"]
    assert 0 < chunked["metrics"]["image_retrieval_recall@1"] < 1


@pytest.mark.parametrize(
    "choice",
    [
        {"train": ["heads"]},
        {"train": ["text_projection"]},
        {"train": ["text_projection"], "lora": {"rank": 4, "on": TOWERS}},
        {"train": ["language_model", "heads"]},
        {"train": ["vision_tower", "language_model", "heads"]},
    ],
)
def test_flops_of_internvl_14b_are_those_that_torch_counts(monkeypatch, choice):
    """A step of both losses."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dual
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from internvl.config import recipes
    from internvl.data.records import Pair
    from internvl.objectives.retrieval import RetrievalObjective
    from internvl.plan import flops
    from internvl.plan.work import Sequences, work_of

    source = {"name": "pairs", "type": "pairs", "annotations": "pairs.csv"}
    recipe = recipes.resolve(
        {
            "model": {"id": "InternVL-14B", **choice},
            "data": {"sources": [source], "normalize": "imagenet"},
            "objective": {"name": "retrieval"},
            "run": "run",
            "global_batch": 3,
            "steps": 1,
        }
    )
    torch.manual_seed(0)
    handle = dual.random_dual(56, torch.device("cpu"), recipe, tiny=True)
    model, number, length = handle.model.float(), 3, 24
    pairs = [
        Pair(
            name=str(row),
            pixels=torch.zeros(3, 56, 56, dtype=torch.uint8),
            image_id=row,
            summary=(1, *range(5, 27), 2),
            positive=(1, *range(5, 27), 2),
            negative=(1, *range(6, 28), 2),
            written=(),
            num_given=0,
        )
        for row in range(number)
    ]
    objective = RetrievalObjective(recipe.objective, recipe.data, handle.encoder)
    (batch,) = objective.batches(pairs)
    objective.begin_step(model, iter([batch]), objective.counts(batch))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        sum(objective(model, batch).values()).backward()
    work = work_of(batch, objective.weights)
    # Torch counts what the masks hide: padding, and queries and captions that are only compared.
    hidden = 2 * model.num_queries * length
    texts = Sequences(number, work.texts.tokens, number * (length * length + hidden))
    dense = replace(work, texts=texts)
    wanted = flops.count(model, dense).needed
    assert counted.get_total_flops() == pytest.approx(wanted, rel=0.01)


def test_internvl_14b_rows(tmp_path):
    """Ready-made recipes on a tiny model: steps, needed FLOPs, hours."""
    words = ("--tiny", "lora_224_kept", "caption_224", "full_364", "--to", str(tmp_path / "a.json"))
    training, caption, full = run("dual.py", *words)
    assert len(training["loss"]) == 4  # one of warm-up
    assert training["tflop_per_pair"] > 0
    assert training["hours"] > 0
    assert caption["batch_4"]["images_per_s"] > 0
    assert full["parameters"] == 13_836_319_747
    assert json.loads((tmp_path / "a.json").read_text()) == [training, caption, full]


@pytest.mark.slow
def test_small_models_learn_to_retrieve(tmp_path):
    """English captions, then Chinese ones from what was exported."""
    words = archive(tmp_path, train=12, test=12)
    words += ["--arms", "english", "chinese"]
    english, chinese, arms = run("retrieval_learning.py", *words)
    assert (english["run"], chinese["run"]) == ("english-0", "chinese-0")
    tree = json.loads((tmp_path / "to" / "retrieval_learning.json").read_text())
    before, after = tree["results"]["chinese-0"]["curve"]
    assert before | {"step": 12} == tree["results"]["english-0"]["curve"][-1]
    gain = after["zh_c_mean_recall"] - before["zh_c_mean_recall"]
    assert arms["gain_of_fine_tuning"]["zh_c_mean_recall"] == pytest.approx(gain, abs=1e-3)
    assert run("retrieval_learning.py", *words) == [arms]  # not again


def test_search_of_photos():
    rows = run("search.py", "--tiny")
    names = ["write", "exact", "write", "exact", "build_approximate", "approximate"]
    assert [row["row"] for row in rows] == names
    assert [row["photos"] for row in rows if "photos" in row] == [2000, 2000, 1000, 1000, 1000]
    assert min(rows[4]["recall"].values()) >= 0.99


def test_serving():
    answer, row = run("serve.py", "--tiny", "--count", "8")
    assert (answer["row"], row["row"], row["engine"]) == ("answer", "serve", "process")
    assert (answer["requests"], row["requests"]) == (4, 8)
    assert answer["tokens"] == row["tokens"] == 30
    assert row["share_of_answer"] > 0
    assert 0 < row["first_token_p50_ms"] < row["total_p50_ms"]
    assert row["pieces"] > 1
    assert "failed" not in answer
    assert "failed" not in row
    assert len(row["host_and_gpu_gib_after"]) == 8
