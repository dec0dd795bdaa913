"""One packed row, and what a model makes of it: for tests of how a model computes."""

import torch

from internvl.data.records import PackedBatch
from internvl.models.attention.packed import packed_mask
from internvl.models.chat.model import Supervision


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
