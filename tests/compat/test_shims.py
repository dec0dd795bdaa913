"""Folders like the original's, with files that call this package."""

import json
import os
import subprocess

import pytest

from internvl.compat import scripts, shims
from internvl.config import DataConfig
from internvl.data.sources import source_configs
from internvl.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    shims.install([str(root)], {})
    return root


def test_every_script_of_the_original_is_there(root):
    for path in (*scripts.paths(), "internvl_chat/evaluate.sh", "internvl_g/evaluate.sh"):
        assert os.access(root / path, os.X_OK)
        assert shims.is_shim(root / path)
        assert len((root / path).read_text().splitlines()) == 3


def test_data_and_runs_of_one_guide_are_seen_from_its_other_folder(root):
    for name in ("data", "pretrained", "work_dirs"):
        assert (root / "clip_benchmark" / name).samefile(root / "internvl_g" / name)


@pytest.mark.parametrize(
    ("name", "samples"), [("coco_caption", 566_747), ("internvl_1_2_finetune", 1_267_819)]
)
def test_lists_of_data_sets(root, name, samples):
    meta = root / f"internvl_chat/shell/data/{name}.json"
    sources = source_configs(DataConfig(meta=meta))
    assert sum(source.num_samples for source in sources) == samples


def test_a_second_time_keeps_the_users_lists_and_files(root):
    custom = root / "internvl_chat/shell/data/internvl_1_2_finetune_custom.json"
    custom.write_text(json.dumps({"mine": {"root": "r", "annotation": "a", "length": 1}}))
    shims.install([str(root)], {})
    assert "mine" in custom.read_text()
    (root / "internvl_chat/evaluate.sh").write_text("echo mine\n")
    with pytest.raises(ConfigError, match="evaluate.sh: exists and is not from here"):
        shims.install([str(root)], {})
    (root / "internvl_chat/evaluate.sh").unlink()
    shims.install([str(root)], {})


def test_a_file_calls_the_package_with_its_own_name_and_words(root):
    line = "shell/head_finetune/internvl_stage2_finetune_coco_224_bs1024_ep5_head_4gpu.sh"
    command = f"GPUS=4 BATCH_SIZE=32 {line} --dry-run"
    done = subprocess.run(
        command, shell=True, cwd=root / "internvl_g", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "global_batch: 128" in done.stdout
    assert "WarmupDecayLR" in done.stderr
