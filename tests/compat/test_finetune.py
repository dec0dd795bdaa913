"""Flags of the original's training entries become a recipe, are refused, or change nothing."""

import json
import shlex

import pytest

from internvl.compat import finetune
from internvl.config.recipes import resolve, to_tree
from internvl.errors import ConfigError

CHAT = "internvl/train/internvl_chat_finetune.py"
PAIRS = "internvl/train/internvl_stage2_finetune.py"
MPO = "internvl/train/internvl_chat_mpo.py"
NEEDED = {
    CHAT: ["--model_name_or_path", "a/b", "--meta_path", "m.json", "--output_dir", "out"],
    PAIRS: ["--model_name_or_path", "a/b", "--output_dir", "out"],
}
PACKED = ["--use_packed_ds", "True", "--max_steps", "9", "--per_device_train_batch_size", "1"]
PARTS = ["--vision_path", "v/v", "--llm_path", "l/l", "--meta_path", "m.json", "--output_dir", "o"]

# Values that a flag of this name may have, where another number or the other bool will not do.
VALUES = {
    "model_name_or_path": "c/d",
    "conv_style": "Hermes-2",
    "meta_path": "other.json",
    "output_dir": "elsewhere",
    "normalize_type": "clip",
    "loss_reduction": "square",
    "unfreeze_vit_layers": "-2",
    "lr_scheduler_type": "constant",
    "optim": "adamw_bnb_8bit",
    "save_strategy": "no",
    "report_to": "wandb",
    "deepspeed": "zero_stage3_config_34b.json",
    "dataset_name": "coco_karpathy_train",
    "max_packed_tokens": "9000",
    "save_total_limit": "3",
    "max_steps": "7",
    "adam_beta1": "0.5",
    "adam_beta2": "0.5",
}
# Other flags that make one count.
BESIDE = {
    "use_packed_ds": PACKED[2:],
    "num_images_expected": PACKED,
    "max_packed_tokens": PACKED,
    "max_buffer_size": PACKED,
    "loss_reduction": PACKED,
    "loss_reduction_all_gather": PACKED,
    "unfreeze_vit_layers": ["--freeze_backbone", "True"],
    "min_dynamic_patch": ["--dynamic_image_size", "True"],
    "max_dynamic_patch": ["--dynamic_image_size", "True"],
    "grad_checkpoint": [],
    "pad2square": ["--dynamic_image_size", "False"],
    "warmup_ratio": ["--lr_scheduler_type", "cosine"],
    "warmup_steps": ["--lr_scheduler_type", "cosine"],
    "unfreeze_qllama_head": ["--freeze_qllama", "True", "--unfreeze_crossattn", "True"],
    "freeze_qllama": ["--unfreeze_crossattn", "True"],
    "unfreeze_crossattn": ["--use_backbone_lora", "4", "--use_qllama_lora", "4"],
    "use_qllama_lora": ["--use_backbone_lora", "4", "--unfreeze_crossattn", "True"],
    "freeze_model": ["--unfreeze_qllama_head", "True"],
    "gradient_checkpointing": ["--grad_checkpoint", "False"],
}
# Parts of a model instead of a whole one.
OF_PARTS = ("vision_path", "llm_path", "mlp_path", "ps_version", "vision_select_layer")


def tree(entry, *words, **settings):
    translated = finetune.translate(entry, [*words], **settings)
    return to_tree(resolve(translated.tree))


def changed(flag, row):
    """Another value than the default."""
    if flag in VALUES:
        return VALUES[flag]
    default = row["default"]
    if row["type"] == "bool":
        return str(not default)
    if row["type"] == "str":
        return "other"
    return str({"int": 4, "float": 0.25}[row["type"]] if not default else default * 2)


def cases(*wanted_keys):
    return [
        pytest.param(entry, flag, row, id=f"{section}-{flag}")
        for entry, section in ((CHAT, "chat"), (PAIRS, "pairs"))
        for flag, row in finetune.flags_of(section).items()
        if any(key in row for key in wanted_keys)
    ]


def words_for(entry, flag):
    start = PARTS if flag in OF_PARTS and entry == CHAT else NEEDED[entry]
    return [*start, "--do_train", "True", *BESIDE.get(flag, [])]


# The entry of pairs switches checkpointing on itself, so there the flag changes nothing.
CHANGING = [
    case for case in cases("to", "rule") if case.values[:2] != (PAIRS, "gradient_checkpointing")
]


@pytest.mark.parametrize(("entry", "flag", "row"), CHANGING)
def test_a_flag_changes_the_recipe(entry, flag, row):
    value = {"ps_version": "v1", "vision_select_layer": "-4"}.get(flag) or changed(flag, row)
    if flag == "unfreeze_crossattn":
        words = [*NEEDED[entry], "--freeze_qllama", "True"]
        with pytest.raises(ConfigError, match="unfreeze_crossattn"):
            tree(entry, *words)
        assert "queries" in tree(entry, *words, "--unfreeze_crossattn")["model"]["train"]
        return
    environment = {"QLLAMA_LAYER_DECAY_RATE": "0.9", "VIT_LAYER_DECAY_RATE": "0.9"}
    if flag == "allow_overflow":
        with pytest.raises(ConfigError, match="allow_overflow"):
            tree(entry, *NEEDED[entry], *PACKED, "--allow_overflow", "True")
        return
    words = words_for(entry, flag)
    before = tree(entry, *words, environment=environment)
    after = tree(entry, *words, f"--{flag}", value, environment=environment)
    assert before != after


@pytest.mark.parametrize(("entry", "flag", "row"), cases("nothing"))
def test_a_flag_without_effect_says_so_with_the_originals_line(entry, flag, row):
    words = [*NEEDED[entry], "--do_train", "True"]
    value = changed(flag, row)
    translated = finetune.translate(entry, [*words, f"--{flag}", value])
    assert resolve(translated.tree) == resolve(finetune.translate(entry, words).tree)
    assert any(f"--{flag}: changes nothing" in n and row["line"] in n for n in translated.notes)


@pytest.mark.parametrize(("entry", "flag", "row"), cases("only"))
def test_another_value_of_a_fixed_flag_is_refused_with_the_reason(entry, flag, row):
    words = NEEDED[entry]
    value = str(not row["only"]) if row["type"] == "bool" else changed(flag, row)
    with pytest.raises(ConfigError, match=f"--{flag} ") as refused:
        finetune.translate(entry, [*words, f"--{flag}", value])
    assert row["refused"] in str(refused.value)


@pytest.mark.parametrize("section", ["chat", "pairs", "preference"])
def test_every_flag_has_one_meaning(section):
    for flag, row in finetune.flags_of(section).items():
        assert len({"to", "rule", "nothing", "only"} & set(row)) == 1, flag
        assert ("line" in row) == ("nothing" in row)
        assert ("refused" in row) == ("only" in row)
        assert row.get("rule", "start") in finetune.RULES


def test_the_coco_script():
    words = shlex.split(
        "--model_name_or_path ./pretrained/InternVL2-2B --conv_style internlm2-chat --output_dir o "
        "--meta_path ./shell/data/coco_caption.json --max_dynamic_patch 6 --freeze_llm True "
        "--freeze_mlp True --freeze_backbone True --use_llm_lora 128 --bf16 True "
        "--num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 16 "
        "--save_steps 200 --save_total_limit 1 --learning_rate 4e-5 --weight_decay 0.01 "
        "--warmup_ratio 0.03 --lr_scheduler_type cosine --max_seq_length 4096 --do_train True "
        "--dynamic_image_size True --use_thumbnail True --deepspeed zero_stage1_config.json"
    )
    recipe = resolve(finetune.translate(CHAT, words, num_gpus=8).tree)
    assert (recipe.global_batch, recipe.epochs, recipe.drop_last) == (512, 1, True)
    assert recipe.num_steps(566_747) == 1_106
    assert (recipe.model.lora.rank, recipe.model.parts) == (128, ())
    assert (recipe.data.tiles.max, recipe.data.tiles.thumbnail) == (6, True)
    assert (recipe.optim.lr, recipe.optim.decay_vectors, recipe.dtype) == (4e-5, True, "bfloat16")
    assert (recipe.parallel.shard, recipe.checkpoint.keep) == ("zero1", 1)


@pytest.mark.parametrize(
    ("words", "train", "lora"),
    [
        ("", ("vision_tower", "language_model", "heads"), None),
        ("--freeze_model --freeze_vision_model --freeze_qllama --unfreeze_qllama_head",
         ("text_projection", "lm_head"), None),
        ("--freeze_model --freeze_vision_model --freeze_qllama --unfreeze_qllama_head "
         "--use_backbone_lora 16 --use_qllama_lora 16", ("text_projection", "lm_head"), 16),
        ("--freeze_vision_model", ("language_model", "heads"), None),
    ],
)  # fmt: skip
def test_what_trains_in_internvl_14b(words, train, lora):
    recipe = resolve(finetune.translate(PAIRS, [*NEEDED[PAIRS], *words.split()]).tree)
    assert recipe.model.parts == train
    assert (recipe.model.lora and recipe.model.lora.rank) == lora


def test_layer_decay_and_the_schedule_that_runs():
    words = [*NEEDED[PAIRS], "--use_custom_trainer", "--warmup_steps", "100", "--lr_scheduler_type"]
    environment = {"VIT_LAYER_DECAY_RATE": "0.9", "QLLAMA_LAYER_DECAY_RATE": "0.8"}
    shipped = finetune.translate(
        PAIRS, [*words, "cosine", "--deepspeed", "zero_stage1_config.json"], environment=environment
    )
    recipe = resolve(shipped.tree)
    assert (recipe.optim.layer_decay.vision, recipe.optim.layer_decay.qllama) == (0.9, 0.8)
    assert (recipe.optim.schedule, recipe.optim.warmup_steps) == ("as_shipped", 100)
    assert any("WarmupDecayLR" in note for note in shipped.notes)
    assert resolve(finetune.translate(PAIRS, [*words, "cosine"]).tree).optim.schedule == "cosine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rte 1", "did you mean --learning_rate"),
        ("--learning_rate fast", "'fast' is no float"),
        ("--learning_rate", "no value is no float"),
        ("--bf16 maybe", "'maybe' is no bool"),
        ("--gradient_accumulation_steps 0", "32 samples are 32|are 32 already"),
        ("--use_llm_lora 8 --use_backbone_lora 4", "one rank"),
        ("--save_strategy epoch", "give steps"),
        ("--lr_scheduler_type polynomial", "not one of cosine"),
        ("--use_packed_ds True", "give --max_steps"),
        ("--unfreeze_vit_layers 3 --freeze_backbone True", "give --unfreeze_vit_layers -N"),
        ("--optim sgd", "not one of adamw_torch"),
        ("stray", "stray: no flag"),
    ],
)
def test_refused_with_a_remedy(words, message):
    with pytest.raises(ConfigError, match=message):
        tree(CHAT, *NEEDED[CHAT], *words.split(), num_gpus=4)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as refused:
        finetune.translate(CHAT, ["--fp16", "True", "--optim", "sgd"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 7  # the head, two flags, and four that are missing


def test_other_files_are_refused():
    with pytest.raises(ConfigError, match="internvl_chat_pretrain.py"):
        finetune.translate("train.py", [])


PREFERENCE = "--loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2"


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (f"{PREFERENCE} --rpo_alpha 1", {"dpo": 0.8, "bco": 0.2, "sft": 1.0}),
        (PREFERENCE, {"dpo": 0.8, "bco": 0.2}),
        ("--loss_type hinge --sigmoid_loss_weight 3", {"hinge": 1.0}),
        ("", {"dpo": 0.8, "bco": 0.2, "sft": 1.0}),
    ],
)
def test_losses_of_preference_training(words, weights):
    translated = finetune.translate(MPO, [*NEEDED[CHAT], *words.split()])
    recipe = resolve(translated.tree)
    assert recipe.objective.term_weights == weights
    assert any("older entries" in note for note in translated.notes) == (not words)


@pytest.mark.parametrize(("flag", "value"), [("beta", "0.2"), ("label_smoothing", "0.1")])
def test_other_flags_of_preference_training(flag, value):
    words = [*NEEDED[CHAT], f"--{flag}", value]
    recipe = resolve(finetune.translate(MPO, words).tree)
    assert getattr(recipe.objective, flag) == float(value)
    with pytest.raises(ConfigError, match="no flag of the original"):
        finetune.translate(CHAT, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [("--loss_type kto", "not one of sigmoid"), ("--use_packed_ds True", "not for preference")],
)
def test_refused_for_preference_training(words, message):
    with pytest.raises(ConfigError, match=message):
        finetune.translate(MPO, [*NEEDED[CHAT], *words.split()])


def test_what_the_checkpoint_decides_is_compared_with_it(tmp_path):
    (tmp_path / "model").mkdir()
    config = {"ps_version": "v1", "select_layer": -1, "vision_config": {"num_hidden_layers": 24}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    words = ["--model_name_or_path", "model", *NEEDED[CHAT][2:]]
    with pytest.raises(ConfigError, match="give --ps_version v1"):
        finetune.translate(CHAT, words, folder=tmp_path)
    words += ["--ps_version", "v1", "--freeze_backbone", "True", "--unfreeze_vit_layers", "20"]
    translated = finetune.translate(CHAT, words, folder=tmp_path)
    assert translated.tree["model"]["train_last_vision_blocks"] == 4


def test_shards_by_the_file_that_is_here(tmp_path):
    stated = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "mine.json").write_text(json.dumps(stated))
    words = [*NEEDED[CHAT], "--deepspeed", "mine.json"]
    parallel = finetune.translate(CHAT, words, folder=tmp_path).tree["parallel"]
    assert parallel == {"shard": "zero2", "offload": "cpu"}
    with pytest.raises(ConfigError, match="tells no stage"):
        finetune.translate(CHAT, [*NEEDED[CHAT], "--deepspeed", "gone.json"], folder=tmp_path)
