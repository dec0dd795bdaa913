"""FlashAttention 4's kernels as an operator with a gradient, which compiled blocks can call.

Whole tiles, (N, T, heads, width), or a row of documents one after the other, (L, heads, width),
each attending to itself alone; keys and values may have fewer heads. flash-attn-4 has no operators
of its own: the functions called here are private ones of a beta, which torch.nn.attention calls as
well. All calls are in this file, and pyproject.toml pins the version. On a CPU the same is
computed in plain float32, which the kernels are compared with.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""Types the kernels take."""

WIDTHS = (64, 128)
"""Head sizes they are used for and were tested with; at 16 one did not compile."""

_LIBRARY = torch.library.Library("internvl", "FRAGMENT")
_LIBRARY.define(
    "flash(Tensor q, Tensor k, Tensor v, Tensor? starts, bool causal, float scale) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "flash_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? starts, bool causal, float scale) -> (Tensor, Tensor, Tensor)"
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, *, causal: bool, scale: float
) -> Tensor:
    """Attention output: shape and dtype of `q`, contiguous.

    Args:
        q, k, v: (N, T, heads, width), or (L, heads, width) with `starts`.
        starts: int32 (D + 1,), first token of each document of a row, and the row's length.
        causal: True if a query sees only its own key and earlier ones.
    """
    return torch.ops.internvl.flash(q, k, v, starts, causal, scale)[0]


def installed() -> bool:
    """True if the package is installed, which does not mean that it imports."""
    return find_spec("flash_attn") is not None


@torch.library.impl(_LIBRARY, "flash", "CUDA")
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    documents = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    # The log-sum-exp is what the backward pass needs; by default it is not computed.
    options = {"softmax_scale": scale, "causal": causal, "return_lse": True}
    out, lse = _flash_attn_fwd(q, k, v, **documents, **options)
    return out, lse


@torch.library.impl(_LIBRARY, "flash_backward", "CUDA")
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    # Contiguous whatever the strides of q, k and v, as the fake implementation below says.
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    documents = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    options = {"softmax_scale": scale, "causal": causal, "dq": dq, "dk": dk, "dv": dv}
    _flash_attn_bwd(q, k, v, out, gradient.contiguous(), lse, **documents, **options)
    return dq, dk, dv


@torch.library.impl(_LIBRARY, "flash", "CPU")
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    scores, values = _scores(q, k, starts, causal, scale), _wide(v, q)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ values
    return out.transpose(-2, -3).to(q.dtype).contiguous(), lse


@torch.library.impl(_LIBRARY, "flash_backward", "CPU")
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shares = (_scores(q, k, starts, causal, scale) - lse[..., None]).exp()
    dout, mixed = (tensor.float().transpose(-2, -3) for tensor in (gradient, out))
    from_shares = dout @ _wide(v, q).mT
    # Gradient of a softmax: its own product with the incoming gradient, row by row, is taken off.
    ds = shares * (from_shares - (dout * mixed).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds @ _wide(k, q), ds.mT @ _wide(q, q), shares.mT @ dout
    shared = q.shape[-2] // k.shape[-2]
    # A key that several query heads share has the sum of their gradients.
    dk, dv = (tensor.unflatten(-3, (-1, shared)).sum(-3) for tensor in (dk, dv))
    pairs = zip((dq, dk, dv), (q, k, v), strict=True)
    dq, dk, dv = (grad.transpose(-2, -3).to(like.dtype).contiguous() for grad, like in pairs)
    return dq, dk, dv


def _wide(states: Tensor, q: Tensor) -> Tensor:
    """(…, T, heads, width) -> float32 (…, heads of q, T, width)."""
    repeats = q.shape[-2] // states.shape[-2]
    return states.float().transpose(-2, -3).repeat_interleave(repeats, -3)


def _scores(q: Tensor, k: Tensor, starts: Tensor | None, causal: bool, scale: float) -> Tensor:
    """float32 (…, heads, T, T), minus infinity if a query does not see a key."""
    positions = torch.arange(q.shape[-3], device=q.device)
    seen = torch.ones(len(positions), len(positions), dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if starts is not None:
        document = torch.searchsorted(starts, positions, right=True)
        seen = seen & (document[:, None] == document[None, :])
    scores = _wide(q, q) @ _wide(k, q).mT * scale
    return scores.masked_fill(~seen, -torch.inf)


@torch.library.register_fake("internvl::flash", lib=_LIBRARY)
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    *outer, tokens, heads, _ = q.shape
    # Contiguous, as the operator returns it: a compiler plans memory by these strides.
    out = q.new_empty((*outer, tokens, heads, v.shape[-1]))
    return out, q.new_empty((*outer, heads, tokens), dtype=torch.float32)


@torch.library.register_fake("internvl::flash_backward", lib=_LIBRARY)
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    # The log-sum-exp is for the backward pass alone; its own gradient is not implemented.
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, starts = ctx.saved_tensors
    dq, dk, dv = torch.ops.internvl.flash_backward(gradient, *saved, starts, ctx.causal, ctx.scale)
    return dq, dk, dv, None, None, None  # starts, causal and scale have no gradient


torch.library.register_autograd("internvl::flash", _backward, setup_context=_remember, lib=_LIBRARY)
