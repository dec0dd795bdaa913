"""The name table: fused tensors come apart as the original lays them out, and go back."""

import pytest
import torch
from chat_folders import ARCHITECTURES, IMAGE_TOKEN_ID, golden_folder, official_folder
from safetensors.torch import load_file

from internvl.errors import ModelFolderError
from internvl.models import hub, keys
from internvl.models.chat import model as chat_model
from internvl.models.tensors import LazyTensor


def lazy(tensor):
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_internlm2_rows_are_grouped_by_key_head():
    """row(h, s, e) = h (g + 2) d + s d + e; s < g is query h g + s, then the key, the value."""
    heads, kv_heads, d = 6, 2, 4
    group = heads // kv_heads
    rows = torch.arange((heads + 2 * kv_heads) * d)
    q, k, v = keys.Interleaved(heads, kv_heads).to_ours([rows])
    for h in range(kv_heads):
        for e in range(d):
            for s in range(group):
                assert q[(h * group + s) * d + e] == h * (group + 2) * d + s * d + e
            assert k[h * d + e] == h * (group + 2) * d + group * d + e
            assert v[h * d + e] == h * (group + 2) * d + (group + 1) * d + e


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (keys.Thirds(), [(12, 5)]),
        (keys.Thirds(), [(12,)]),
        (keys.Interleaved(6, 2), [(40, 5)]),
        (keys.Interleaved(4, 4), [(48,)]),
        (keys.Experts(), [(3, 5)] * 8),
        (keys.Stack(), [(3, 5)] * 4),
        (keys.Rename(), [(3,)]),
    ],
)
def test_changes_go_there_and_back(change, shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    back = change.to_official(change.to_ours(tensors))
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    assert all(part.is_contiguous() for part in change.to_ours(tensors))


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (keys.Thirds(), [(12, 5)]),
        (keys.Interleaved(6, 2), [(40, 5)]),
        (keys.Interleaved(4, 4), [(48,)]),
        (keys.Experts(), [(3, 5)] * 8),
        (keys.Stack(), [(3, 5)] * 4),
        (keys.Rename(), [(7,)]),
    ],
)
def test_rows_are_read_without_the_others(change, shapes):
    """Every slice of every tensor, from as many rows of the file as it has."""
    tensors = [torch.randn(shape) for shape in shapes]
    num_read = 0

    def counted(tensor):
        def rows(start, stop):
            nonlocal num_read
            num_read += (stop - start) * tensor[0].numel()
            return tensor[start:stop]

        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: rows(0, len(tensor)), rows)

    sources = [counted(tensor) for tensor in tensors]
    for index, whole in enumerate(change.to_ours(tensors)):
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1):
                num_read = 0
                assert torch.equal(change.rows(sources, index, start, stop), whole[start:stop])
                assert num_read == whole[start:stop].numel()


def test_rows_of_a_transposed_matrix():
    matrix = torch.randn(5, 7)
    rows = keys.Transpose().rows([lazy(matrix)], 0, 2, 6)
    assert torch.equal(rows, keys.Transpose().to_ours([matrix])[0][2:6])


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", *ARCHITECTURES])
def test_every_name_has_one_place(architecture, tmp_path):
    if architecture == "InternLM2ForCausalLM":
        folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    else:
        folder = official_folder(architecture, tmp_path)
    config = chat_model.read_config(hub.open_folder(folder), IMAGE_TOKEN_ID)
    names = chat_model.empty_model(config).state_dict()
    groups = keys.groups(config, names)
    official = [name for group in groups for name in group.official]
    assert sorted(official) == sorted(load_file(folder / "model.safetensors"))
    ours = [name for group in groups for name in group.ours]
    assert sorted(ours) == sorted(names)


def test_a_name_without_a_rule_is_an_error(tmp_path):
    config = chat_model.read_config(
        hub.open_folder(golden_folder("chat_internlm2", "v2.sel-1", tmp_path)), IMAGE_TOKEN_ID
    )
    with pytest.raises(ModelFolderError, match="no official name for the weight model.adapter"):
        keys.groups(config, ["model.adapter.weight"])


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.embeddings.cls_token", "model.vision_tower.embeddings.cls_token"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_hf_names_of_every_version(stored, ours):
    assert keys.hf_to_ours(stored) == ours
    assert keys.hf_to_ours(keys.ours_to_hf(ours)) == ours


def test_nothing_is_read_before_it_is_used(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    source = hub.open_folder(folder)
    config = chat_model.read_config(source, IMAGE_TOKEN_ID)
    read = []
    stored = {
        name: LazyTensor(t.shape, t.dtype, lambda name=name, t=t: (read.append(name), t.read())[1])
        for name, t in source.tensors.items()
    }
    renamed = keys.official_to_ours(config, chat_model.empty_model(config).state_dict(), stored)
    assert read == []
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    assert renamed.tensors[name].shape == (32, 64)
    assert renamed.tensors[name].read().shape == (32, 64)
    assert read == ["language_model.model.layers.0.attention.wqkv.weight"]


def test_adapters_are_taken_apart():
    stored = {
        "language_model.base_model.model.output.weight": torch.zeros(1),
        "language_model.base_model.model.model.layers.0.attention.wo.base_layer.weight": torch.ones(
            1
        ),
        "language_model.base_model.model.model.layers.0.attention.wo.lora_A.default.weight": (
            torch.zeros(2, 3)
        ),
        "language_model.base_model.model.model.layers.0.attention.wo.lora_B.default.weight": (
            torch.zeros(3, 2)
        ),
        "mlp1.1.bias": torch.zeros(1),
    }
    parts = keys.split_adapters({name: lazy(tensor) for name, tensor in stored.items()})
    assert set(parts.base) == {
        "language_model.output.weight",
        "language_model.model.layers.0.attention.wo.weight",
        "mlp1.1.bias",
    }
    (module,) = parts.adapters
    assert module == "language_model.model.layers.0.attention.wo"
    assert [half.shape for half in parts.adapters[module]] == [(2, 3), (3, 2)]
