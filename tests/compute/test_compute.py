"""Placing, padding, reading ahead, recomputing: none of it changes what is trained."""

import threading
from dataclasses import replace

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, golden_folder, official_folder
from torch import nn
from transformers import LlamaConfig

from internvl.compute import backends, compilation, feeding, kernels, memory, placement
from internvl.config import ComputeConfig, DataConfig, LoraConfig
from internvl.data.records import PackedBatch
from internvl.errors import UserError
from internvl.inference import load as loading
from internvl.models.adapters import lora
from internvl.models.attention import packed
from internvl.models.attention.packed import BLOCK, packed_mask
from internvl.models.attention.per_document import DOCUMENTS
from internvl.models.chat.model import Supervision

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOURCES = [{"name": "x", "annotations": "x.jsonl"}]


@pytest.fixture
def model(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    return loading.load(
        folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32"
    ).model.train()


def row(length=30):
    ids = torch.randint(10, 400, (1, length), generator=torch.Generator().manual_seed(0))
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(length)[None] % 17,
        document=torch.arange(length) // 17,
        branch=torch.ones(length, dtype=torch.long),
        pixel_values=None,
        loss_positions=torch.arange(3, 12),
        targets=torch.arange(20, 29),
        loss_weights=torch.ones(9),
        names=("a", "b"),
    )


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    implementation = model.config.text_config._attn_implementation
    loss = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=packed_mask(implementation, batch.document, batch.branch, model.dtype),
        supervision=Supervision(batch.loss_positions, batch.targets, batch.loss_weights),
    ).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad for n, p in named if p.grad is not None}


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        # float32 sums in another order: the error is a share of the largest entry, not of each.
        allowed = 1e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=allowed, msg=name)


def test_trained_weights_are_float32_and_frozen_ones_compute(model):
    lora.select_trainable(model, ["multi_modal_projector"])
    placement.to_device(model, CPU, "bfloat16")
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    ("compute", "device", "lengths"),
    [
        ({}, CPU, ()),
        ({}, GPU, (640, 1024)),
        ({"attention": "dense", "compile": False}, GPU, ()),
        ({"attention": "flash"}, GPU, (640, 1024)),  # a plan needs no GPU
        ({"compile": True}, CPU, (640, 1024)),
    ],
)
def test_lengths_of_rows(compute, device, lengths):
    data = DataConfig(sources=SOURCES, max_tokens=500, row_tokens=1000)
    assert backends.row_lengths(ComputeConfig(**compute), device, data) == lengths
    assert all(length % BLOCK == 0 for length in lengths)


def test_flash_is_refused_where_it_is_not(model):
    with pytest.raises(UserError, match=r"pip install 'internvl\[flash\]'"):
        kernels.apply_compute(model, CPU, ComputeConfig(attention="flash"))


@pytest.mark.parametrize(
    ("heads", "kind"), [(8, packed.FLASH), (4, packed.FLASH), (16, packed.FLEX)]
)
def test_heads_of_other_sizes_are_left_to_flex(heads, kind):
    """A kernel of FlashAttention 4 did not compile for heads of 16."""
    text = LlamaConfig(hidden_size=512, num_attention_heads=heads)
    names = backends.attention_kernels("flash", text)
    assert names == {"text_config": kind, "vision_config": packed.TOWER}


def test_what_fails_to_compile_is_blamed_on_flash_alone(monkeypatch):
    with pytest.raises(TypeError, match="ours"), compilation.compiling(ComputeConfig(), CPU):
        raise TypeError("ours")
    monkeypatch.setattr(packed, "has_flash", lambda device: True)
    wanted = "as this torch calls it .no such argument.: .* compute.attention=flex"
    with pytest.raises(UserError, match=wanted), compilation.compiling(ComputeConfig(), GPU):
        raise TypeError("no such argument\nand more")


def test_a_row_takes_the_first_length_that_holds_it():
    padded = [len(feeding.pad(row(), lengths).document) for lengths in ((), (30,), (16, 40, 64))]
    assert padded == [30, 30, 40]
    assert feeding.pad(row(), (64,)).num_tokens == 30
    padding = feeding.pad(row(), (30 + 2 * BLOCK + 1,)).document[30:]
    assert padding.tolist() == [-1] * BLOCK + [-2] * BLOCK + [-3]


def test_padding_changes_neither_loss_nor_gradients(model):
    assert_same(
        loss_and_gradients(model, feeding.pad(row(), (64,))), loss_and_gradients(model, row())
    )


@pytest.mark.parametrize(("kind", "every"), [("full", 1), ("selective", 2)])
@pytest.mark.parametrize("with_lora", [True, False])
def test_recomputing_changes_nothing_and_leaves_frozen_parts_alone(model, kind, every, with_lora):
    lora.select_trainable(model, [] if with_lora else ["language_model"])
    if with_lora:
        lora.attach(model, LoraConfig(rank=4, dropout=0.0))
    wanted = loss_and_gradients(model, row())
    kernels.apply_compute(model, CPU, ComputeConfig(checkpointing=kind))
    decoders = model.model.language_model.layers
    chosen = [block.gradient_checkpointing for block in decoders]
    assert chosen == [i % every == 0 for i in range(len(decoders))]
    tower = model.model.vision_tower.encoder.layer
    assert not any(block.gradient_checkpointing for block in tower)
    embeds = model.get_input_embeddings()(row().input_ids)
    assert embeds.requires_grad is not with_lora  # transformers' own way makes it so for LoRA
    assert_same(loss_and_gradients(model, row()), wanted)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_offloading_changes_nothing(model, kind):
    wanted = loss_and_gradients(model, row())
    compute = ComputeConfig(checkpointing=kind, offload=True)
    kernels.apply_compute(model, CPU, compute)
    with memory.offloaded(model, CPU, compute):
        assert_same(loss_and_gradients(model, row()), wanted)


def test_what_is_offloaded_is_another_tensor_and_weights_are_not():
    layer = nn.Linear(64, 64)
    inputs = torch.randn(64, 64)
    wanted = inputs.sum(0)
    with memory.offloaded(layer, CPU, ComputeConfig(offload=True)):
        output = layer(inputs)
    inputs.zero_()  # what the graph keeps is not the input itself …
    output.sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], wanted)
    with memory.offloaded(layer, CPU, ComputeConfig(offload=True)):
        output = inputs.requires_grad_() @ layer.weight
    saved = output.grad_fn._saved_mat2
    assert saved.data_ptr() == layer.weight.data_ptr()  # … but a weight is


@pytest.mark.gpu
def test_offloading_frees_the_gpu(model):
    placement.to_device(model, GPU, "bfloat16")
    held = {}
    for offload in (False, True):
        compute = ComputeConfig(checkpointing="full", offload=offload, attention="dense")
        kernels.apply_compute(model, GPU, compute)
        batch = row(2048).to(GPU)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with placement.autocast(GPU, "bfloat16"), memory.offloaded(model, GPU, compute):
            mask = packed_mask("sdpa", batch.document, batch.branch, model.dtype)
            found = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=mask,
                supervision=Supervision(batch.loss_positions, batch.targets, batch.loss_weights),
            ).loss
        del mask
        held[offload] = torch.cuda.memory_allocated() - before
        found.backward()
        model.zero_grad(set_to_none=True)
    assert held[True] < held[False]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_train_the_same(model):
    wanted = loss_and_gradients(model, row())
    names = [*model.state_dict()]
    kernels.apply_compute(model, CPU, ComputeConfig(compile=True, loss_chunk=5))
    assert model.loss_chunk == 5
    assert [*model.state_dict()] == names
    assert_same(loss_and_gradients(model, row()), wanted)


def test_written_out_scores_train_the_same(model):
    wanted = loss_and_gradients(model, row())
    kernels.apply_compute(model, CPU, ComputeConfig(attention="eager"))
    parts = (model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == [DOCUMENTS, "eager"]
    assert_same(loss_and_gradients(model, row()), wanted)


def test_one_long_document_among_short_ones_is_not_taken_apart(model):
    """Twelve times 19 x 19 scores would be more than 30 x 30."""
    uneven = replace(row(), document=torch.cat([torch.zeros(19), torch.arange(1, 12)]).long())
    assert packed_mask(DOCUMENTS, row().document, row().branch, torch.float32).shape[0] == 2
    mask = packed_mask(DOCUMENTS, uneven.document, uneven.branch, torch.float32)
    assert mask.shape == (1, 1, 30, 30)
    wanted = loss_and_gradients(model, uneven)
    kernels.apply_compute(model, CPU, ComputeConfig(attention="eager"))
    assert_same(loss_and_gradients(model, uneven), wanted)


def test_attention_with_sinks_stays_its_own(tmp_path):
    folder = official_folder("GptOssForCausalLM", tmp_path)
    chat = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32")
    kernels.apply_compute(chat.model, CPU, ComputeConfig(attention="eager"))
    assert chat.model.config.text_config._attn_implementation == "eager"


class Doubled(nn.Module):
    def forward(self, inputs):
        return inputs * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing the compiler
def test_generation_runs_uncompiled():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    block = Doubled()
    block.compile(backend=backend)
    with compilation.uncompiled():
        block(torch.ones(2, 3))
    assert calls == []
    block(torch.ones(2, 3))
    assert len(calls) == 1


def test_the_next_item_is_made_while_one_is_worked_on():
    made = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for number, wait_s in feeding.prefetch(items()):
        assert wait_s >= 0
        if number < 2:
            assert made[number + 1].wait(10)
        seen.append(number)
    assert seen == [0, 1, 2]


def test_an_error_in_what_is_read_ahead_is_raised():
    def items():
        yield 1
        raise ValueError("bad line")

    found = feeding.prefetch(items())
    assert next(found)[0] == 1
    with pytest.raises(ValueError, match="bad line"):
        next(found)


def test_rows_come_in_order():
    rows = [replace(row(), names=(name,)) for name in "abc"]
    assert [r.names for r in feeding.prefetch_to_device(rows, CPU)] == [("a",), ("b",), ("c",)]
    assert list(feeding.prefetch_to_device([], CPU)) == []


@pytest.mark.gpu
def test_rows_come_in_order_to_a_gpu():
    rows = [feeding.pin(row(length)) for length in (20, 30, 40)]
    for given, found in zip(rows, feeding.prefetch_to_device(rows, GPU), strict=True):
        assert found.input_ids.is_cuda
        assert torch.equal(found.input_ids.cpu(), given.input_ids)
    assert list(feeding.prefetch_to_device([], GPU)) == []


def test_eager_attention_writes_scores_out() -> None:
    """Fused attention is off inside, and back on afterwards."""
    for kind, fused in (("eager", False), ("auto", True), ("dense", True)):
        with backends.math_attention(ComputeConfig(attention=kind)):
            assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert torch.backends.cuda.flash_sdp_enabled()
