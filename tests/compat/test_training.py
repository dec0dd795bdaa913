"""Scripts and flags of the original become a recipe and the command that runs it."""

import pytest

from internvl.compat import training
from internvl.config.recipes import load_recipe
from internvl.errors import ConfigError

LORA = "shell/internvl2.0/2nd_finetune/internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora.sh"
FULL_14B = "shell/finetune/internvl_stage2_finetune_flickr_364_bs1024_ep10.sh"
FLAGS = [
    *("--model_name_or_path", "a/b", "--meta_path", "m.json", "--output_dir", "work/o"),
    *("--num_train_epochs", "1", "--lr_scheduler_type", "cosine"),
]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "GPUS", "PARTITION"):
        monkeypatch.delenv(name, raising=False)


def test_a_script_of_one_machine(tmp_path):
    done = training.translate_script([LORA], {"GPUS": "2"})
    assert done.file.name == "internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora.yaml"
    assert done.commands[0][:2] == ("train", str(done.file))
    done.file.parent.mkdir(parents=True)
    done.file.write_text(done.recipe)
    recipe = load_recipe(done.file)
    assert (recipe.global_batch, recipe.model.lora.rank) == (16, 16)
    # Beside the run, whose folder does not exist before it starts.
    assert done.file.with_suffix("") == recipe.run


def test_a_script_of_slurm():
    done = training.translate_script([FULL_14B], {"GPUS": "32", "PARTITION": "a b"})
    assert done.commands[0][:2] == ("launch", "train")
    words = " ".join(done.commands[0])
    assert "--nodes 4 --gpus-per-node 8 --partition a b --submit" in words
    # The default is of the authors' cluster.
    assert "--partition" not in training.translate_script([FULL_14B], {}).commands[0]
    assert training.translate_script([FULL_14B, "--here"], {}).commands[0][0] == "train"
    few = training.translate_script([FULL_14B], {"GPUS": "4"}).commands[0]
    assert few[few.index("--nodes") + 1] == "1"
    assert few[few.index("--gpus-per-node") + 1] == "4"
    here = training.translate_script([FULL_14B, "--here"], {"GPUS": "4"})
    assert here.commands[0][0] == "train"
    with pytest.raises(ConfigError, match="no whole number of nodes"):
        training.translate_script([FULL_14B], {"GPUS": "12"})


def test_overrides_and_a_dry_run():
    done = training.translate_script([LORA, "steps=2", "--dry-run"], {})
    assert (done.commands[0][-1], done.runs) == ("steps=2", False)
    with pytest.raises(ConfigError, match="wet: none of key=value, --flag value"):
        training.translate_script([LORA, "wet"], {})
    with pytest.raises(ConfigError, match="--wet: no flag of the original's scripts"):
        training.translate_script([LORA, "--wet"], {})
    with pytest.raises(ConfigError, match="did you mean optim.lr|optim.learning"):
        training.translate_script([LORA, "optim.learning=2"], {})


def test_flags_replace_those_of_a_script():
    words = ["--meta_path", "mine.json", "--bf16=True", "--max_dynamic_patch", "4", "steps=2"]
    done = training.translate_script([LORA, *words, "--dry-run"], {})
    assert "meta: mine.json" in done.recipe
    assert "max: 4" in done.recipe
    assert (done.commands[0][-1], done.runs) == ("steps=2", False)


def test_a_smaller_forward_pass_is_answered_by_what_needs_less_memory():
    small = {"PER_DEVICE_BATCH_SIZE": "1"}
    said = "PER_DEVICE_BATCH_SIZE=1: samples share rows of 4,096 tokens here"
    assert [note for note in training.translate_script([LORA], small).notes if said in note]
    # Pairs are encoded that many at a time.
    notes = training.translate_script([FULL_14B, "--here"], {**small, "GPUS": "32"}).notes
    assert not [note for note in notes if "share rows" in note]


def test_an_edited_copy_is_read_and_what_it_does_beside_is_listed(tmp_path):
    (tmp_path / "mine.sh").write_text(
        "module load cuda\nGPUS=${GPUS:-2}\n"
        "torchrun --nproc_per_node=$GPUS internvl/train/internvl_chat_finetune.py "
        + " ".join(FLAGS)
        + " --per_device_train_batch_size 3"
    )
    done = training.translate_script(["mine.sh"], {})
    assert "global_batch: 6" in done.recipe
    assert "line 1: module load cuda: not translated" in done.notes


def test_a_script_for_each_of_several_nodes():
    script = "internvl_chat_gpt_oss/shell/internvl3_5_qwen3/internvl3_5_8b_sft.sh"
    nodes = {"WORLD_SIZE": "4", "RANK": "1"}
    with pytest.raises(ConfigError, match="internvl launch RECIPE --nodes 4 --gpus-per-node 8"):
        training.translate_script([script], nodes)
    done = training.translate_script([script, "--dry-run"], nodes)
    assert "global_batch_rows: 512" in done.recipe


def test_no_such_script():
    with pytest.raises(ConfigError, match="there is no script gone.sh"):
        training.translate_script(["gone.sh"], {})
    with pytest.raises(ConfigError, match="did you mean internvl_chat/shell"):
        training.translate_script(["a/internvl2_5_1b_dynamic_res_2nd_finetune_fulll.sh"], {})


def test_flags_alone():
    done = training.translate_flags(FLAGS, {"GPUS": "2"})
    assert "global_batch: 16" in done.recipe
    under_torchrun = training.translate_flags(FLAGS, {"LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    assert "global_batch: 32" in under_torchrun.recipe
    assert under_torchrun.commands == (("train", "work/o.yaml"),)


def test_a_file_that_someone_else_has_written_stays(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/o.yaml").write_text("mine: 1\n")
    with pytest.raises(ConfigError, match="work/o.yaml: exists"):
        training.translate_flags(FLAGS, {})
    (tmp_path / "work/o.yaml").write_text(f"{training.HEAD} before\n")
    training.translate_flags(FLAGS, {})
