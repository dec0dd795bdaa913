"""The original's training scripts as data."""

from pathlib import Path

import pytest

from internvl.compat import finetune, scripts, shell
from internvl.config.recipes import resolve
from internvl.errors import ConfigError

# Multi-node scripts expect these of their cluster.
NODES = {"WORLD_SIZE": "8", "RANK": "0"}
CHAT = "internvl_chat/shell"


def launch(path, **variables):
    return shell.read(scripts.text(path), variables, name=path)


def recipe(path, **variables):
    start = launch(path, **variables)
    gpus, environment = start.num_gpus, start.environment
    return resolve(
        finetune.translate(start.entry, start.flags, num_gpus=gpus, environment=environment).tree
    )


def test_every_script_has_a_recipe():
    recipes = {path: recipe(path, **NODES) for path in scripts.paths()}
    assert len(recipes) == 127
    assert sum(made.objective.name == "mpo" for made in recipes.values()) == 24


@pytest.mark.parametrize(
    ("path", "lr"),
    [
        (f"{CHAT}/internvl3.0/mpo/internvl3_8b_mpo.sh", 2e-7),
        (f"{CHAT}/internvl2.5_mpo/preference_optimization/"
         "internvl2_5_8b_internlm2_5_7b_dynamic_res_mpo.sh", 1e-6),
        ("internvl_chat_gpt_oss/shell/internvl3_5_qwen3/internvl3_5_8b_mpo.sh", 2e-7),
    ],
    ids=["3.0", "2.5", "3.5"],
)  # fmt: skip
def test_preference_scripts(path, lr):
    made = recipe(path, **NODES)
    assert made.objective.term_weights == {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
    assert (made.objective.beta, made.global_batch, made.optim.lr) == (0.1, 256, lr)
    assert made.data.row_tokens == 2 * made.data.max_tokens


# Of the published tables: GPUs, samples of a step, learning rate, rank of adapters.
@pytest.mark.parametrize(
    ("path", "gpus", "batch", "lr", "rank"),
    [
        ("internvl2.0/2nd_finetune/internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco",
         8, 512, 4e-5, 128),
        ("internvl2.5/2nd_finetune/internvl2_5_78b_dynamic_res_2nd_finetune_full",
         32, 128, 2e-5, None),
        ("internvl1.2/hermes2_yi34b/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune",
         64, 512, 1e-5, None),
        ("internvl3.0/2nd_finetune/internvl3_1b_dynamic_res_2nd_finetune_full",
         8, 128, 1e-5, None),
    ],
)  # fmt: skip
def test_values_of_chat_scripts(path, gpus, batch, lr, rank):
    path = f"{CHAT}/{path}.sh"
    made = recipe(path)
    assert launch(path).num_gpus == gpus
    assert (made.global_batch, made.optim.lr) == (batch, lr)
    assert (made.model.lora and made.model.lora.rank) == rank


def test_rows_of_packed_scripts():
    made = recipe(f"{CHAT}/internvl2.5/stage2/internvl2_5_8b_internlm2_5_7b_dynamic_res_stage2.sh")
    assert (made.global_batch_rows, made.steps, made.data.packing) == (512, 5_500, "official")
    assert (made.data.row_tokens, made.data.max_tiles) == (16_384, 48)
    assert (made.objective.weighting, made.objective.loss_normalization) == ("square", "global")


@pytest.mark.parametrize("name", ["flickr", "flickrcn", "coco"])
def test_scripts_of_internvl_14b(name):
    epochs = 5 if name == "coco" else 10
    full = f"finetune/internvl_stage2_finetune_{name}_364_bs1024_ep{epochs}.sh"
    head = f"head_finetune/internvl_stage2_finetune_{name}_224_bs1024_ep{epochs}_head_4gpu.sh"
    lora = f"lora_finetune/internvl_stage2_finetune_{name}_224_bs1024_ep{epochs}_lora16_4gpu.sh"
    sizes = {full: (1024, 364), head: (128, 224), lora: (128, 224)}
    for path, (batch, size) in sizes.items():
        made = recipe(f"internvl_g/shell/{path}")
        assert (made.global_batch, made.data.tiles.size, made.epochs) == (batch, size, epochs)


def test_chat_v1_2_has_the_released_models_pixel_shuffle():
    path = f"{CHAT}/internvl1.2/hermes2_yi34b/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune.sh"
    made = recipe(path, GPUS="32", PER_DEVICE_BATCH_SIZE="8")
    assert (made.model.ps_version, made.global_batch, made.parallel.shard) == ("v1", 512, "zero3")
    assert launch(path, GPUS="32").num_nodes == 4


def test_variables_of_the_caller_replace_defaults():
    path = (
        "internvl_g/shell/head_finetune/internvl_stage2_finetune_coco_224_bs1024_ep5_head_4gpu.sh"
    )
    assert recipe(path, GPUS="2", BATCH_SIZE="16").global_batch == 32


def test_more_gpus_than_samples_of_a_step_are_refused():
    path = f"{CHAT}/internvl2.0/2nd_finetune/internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_"
    with pytest.raises(ConfigError, match="give BATCH_SIZE=32 or more"):
        recipe(f"{path}lora.sh", GPUS="8")


@pytest.mark.parametrize(
    ("typed", "folder", "path"),
    [
        ("shell/internvl2.5/2nd_finetune/internvl2_5_1b_dynamic_res_2nd_finetune_full.sh", "x",
         "internvl_chat/shell/internvl2.5/2nd_finetune/"
         "internvl2_5_1b_dynamic_res_2nd_finetune_full.sh"),
        ("./shell/finetune/internvl_stage2_finetune_flickr_364_bs1024_ep10.sh", "internvl_g",
         "internvl_g/shell/finetune/internvl_stage2_finetune_flickr_364_bs1024_ep10.sh"),
        ("/home/me/internvl_g/shell/finetune/internvl_stage2_finetune_coco_364_bs1024_ep5.sh", "x",
         "internvl_g/shell/finetune/internvl_stage2_finetune_coco_364_bs1024_ep5.sh"),
        ("mine.sh", "internvl_chat", None),
    ],
)  # fmt: skip
def test_a_script_by_its_path(typed, folder, path):
    assert scripts.locate(typed, Path("/somewhere") / folder) == path


def test_the_nearest_script_and_no_script():
    near = "internvl_stage2_finetune_coco_364_bs1024_ep10.sh"
    assert scripts.nearest(near).endswith("internvl_stage2_finetune_coco_364_bs1024_ep5.sh")
    with pytest.raises(ConfigError, match="no script"):
        scripts.text("x.sh")
