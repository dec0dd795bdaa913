"""last_mlp: the last MLP sees supervised positions alone, and neither loss nor gradients notice."""

import pytest
import torch
from small_models import small_model
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from internvl.compute import compilation, kernels, memory, placement
from internvl.config import ComputeConfig
from internvl.data.records import PackedBatch
from internvl.models.adapters import fused_lora
from internvl.models.kernels import last_mlp
from internvl.models.modules import replace_module
from internvl.objectives import packed_loss

CPU = torch.device("cpu")
FULL = ("vision_tower", "multi_modal_projector", "language_model")
FITTING = ("InternVL2-2B", "InternVL2-1B", "InternVL3_5-8B")  # Llama, Qwen2, Qwen3
OTHERS = ("InternVL2-4B", "InternVL3_5-30B-A3B")  # Phi3, and a mixture of experts


def made(name="InternVL2-2B", rank=None, layers=2, dtype="float32", **sizes):
    """A model that trains whole, or adapters that already do something."""
    torch.manual_seed(0)
    text = {"num_hidden_layers": layers, **sizes}
    model = small_model(name, () if rank else FULL, rank, dtype=dtype, sizes={"text": text})
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def row(supervised=9, tiles=2):
    """Two documents of a prefix and two answers each, 80 tokens; both answers start from its end,
    so that its position is there twice."""
    torch.manual_seed(1)
    lengths = (20, 12, 8)
    ids = torch.randint(10, 400, (80,))
    ids[2 : 2 + 4 * tiles] = 3  # placeholders
    document = torch.arange(2).repeat_interleave(40)
    branch = torch.arange(3).repeat_interleave(torch.tensor(lengths)).repeat(2)
    place = torch.cat([torch.arange(32), torch.arange(20, 28)]).repeat(2)
    positions = torch.tensor([19, 20, 21, 19, 32, 59, 60, 59, 78])[:supervised]
    return PackedBatch(
        input_ids=ids[None],
        position_ids=place[None],
        document=document,
        branch=branch,
        pixel_values=torch.randint(0, 255, (tiles, 3, 56, 56), dtype=torch.uint8)
        if tiles
        else None,
        loss_positions=positions,
        targets=torch.randint(10, 400, (len(positions),)),
        loss_weights=torch.linspace(0.1, 1, 9)[:supervised],
        names=("a", "b"),
    )


def loss_of(model, batch):
    return packed_loss.summed_loss(model, batch, "imagenet")


def run(model, batch, compute=None):
    """(loss, gradients by name)."""
    model.zero_grad(set_to_none=True)
    with memory.offloaded(model, CPU, compute or ComputeConfig()):
        loss = loss_of(model, batch)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, allowed=3e-6):
    torch.testing.assert_close(found[0], wanted[0], rtol=allowed, atol=0)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        # A bias of the keys changes no attention: its gradient is rounding.
        scale = gradient.norm() if "k_proj.bias" not in name else gradient.norm() + 1
        assert float((found[1][name] - gradient).norm()) <= allowed * float(scale), name


def seen(model):
    """How many tokens every MLP of the language model is given, in order, from now on."""
    found = []
    for block in model.model.language_model.layers:
        block.mlp.register_forward_hook(lambda m, given, out: found.append(given[0].shape[1]))
    return found


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", FITTING)
def test_loss_and_gradients_stay(name, rank, checkpointing):
    model = made(name, rank, layers=3)
    wanted = run(model, row())
    names = [*model.state_dict()]
    kernels.apply_compute(model, CPU, ComputeConfig(checkpointing=checkpointing))
    assert [n for n in model.state_dict() if n in set(names)] == names
    assert_same(run(model, row()), wanted)


@pytest.mark.parametrize("name", FITTING)
def test_the_last_mlp_sees_supervised_positions_alone(name):
    model = made(name)
    kernels.apply_compute(model, CPU, ComputeConfig())
    found = seen(model)
    loss_of(model, row())
    assert found == [80, 9]
    found.clear()
    model(input_ids=row(tiles=0).input_ids)
    assert found == [80, 80]


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_stay_as_they_are(name):
    model = made(name)
    before = [type(block) for block in model.model.language_model.layers]
    kernels.apply_compute(model, CPU, ComputeConfig())
    assert [type(block) for block in model.model.language_model.layers] == before
    assert not any(last_mlp.supports(block) for block in model.model.language_model.layers)
    assert loss_of(model, row()).detach() > 0


@pytest.mark.parametrize("supervised", [0, 1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_few_positions_and_one_block(supervised, layers):
    model = made(rank=8, layers=layers)
    wanted = run(model, row(supervised, tiles=0))
    kernels.apply_compute(model, CPU, ComputeConfig(checkpointing="full"))
    found = seen(model)
    assert_same(run(model, row(supervised, tiles=0)), wanted)
    assert found[layers - 1] == supervised


def test_offloaded_it_is_the_same():
    model = made(rank=8)
    wanted = run(model, row())
    compute = ComputeConfig(offload=True)
    kernels.apply_compute(model, CPU, compute)
    assert_same(run(model, row(), compute), wanted)


def test_float8_products_are_the_same():
    """A token is rounded by itself, so those that are left out do not matter. None is there twice:
    its gradient would be rounded in two parts."""
    model = made(rank=8, dtype="bfloat16")
    kernels.apply_compute(model, CPU, ComputeConfig(float8=True))
    blocks = model.model.language_model.layers
    with placement.autocast(CPU, "bfloat16"):
        found = run(model, row(supervised=3))
        replace_module(blocks, str(len(blocks) - 1), LlamaDecoderLayer)
        wanted = run(model, row(supervised=3))
    assert_same(found, wanted, allowed=1e-2)


def test_what_is_computed_again_sees_the_positions_of_its_own_row():
    model = made(rank=8)
    alone = [run(model, row(supervised)) for supervised in (9, 4)]
    kernels.apply_compute(model, CPU, ComputeConfig(checkpointing="full"))
    model.zero_grad(set_to_none=True)
    losses = [loss_of(model, row(supervised)) for supervised in (9, 4)]
    model(input_ids=row(tiles=0).input_ids)
    sum(losses).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    summed = {name: gradient + alone[1][1][name] for name, gradient in alone[0][1].items()}
    assert_same((sum(losses).detach(), found), (alone[0][0] + alone[1][0], summed))


def test_answers_and_evaluated_losses_stay():
    model = made(rank=8).eval()
    fused_lora.fuse(model)
    ids = row(tiles=0).input_ids
    with torch.no_grad():
        logits, loss = model(input_ids=ids).logits, loss_of(model, row())
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
        last_mlp.enable(model.model.language_model.layers)
        assert torch.equal(model(input_ids=ids).logits, logits)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
        assert torch.equal(again, answer)
        torch.testing.assert_close(loss_of(model, row()), loss, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_it_is_the_same_and_any_number_runs_the_same_code():
    model = made(rank=8, layers=1)
    numbers = (1, 9, 0, 2, 4)
    wanted = [run(model, row(number)) for number in numbers]
    torch._dynamo.reset()
    kernels.apply_compute(model, CPU, ComputeConfig(compile=True))
    graphs = []
    with compilation.tracing():
        for number, expected in zip(numbers, wanted, strict=True):
            assert_same(run(model, row(number)), expected)
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
