"""Recipes of the original's training scripts against their published values (scripts.json).

The values were taken down from the scripts, one row each, and share nothing with the table that
the recipes are written from. The translation of a script is compared with them too.
"""

import json
import re
from pathlib import Path

import pytest

from internvl import plan, zoo
from internvl.compat import finetune, scripts, shell
from internvl.config import released
from internvl.config.recipes import load_recipe, resolve, to_tree
from internvl.errors import ConfigError, UserError
from internvl.zoo import gpus

FACTS = json.loads(Path(__file__).with_name("scripts.json").read_text(encoding="utf-8"))
NAMES = {path: Path(path).stem for path in FACTS}
CHAT = [path for path, facts in FACTS.items() if "dataset" not in facts]
PAIRS = [path for path in FACTS if path not in CHAT]
PARTS = {"vit": "vision_tower", "mlp": "multi_modal_projector", "llm": "language_model"}
TERMS = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
PACKED = {
    "num_images_expected": "max_tiles",
    "max_packed_tokens": "row_tokens",
    "max_buffer_size": "packing_buffers",
    "allow_overflow": "allow_overflow",
}
META = {
    "custom": None,  # the user's own conversations, a source of the recipe
    "coco_caption.json": None,
    "internvl_1_2_finetune.json": None,  # its nine sets are sources
    "<pretrain json>": "data/pretrain.json",
    "<finetune json>": "data/finetune.json",
    "<pretrain mixture>": "data/pretrain.json",
    "<finetune mixture>": "data/finetune.json",
    "<finetune mixture_2x>": "data/finetune_2x.json",
    "<finetune mixture_4x>": "data/finetune_4x.json",
    "shell/data/debug_sft.json": "data/sft.json",
    "shell/data/debug_mpo.json": "MMPR-v1.2/meta.json",  # the pairs that were published later
}
# The recipes in which one GPU's memory decides otherwise: DeepSpeed's stage is 1 there.
ZERO3 = ("internvl3_9b_", "internvl3_14b_dynamic", "internvl_stage2_finetune")
GPT_OSS = [path for path in FACTS if "gpt_oss_20b" in path]
(GPT_OSS_FOLDER,) = {Path(path).parent for path in GPT_OSS}


def translated(path, **variables):
    """The recipe that `internvl compat shell` makes of a script, and its GPUs."""
    start = shell.read(scripts.text(path), {"WORLD_SIZE": "8", "RANK": "0"} | variables, name=path)
    call = {"num_gpus": start.num_gpus, "environment": start.environment}
    return resolve(finetune.translate(start.entry, start.flags, **call).tree), start


def test_every_training_script_is_there():
    assert len(FACTS) == 126
    assert FACTS.keys() == {path for path in scripts.paths() if "habitat" not in path}
    assert released.scripts().keys() >= set(NAMES.values())
    assert len({released.scripts()[name] for name in NAMES.values()}) == 126


@pytest.mark.parametrize("typed", ["{}", "{}.sh", "shell/internvl/{}.sh", "{}.yaml"])
def test_a_script_by_its_name_is_the_short_names_recipe(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    script = "internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco"
    assert load_recipe(typed.format(script)) == load_recipe("internvl2_2b_lora_coco")


def test_a_users_own_script_is_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("internvl3_8b_mpo.sh").write_text("GPUS=8\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="internvl compat shell internvl3_8b_mpo.sh"):
        load_recipe("internvl3_8b_mpo.sh")
    with pytest.raises(ConfigError, match="did you mean internvl3_9b_mpo"):
        load_recipe("internvl3_9b_mp.sh")


def check_shared(recipe, facts):
    """What recipes of chat models and pairs have in common."""
    optim = recipe.optim
    assert (optim.lr, optim.weight_decay) == (facts["lr"], facts["weight_decay"])
    assert optim.warmup_steps == facts.get("warmup_steps")
    if "warmup_ratio" in facts:
        assert optim.warmup_ratio == facts["warmup_ratio"]
    assert (optim.betas, optim.eps, optim.max_grad_norm) == ((0.9, 0.999), 1e-8, 1.0)
    assert optim.min_lr_ratio == 0
    assert recipe.model.drop_path == facts["drop_path"]
    assert recipe.seed == facts.get("seed", 42)
    assert recipe.dtype == "bfloat16"
    assert recipe.data.tiles.size == facts["image_size"]
    # Where both are stated, the steps end a run.
    assert recipe.steps == facts.get("max_steps")
    assert recipe.epochs == (None if "max_steps" in facts else facts["epochs"])


def check_chat(recipe, facts):
    """All values of a chat model's script but paths."""
    check_shared(recipe, facts)
    data, packed = recipe.data, facts.get("packed")
    batch = (None, facts["global_batch"]) if packed else (facts["global_batch"], None)
    assert (recipe.global_batch, recipe.global_batch_rows) == batch
    assert data.max_tokens == facts["max_tokens"]
    assert data.tiles.min == facts["min_dynamic_patch"] == 1
    assert data.tiles.max == (facts["max_dynamic_patch"] if facts["dynamic"] else 1)
    # Without dynamic tiles there is no thumbnail, whatever its flag.
    assert data.tiles.thumbnail == (facts["thumbnail"] and facts["dynamic"])
    frames = [data.video.min_frames, data.video.max_frames]
    assert frames == facts.get("frames", [8, 32])
    if packed:
        assert {flag: getattr(data, key) for flag, key in PACKED.items()} == {
            flag: packed[flag] for flag in PACKED
        }
        assert (data.packing, data.share_prefix) == ("official", False)
        gathered = packed.get("loss_reduction_all_gather", False)
        assert recipe.objective.weighting == packed["loss_reduction"]
        assert recipe.objective.loss_normalization == ("global" if gathered else "micro_batch")
    adapters = recipe.model.lora
    if facts["llm_lora"]:
        assert (adapters.rank, adapters.on) == (facts["llm_lora"], ("language_model",))
        assert (adapters.alpha, adapters.dropout) == (None, 0.05)
        assert recipe.model.parts == ()
    else:
        assert adapters is None
        trained = {PARTS[part] for part in PARTS if part not in facts["frozen"]}
        assert set(recipe.model.parts) == trained
    assert recipe.model.train_last_vision_blocks == 0
    assert recipe.optim.decay_vectors
    assert recipe.optim.schedule == "cosine"
    if "mpo" in facts:
        assert recipe.objective.term_weights == TERMS
        assert (recipe.objective.beta, recipe.objective.label_smoothing) == (0.1, 0.0)
        assert data.row_tokens == 2 * data.max_tokens
    elif not packed:
        assert recipe.objective.weighting == "token"


def released_start(facts):
    """The released model of a script's start; None for parts and earlier runs."""
    start = facts["start"].removeprefix("ckpt/")
    if "+" in start or start.startswith("work_dirs") or start.endswith("output"):
        return None
    return zoo.find(start)


@pytest.mark.parametrize("path", CHAT, ids=NAMES.get)
def test_recipes_have_the_scripts_values(path):
    facts, name = FACTS[path], NAMES[path]
    recipe = load_recipe(name)
    check_chat(recipe, facts)
    model = recipe.model
    start = released_start(facts)
    if start is not None:
        assert zoo.find(model.id) == start
        assert Path(model.id).name == Path(facts["start"]).name
        assert (start.template, start.ps_version) == (facts["template"], facts["ps_version"])
        assert start.select_layer == facts["select_layer"]
    elif "+" in facts["start"]:
        vision, language, *projector = facts["start"].split(" + ")
        assert Path(model.vision).name == vision
        assert Path(model.language).name == Path(language).name
        assert (model.projector is not None) is bool(projector)
        assert model.template == facts["template"]
        assert (model.ps_version or "v2") == facts.get("ps_version", "v1")
        assert (model.select_layer or -1) == facts["select_layer"]
    else:
        check_earlier(model.id, facts)
    meta = facts["meta"].replace("…", "InternVL-Domain-Adaptation-Data")
    expected = META.get(meta, meta)
    if name.endswith("gpt_oss_20b_stage3_mpo"):
        expected = "data/pairs.json"
    assert recipe.data.meta == (None if expected is None else Path(expected))
    if meta == "internvl_1_2_finetune.json":
        assert len(recipe.data.sources) == 9
    stage = recipe.parallel.shard
    if facts["stage"] == 3 or name.startswith(ZERO3):
        assert stage == "zero3"
    else:
        # It saves memory and changes no result: left out where a GPU holds everything.
        assert stage in ("none", "zero1")
    assert (recipe.parallel.offload == "cpu") is ("offload" in facts["deepspeed"])
    head = released.paths()[released.scripts()[name]].read_text(encoding="utf-8")
    assert ("was never published" in " ".join(head.split())) is meta.startswith(("<", "shell/")) & (
        "MMPR" not in str(recipe.data.meta)
    )


def check_earlier(run, facts):
    """The start is the run of the recipe of the script whose output the script names."""
    earlier = load_recipe(released.of_run(run))
    if facts["start"].startswith("work_dirs"):
        output = Path(facts["start"]).name
        # One script names its own output, which it cannot start from.
        if output.startswith("internvl_chat_v1_5_phi3"):
            output = output.replace("finetune", "pretrain")
        assert earlier.run.name == released.scripts()[output]
    else:
        (stage,) = (path for path in GPT_OSS if facts["start"].split()[0] in path)
        assert earlier.run.name == released.scripts()[NAMES[stage]]


@pytest.mark.parametrize("path", CHAT, ids=NAMES.get)
def test_translations_have_the_scripts_values(path):
    facts = FACTS[path]
    recipe, start = translated(path)
    if "gpus" in facts:
        assert start.num_gpus == facts["gpus"]
        assert start.launcher == facts["launcher"]
    check_chat(recipe, facts)
    assert recipe.parallel.shard == f"zero{facts['stage']}"
    assert (recipe.parallel.offload == "cpu") is ("offload" in facts["deepspeed"])
    assert recipe.data.workers == facts["workers"]
    assert recipe.compute.checkpointing == "full"
    strategy, every, keep = facts["save"]
    assert recipe.checkpoint.every == (every if strategy == "steps" else 0)
    assert recipe.checkpoint.keep == keep
    if "+" not in facts["start"]:
        assert recipe.data.template == facts["template"]
    else:
        assert recipe.model.template == facts["template"]


def check_pairs(recipe, facts):
    check_shared(recipe, facts)
    assert recipe.global_batch == facts["global_batch"]
    assert recipe.data.tiles.max == 1
    assert recipe.objective.name == "retrieval"
    rates = facts.get("layer_decay")
    decay = recipe.optim.layer_decay
    assert (decay is None) is (rates is None)
    if rates is not None:
        assert (decay.vision, decay.qllama) == (rates["vit"], rates["qllama"])
    (source,) = recipe.data.sources
    assert source.type == ("coco_format" if "coco" in facts["dataset"] else "flickr_format")
    adapters = recipe.model.lora
    assert (0 if adapters is None else adapters.rank) == facts["backbone_lora"]
    if adapters is not None:
        assert set(adapters.on) == {"vision_tower", "language_model"}
        assert facts["qllama_lora"] == facts["backbone_lora"]


@pytest.mark.parametrize("path", PAIRS, ids=NAMES.get)
def test_recipes_and_translations_of_internvl_14b_have_the_scripts_values(path):
    facts, name = FACTS[path], NAMES[path]
    recipe = load_recipe(name)
    check_pairs(recipe, facts)
    assert recipe.data.sources[0].name == facts["dataset"]
    assert Path(recipe.model.id).name == facts["start"]
    assert recipe.optim.schedule == "cosine"
    assert [recipe.checkpoint.every, recipe.checkpoint.keep] == facts["save"][1:]
    # The scripts that freeze the towers train the head that stands behind them.
    frozen = {"vision_tower", "language_model"} if facts["freeze"] else set()
    assert not frozen & set(recipe.model.parts)
    heads = {"text_projection", "lm_head", "heads"}
    assert heads & set(recipe.model.parts)
    made, start = translated(path)
    check_pairs(made, facts)
    assert (start.num_gpus, start.launcher) == (facts["gpus"], facts["launcher"])
    assert made.run == Path(facts["output_dir"])
    assert made.parallel.shard == f"zero{facts['stage']}"
    assert made.optim.schedule == "as_shipped"
    if facts["unfreeze"]:
        assert made.model.parts == ("text_projection", "lm_head")
    else:
        assert made.model.parts == ("vision_tower", "language_model", "heads")


def test_what_does_not_train_is_refused_by_name():
    """Four scripts train GPT-OSS; a plan says why not, also for a stage after another."""
    assert len(GPT_OSS) == 4
    for path in GPT_OSS:
        with pytest.raises(UserError, match=r"gpt.oss.*GPT-OSS .* does not train"):
            plan.make(load_recipe(NAMES[path]), gpus.find("a100-80"), None, 8)
        head = released.paths()[released.scripts()[NAMES[path]]].read_text(encoding="utf-8")
        assert "# refused:" in head


# What one node or GPU of the original does not hold: that many of another size.
OTHERS = {
    "internvl3_5_38b_sft": ("a100-80", 128),
    "internvl3_5_241b_sft": ("h200", 256),
    "internvl3_5_241b_mpo": ("h200", 256),
}


def read_by_a_plan(path):
    """What a plan of a recipe depends on, as text."""
    tree = to_tree(load_recipe(NAMES[path]))
    for key in ("run", "epochs", "steps", "checkpoint", "evals", "drop_last"):
        del tree[key]
    for key in ("sources", "meta"):
        del tree["data"][key]
    for key in ("lr", "weight_decay", "warmup_ratio", "warmup_steps"):
        del tree["optim"][key]
    return json.dumps([tree, *gpus_of(path)])


def gpus_of(path):
    return OTHERS.get(NAMES[path], ("a100-80", FACTS[path].get("gpus", 64)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", sorted({Path(path).parent for path in FACTS} - {GPT_OSS_FOLDER}), ids=str
)
def test_every_recipe_fits_on_the_scripts_gpus(folder):
    """Recipes that differ in nothing that a plan reads are planned once."""
    groups = {}
    for path in (path for path in FACTS if Path(path).parent == folder):
        groups.setdefault(read_by_a_plan(path), []).append(path)
    for paths in groups.values():
        name, (gpu, count) = NAMES[paths[0]], gpus_of(paths[0])
        planned = plan.make(load_recipe(name), gpus.find(gpu), None, count)
        assert planned.fits, (name, planned.memory.total_gib)
        head = released.paths()[released.scripts()[name]].read_text(encoding="utf-8")
        text = " ".join(head.replace("\n#", " ").split())
        stated = re.findall(r"(\d+) GiB(?: of (?:each(?: of \d+)?|them))?,? by plan", text)
        if stated:
            assert str(round(planned.memory.total_gib)) in stated, name


def test_stages_name_the_runs_that_they_start_from():
    recipe = load_recipe("internvl2_5_8b_stage2")
    chain = []
    while recipe.model.id is not None:
        chain.append(released.of_run(recipe.model.id))
        recipe = load_recipe(chain[-1])
    assert chain == ["internvl2_5_8b_stage1_5", "internvl2_5_8b_stage1"]
    head = released.paths()["internvl2_5_8b_stage2"].read_text(encoding="utf-8")
    assert re.search(r"^# start:    the run of internvl2_5_8b_stage1_5", head, re.MULTILINE)
