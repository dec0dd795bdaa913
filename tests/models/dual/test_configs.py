"""The configuration of InternVL-14B, from the original's form and back."""

import json

from dual_folders import dual_folder

from internvl.inference import load as loading
from internvl.models.dual import configs as dual_configs


def load(folder, **arguments):
    return loading.load(folder, device="cpu", dtype="float32", **arguments)


def test_the_configuration_goes_there_and_back(tmp_path):
    folder = dual_folder(tmp_path, num_query_token=8, cross_attention_frequency=2)
    stored = json.loads((folder / "config.json").read_text())
    written = dual_configs.to_official(load(folder).model.config)
    for part in ("", "vision_config", "qllama_config"):
        before, after = (c[part] if part else c for c in (stored, written))
        ours_alone = {"vision_hidden_size", "vision_config", "qllama_config", "drop_path_rate"}
        for key in set(before) - ours_alone - {"use_flash_attn"}:
            assert after[key] == before[key], key
    assert written["tie_word_embeddings"] is False
    assert written["qllama_config"]["tie_word_embeddings"] is False
    again = dual_configs.from_official(written)
    assert again.to_dict() == dual_configs.from_official(stored).to_dict()


def test_a_frequency_of_cross_attention_other_than_two_is_not_lost(tmp_path):
    config = json.loads((dual_folder(tmp_path) / "config.json").read_text())
    written = dual_configs.to_official(
        dual_configs.from_official(config | {"cross_attention_frequency": 3})
    )
    assert written["cross_attention_frequency"] == 3
    del config["cross_attention_frequency"]
    config["qllama_config"]["cross_attention_frequency"] = 4
    assert dual_configs.from_official(config).text_config.cross_attention_frequency == 4
