"""The fast masks and kernels against the dense mask."""

import random

import pytest
import torch
import torch.nn.functional as F
from chat_folders import IMAGE_TOKEN_ID, golden_folder
from torch import nn
from torch._dynamo.utils import counters

from internvl.inference import load as loading
from internvl.models.attention import packed
from internvl.models.attention.packed import BLOCK
from internvl.models.attention.per_document import documents_forward, documents_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def structure(seed, blocks):
    """document and branch of a random row of `blocks` blocks, as the packer makes them."""
    rng, length = random.Random(seed), blocks * BLOCK
    document, branch = [], []
    number = 0
    while len(document) < length - 40:
        prefix = rng.choice([0, 0, 3, 90, 400])
        branches = rng.randint(1, 5) if prefix else 1
        sizes = [(0, prefix)] + [(b, rng.choice([1, 7, 60, 300])) for b in range(1, branches + 1)]
        for b, size in sizes:
            document += [number] * size
            branch += [b] * size
        number += 1
    document, branch = document[: length - 10] + [-1] * 10, branch[: length - 10] + [0] * 10
    document += [-1] * (length - len(document))
    branch += [0] * (length - len(branch))
    return torch.tensor(document), torch.tensor(branch)


@pytest.mark.parametrize("seed", range(20))
def test_one_number_per_key_is_the_whole_structure(seed):
    document, branch = structure(seed, blocks=6)
    last = packed.last_queries(document, branch)
    position = torch.arange(len(document))
    seen = (position[None] <= position[:, None]) & (position[:, None] <= last[None])
    assert torch.equal(seen, packed.dense_mask(document, branch)[0, 0])


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_listed_exactly(seed):
    document, branch = structure(seed, blocks=6)
    dense = packed.dense_mask(document, branch)[0, 0].view(6, BLOCK, 6, BLOCK).transpose(1, 2)
    some, every = dense.flatten(2).any(-1), dense.flatten(2).all(-1)
    mask = packed.block_mask(document, branch)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), some & ~every)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), every)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), (some & ~every).T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), every.T)


def listed(numbers, columns):
    table = torch.zeros(columns.shape[-2:], dtype=torch.bool)
    for row, (number, chosen) in enumerate(zip(numbers[0, 0], columns[0, 0], strict=True)):
        table[row, chosen[:number].long()] = True
    return table


class Module(nn.Module):
    num_key_value_groups = 2
    is_causal = True


FLEX = (packed.flex_forward, packed.block_mask)
DOCUMENTS = (documents_forward, documents_mask)


def attend(document, branch, device="cpu", requires_grad=False, fast=FLEX):
    """(fast, dense) outputs and, with `requires_grad`, gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, h, len(document), 16, generator=generator) for h in (4, 2, 2)]
    document, branch = document.to(device), branch.to(device)
    found = []
    for forward, mask in (fast, (packed.flex_forward, packed.dense_mask)):
        q, k, v = (t.to(device).requires_grad_(requires_grad) for t in tensors)
        mixed, _ = forward(Module(), q, k, v, mask(document, branch))
        found.append([mixed])
        if requires_grad:
            mixed.square().sum().backward()
            found[-1] += [q.grad, k.grad, v.grad]
    return zip(*found, strict=True)


@pytest.mark.parametrize("seed", range(4))
def test_documents_side_by_side_equal_dense(seed):
    rows = structure(seed, blocks=3)
    for documents, dense in attend(*rows, requires_grad=True, fast=DOCUMENTS):
        torch.testing.assert_close(documents, dense, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_flex_equals_dense(seed):
    for flex, dense in attend(*structure(seed, blocks=3)):
        torch.testing.assert_close(flex, dense, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(2))
def test_flex_gradients_equal_dense(seed):
    for flex, dense in attend(*structure(seed, blocks=3), device="cuda", requires_grad=True):
        torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-4)


def flash_or_skip():
    if not packed.has_flash(torch.device("cuda")):
        pytest.skip("FlashAttention 4 is not installed")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("width", [64, 128])
def test_flash_gradients_are_those_of_triton(seed, width):
    flash_or_skip()
    document, branch = (part.cuda() for part in structure(seed, blocks=3))
    mask = packed.block_mask(document, branch)
    found = []
    for backend in ("TRITON", "FLASH"):
        torch.manual_seed(seed)
        parts = [
            torch.randn(1, heads, len(document), width, device="cuda", dtype=torch.bfloat16)
            for heads in (4, 2, 2)
        ]
        for part in parts:
            part.requires_grad_()
        mixed, _ = packed.flex_forward(None, *parts, mask, backend=backend)
        mixed.float().square().sum().backward()
        found.append([mixed, *(part.grad for part in parts)])
    for triton, flash in zip(*found, strict=True):
        assert (triton - flash).float().norm() < 0.01 * triton.float().norm()


def documents_alone(seed, blocks):
    """document and branch of a row without branches, and where its documents start."""
    document, _ = structure(seed, blocks)
    sizes = torch.unique_consecutive(document, return_counts=True)[1]
    return document, torch.zeros_like(document), F.pad(sizes.cumsum(0), (1, 0)).int()


def starts_mask(starts):
    return packed.packed_mask(packed.FLASH, starts, starts, torch.bfloat16, starts)


def test_starts_take_the_place_of_blocks_in_16_bits():
    document, branch, starts = documents_alone(0, blocks=2)
    mask = starts_mask(starts)
    assert mask.shape == (1, 1, 1, len(starts))
    assert torch.equal(mask[0, 0, 0], starts)
    wide = packed.packed_mask(packed.FLASH, document, branch, torch.float32, starts)
    assert wide.seq_lengths == (256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        kept = packed.packed_mask(packed.FLASH, document, branch, torch.float32, starts)
    assert torch.equal(kept, mask)
    for kind in ("sdpa", packed.FLEX):
        other = packed.packed_mask(kind, document, branch, torch.bfloat16, starts)
        assert other.shape[-2:] == (256, 256)


@pytest.mark.parametrize("seed", range(3))
def test_documents_by_their_starts_equal_dense(seed):
    document, branch, starts = documents_alone(seed, blocks=3)
    fast = (packed.flex_forward, lambda *_: starts_mask(starts))
    for found, dense in attend(document, branch, requires_grad=True, fast=fast):
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=2e-5)


def test_any_number_of_documents_is_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(packed.flex_forward, dynamic=False, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    for ends in ([40], [7, 40], [1, 2, 9, 33, 40]):
        parts = [torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2)]
        mask = starts_mask(torch.tensor([0, *ends], dtype=torch.int32))
        found, wanted = (
            kernel(Module(), *parts, mask)[0] for kernel in (compiled, packed.flex_forward)
        )
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
    assert counters["stats"]["unique_graphs"] == before + 1


def attended(kernel, parts, *arguments):
    """Output and gradients of queries, keys and values, for a gradient that is not constant."""
    parts = [part.detach().requires_grad_() for part in parts]
    mixed, _ = kernel(None, *parts, *arguments)
    mixed.float().square().sum().backward()
    return [mixed.detach(), *(part.grad for part in parts)]


def assert_within(found, wanted, share=0.01):
    for one, other in zip(found, wanted, strict=True):
        one, other = one.float().cpu(), other.float().cpu()
        assert (one - other).norm() < share * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("seed", [0, 1])
def test_flash_over_documents(seed, width):
    flash_or_skip()
    _, _, starts = documents_alone(seed, blocks=3)
    mask = starts_mask(starts)
    parts = [torch.randn(1, h, int(starts[-1]), width, dtype=torch.bfloat16) for h in (4, 2, 2)]
    wanted = attended(packed.flex_forward, parts, mask)
    on_gpu = [part.cuda() for part in parts]
    for kernel in (packed.flex_forward, torch.compile(packed.flex_forward)):
        assert_within(attended(kernel, on_gpu, mask.cuda()), wanted)


def tiles(width):
    return [torch.randn(3, 4, 321, width, dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("width", [64, 128])
def test_tiles_by_the_operator_equal_torchs_own(width):
    parts = tiles(width)
    wanted = attended(
        lambda _, *parts: (F.scaled_dot_product_attention(*parts).transpose(1, 2), None),
        [part.float() for part in parts],
    )
    assert_within(attended(packed.tower_forward, parts), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_flash_over_whole_tiles(width):
    flash_or_skip()
    parts = tiles(width)
    wanted = attended(packed.tower_forward, parts)
    on_gpu = [part.cuda() for part in parts]
    for kernel in (packed.tower_forward, torch.compile(packed.tower_forward)):
        assert_within(attended(kernel, on_gpu), wanted)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 16)])
def test_a_tower_in_float32_or_of_other_heads_keeps_its_attention(dtype, width):
    parts = [torch.randn(2, 2, 9, width, dtype=dtype, requires_grad=True) for _ in range(3)]
    layer = torch.nn.Module()
    layer.is_causal = False
    found, _ = packed.tower_forward(layer, *parts)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*parts).transpose(1, 2))


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a row of 130 tokens; FlexAttention takes multiples of"):
        packed.block_mask(torch.zeros(130).long(), torch.ones(130).long())


def test_the_mask_of_each_implementation():
    document, branch = structure(0, blocks=2)
    dense = packed.dense_mask(document, branch)
    assert torch.equal(packed.packed_mask("sdpa", document, branch, torch.float32), dense)
    added = packed.packed_mask("eager", document, branch, torch.float32)
    assert torch.equal(added == 0, dense)
    assert added.min() == torch.finfo(torch.float32).min
    for kind in (packed.FLEX, packed.FLASH):
        blocks = packed.packed_mask(kind, document, branch, torch.float32)
        assert blocks.seq_lengths == (256, 256)


@torch.no_grad()
def test_a_model_with_flex_computes_and_answers_the_same(tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    model = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32").model
    document, branch = structure(1, blocks=3)
    ids = torch.randint(10, 400, (1, len(document)), generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": ids[:, :9], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    wanted = model(input_ids=ids, attention_mask=packed.dense_mask(document, branch)).logits
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    packed.register()
    model.set_attn_implementation({"text_config": packed.FLEX})
    assert model.config.vision_config._attn_implementation == "sdpa"
    found = model(input_ids=ids, attention_mask=packed.block_mask(document, branch)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999999
    again = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, answer)


@pytest.mark.parametrize("case", ["chat_qwen2", "chat_internlm2"])
def test_a_model_that_is_told_where_documents_start(case, tmp_path):
    folder = golden_folder(case, "v2.sel-1", tmp_path)
    model = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32").model
    document, branch, starts = documents_alone(1, blocks=2)
    ids = torch.randint(10, 400, (1, len(document)), generator=torch.Generator().manual_seed(0))
    packed.register()
    found = []
    for kind, mask in (
        ("sdpa", packed.dense_mask(document, branch)),
        (packed.FLASH, starts_mask(starts)),
    ):
        model.set_attn_implementation({"text_config": kind})
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@torch.no_grad()
@pytest.mark.parametrize("case", ["chat_qwen2", "chat_internlm2"])
def test_float32_weights_under_autocast(case, tmp_path):
    """Rotated queries and keys come in float32 then, values in bfloat16."""
    folder = golden_folder(case, "v2.sel-1", tmp_path)
    model = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32").model
    document, branch = structure(1, blocks=2)
    ids = torch.randint(10, 400, (1, len(document)), generator=torch.Generator().manual_seed(0))
    found = []
    packed.register()
    for kind in ("sdpa", packed.FLEX):
        model.set_attn_implementation({"text_config": kind})
        mask = packed.packed_mask(kind, document, branch, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(input_ids=ids, attention_mask=mask).logits.float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
