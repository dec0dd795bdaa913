"""Each rank reads its own rows: every shard equals that of a model loaded whole, bit for bit."""

import json

import pytest
import tiny_run
from chat_folders import add_tokenizer, official_folder, official_lora_folder, prompt_folder
from dual_folders import dual_folder
from part_folders import split
from ranks import run_ranks

from internvl import export, train
from internvl.config import recipes

LOAD = """
import json
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from internvl import dist
from internvl.compute import placement
from internvl.config import recipes
from internvl.inference import load as loading

dist.init_from_env("cpu")
mesh = init_device_mesh("cpu", (dist.world_size(),))

def shard(model):
    blocks = [*model.model.vision_tower.encoder.layer, *model.model.language_model.layers]
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)

for tree in json.loads(r'''TREES'''):
    recipe = recipes.resolve(tree)
    torch.manual_seed(recipe.seed)
    whole = loading.for_training(recipe).model
    after = torch.get_rng_state()
    placement.to_device(whole, torch.device("cpu"), recipe.dtype)
    torch.manual_seed(recipe.seed)
    model = loading.for_training(recipe, shard=shard).model
    if recipe.model.lora is not None:
        assert torch.equal(after, torch.get_rng_state()), "another state of the random numbers"
    expected = dict(whole.named_parameters())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys(), parameters.keys() ^ expected.keys()
    num_sharded = 0
    for name, parameter in parameters.items():
        values, local = expected[name], parameter
        assert parameter.requires_grad == values.requires_grad, name
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, mesh, parameter.placements
            )
            values = values[offset[0] : offset[0] + shape[0]] if shape[0] else values[:0]
            num_sharded += local.numel() < parameter.numel()
        assert local.dtype == values.dtype and torch.equal(local, values), name
    buffers = dict(whole.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    embeddings = model.get_input_embeddings().weight
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is embeddings
    print(num_sharded > 0.9 * len(parameters))
"""
DATA = {"sources": [{"name": "none", "annotations": "none.jsonl"}], "max_tokens": 512}


def tree(model, **changes):
    data = DATA | {"tiles": {"size": 84, "max": 1, "thumbnail": False}, "template": "Hermes-2"}
    tree = {"model": model, "data": data, "run": "none", "global_batch": 8, "steps": 1}
    return tree | {"dtype": "bfloat16", "device": "cpu"} | changes


@pytest.mark.slow
def test_shards_of_two_ranks_equal_the_whole_model(tmp_path):
    folder = prompt_folder("internlm2.internlm2-chat", tmp_path / "internlm2")
    hf = export.run(str(folder), tmp_path / "hf", verify=False)
    tied = prompt_folder("qwen2.Hermes-2", tmp_path / "qwen2")
    vision, language, _, _ = split(tmp_path / "parts")
    parts = {"vision": str(vision), "language": str(language), "template": "Hermes-2"}
    lora = {"rank": 4, "on": ["language_model", "vision_tower"], "dropout": 0.1}
    moe = add_tokenizer(official_folder("Qwen3MoeForCausalLM", tmp_path / "moe"), "qwen2")
    adapted = add_tokenizer(official_lora_folder(tmp_path / "adapted")[0], "internlm2")
    dual = {"id": str(dual_folder(tmp_path / "dual")), "train": ["heads"]}
    trees = [
        tree({"id": str(folder), "train": ["language_model"]}),
        tree({"id": str(hf), "train": ["multi_modal_projector"], "lora": lora}),
        tree({"id": str(tied), "lora": lora, "train": []}),
        tree(parts | {"train": ["vision_tower", "multi_modal_projector", "language_model"]}),
        tree({"id": str(moe)}),
        tree({"id": str(adapted), "train": ["lm_head"]}),
        tree(dual, data=DATA, objective={"name": "retrieval"}),
    ]
    ranks = run_ranks(LOAD.replace("TREES", json.dumps(trees)))
    assert [rank.split() for rank in ranks] == [["True"] * len(trees)] * 2


@pytest.mark.slow
def test_shards_of_a_run_equal_its_weights_with_adapters_merged(tmp_path):
    project = tiny_run.make(tmp_path / "project")
    adapted = ["model.train=[multi_modal_projector]", "model.lora={rank: 4}", "steps=1"]
    run = train.run(recipes.load_recipe(project, [*adapted, f"run={tmp_path / 'run'}"]))
    data = DATA | {"tiles": {"size": 64, "max": 1, "thumbnail": False}}
    trees = [tree({"id": str(run), "train": ["language_model"]}, data=data)]
    trees.append(tree({"id": str(run / "adapter"), "train": ["language_model"]}, data=data))
    trees.append(tree({"id": str(run), "train": [], "lora": {"rank": 2}}, data=data))
    ranks = run_ranks(LOAD.replace("TREES", json.dumps(trees)))
    assert [rank.split() for rank in ranks] == [["True"] * len(trees)] * 2
