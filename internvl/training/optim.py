"""Parameter groups, AdamW or Muon, and the learning rate as a function of the step."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from internvl import dist
from internvl.config import LayerDecayConfig, OptimConfig
from internvl.errors import UserError
from internvl.models import keys

Layer = tuple[str, int]
"""("vision" or "qllama", index from 0): the weights of one learning rate under layer decay."""


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer of all parameters that require gradients; only matrices decay.

    With `decay_vectors` everything decays, as in the original (DeepSpeed sees one flat group).
    The rate of a group is the schedule's times its `lr_scale`.

    Raises:
        UserError: `layer_decay` for another model than InternVL-14B, or 8 bits without torchao.
    """
    # A group for each rate and decay: torch has these settings by group, not by parameter.
    scales = {} if config.layer_decay is None else layer_scales(model, config.layer_decay)
    matrices = hidden_matrices(model) if config.name == "muon" else frozenset()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = _decays(parameter, config)
        layer, scale = scales.get(name, (None, 1.0))
        weight_decay = config.weight_decay if decays else 0.0
        empty = {"params": [], "weight_decay": weight_decay, "lr_scale": scale}
        if config.name == "muon":
            empty["muon"] = name in matrices
        # torch updates shards and whole parameters in two calls.
        key = (layer, decays, empty.get("muon"), isinstance(parameter, DTensor))
        groups.setdefault(key, empty)["params"].append(parameter)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "muon":
        return Muon(list(groups.values()), config.momentum, **settings)
    if config.name == "adamw-8bit":
        return _adamw_8bit()(list(groups.values()), **settings)
    cls = OffloadedAdamW if config.offload else torch.optim.AdamW
    return cls(list(groups.values()), fused=True, **settings)


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """Returns the names of the weights of all linear layers but the output matrix.

    Embeddings, output matrix, convolutions and vectors are AdamW's, as Muon's authors advise.
    """
    output = getattr(model, "lm_head", None)
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    )


class Muon(torch.optim.AdamW):
    """Muon for the groups with `muon: True`, AdamW for the others (arXiv 2502.16982).

    An update is scaled to the root mean square of AdamW's, so that one learning rate and weight
    decay hold for all groups. torch's own Muon multiplies in bfloat16, which a CPU without such
    instructions emulates at a tenth of float32's speed, and one matrix at a time; here matrices of
    one shape are orthogonalized together, in float32 on a CPU.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates the parameters that have gradients."""
        groups = self.param_groups
        try:
            # AdamW's step takes every group that it finds here.
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append(parameter)
        lr = group["lr"]
        # Equal shapes together: many small products would be bound by their launches.
        # Rows alone have other singular vectors, so shards are orthogonalized whole.
        stacks = (
            torch.stack([_whole(self._averaged(p)) for p in parameters])
            for parameters in shapes.values()
        )
        updated = orthogonal_on_ranks(stacks)
        for (shape, parameters), updates in zip(shapes.items(), updated, strict=True):
            scale = 0.2 * math.sqrt(max(shape))  # the root mean square of AdamW's updates
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - lr * group["weight_decay"])
                update = _cut(update.to(parameter.dtype), parameter)
                parameter.add_(update, alpha=-lr * scale)

    def _averaged(self, parameter: nn.Parameter) -> Tensor:
        """Returns the gradient with Nesterov momentum, in the parameter's shape."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            # AdamW looks for a count in every state that it loads.
            state["step"] = torch.zeros((), dtype=torch.float32)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(buffer, self.momentum)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Returns this rank's share of a tensor that all ranks have, as `parameter` is cut."""
    if not isinstance(parameter, DTensor):
        return tensor
    spec = parameter.device_mesh, parameter.placements
    # No rank's values are sent: all have computed the same.
    return distribute_tensor(tensor, *spec, src_data_rank=None)


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients that raise small singular values fastest (K. Jordan, "Muon", 2024)."""


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximates U V^T of each matrix's singular value decomposition, (B, M, N).

    Singular values end between 0.7 and 1.2. bfloat16 on a GPU, else float32.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT  # the Gram matrix below has the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # largest singular value at most 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonal_on_ranks(stacks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields `orthogonal` of each stack; on CPUs every rank computes a share of the matrices.

    All ranks pass the same values, those of their summed gradients.
    """
    if dist.world_size() == 1 or distributed.get_backend() != "gloo":
        # One stack at a time: whole matrices of all shapes are as large as the model. And a GPU
        # computes them in less time than it takes to send them.
        yield from map(orthogonal, stacks)
    else:
        yield from _shared_out(list(stacks))


def _shared_out(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Computes `orthogonal` of each stack, every rank some matrices of it."""
    # The matrix that takes longest first, each to the rank that has the least to do.
    cost = {
        (index, row): stack[0].numel() * min(stack.shape[1:])
        for index, stack in enumerate(stacks)
        for row in range(len(stack))
    }
    loads, mine = [0] * dist.world_size(), [list[int]() for _ in stacks]
    for index, row in sorted(cost, key=lambda matrix: -cost[matrix]):
        rank = loads.index(min(loads))
        loads[rank] += cost[index, row]
        if rank == dist.rank():
            mine[index].append(row)
    flat = torch.zeros(sum(stack.numel() for stack in stacks))
    pieces = flat.split([stack.numel() for stack in stacks])
    updates = [piece.view(stack.shape) for piece, stack in zip(pieces, stacks, strict=True)]
    for update, stack, rows in zip(updates, stacks, mine, strict=True):
        if rows:
            update[rows] = orthogonal(stack[rows])
    # A sum with the zeros of the other ranks is the value itself.
    distributed.all_reduce(flat)
    return updates


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW with its moments in the CPU's memory, copied to the device some parameters at a time.

    The update is computed on the device, so every number is AdamW's.
    """

    def step(self, closure: Any = None) -> Any:
        """Updates the parameters that have gradients."""
        groups = self.param_groups
        try:
            for group in groups:
                reached = [p for p in group["params"] if p.grad is not None]
                for parameters in _buckets(reached):
                    self.param_groups = [{**group, "params": parameters}]
                    self._update(parameters)
        finally:
            self.param_groups = groups

    def _update(self, parameters: Sequence[nn.Parameter]) -> None:
        waiting = [(p, key, self.state[p].get(key)) for p in parameters for key in _MOMENTS]
        for parameter, key, moment in waiting:
            if moment is not None:
                self.state[parameter][key] = moment.to(parameter.device, non_blocking=True)
        super().step()
        for parameter, key, moment in waiting:
            updated = self.state[parameter][key]
            if updated.device.type != "cpu":
                if moment is None:
                    # Pinned, or the copies would wait for the host.
                    moment = torch.empty_like(updated, device="cpu", pin_memory=True)
                self.state[parameter][key] = moment.copy_(updated, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's, once the copies to the CPU have ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's, but the moments stay in the CPU's memory."""
        states = state_dict["state"]
        # The parent would put moments on the device: all at once, which is what does not fit.
        rest = {
            index: {key: value for key, value in state.items() if key not in _MOMENTS}
            for index, state in states.items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key in _MOMENTS & states.get(index, {}).keys():
                self.state[parameter][key] = states[index][key].cpu()


_MOMENTS = {"exp_avg", "exp_avg_sq"}
_BUCKET = 2**25  # parameters that are updated together, unless one alone is larger


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _adamw_8bit() -> Any:
    """Returns torchao's AdamW class: moments in 8 bits as in arXiv 2110.02861, on any device."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "optim.name=adamw-8bit needs torchao: pip install 'internvl[lowbit]'"
        ) from None
    return AdamW8bit


def _decays(parameter: nn.Parameter, config: OptimConfig) -> bool:
    if parameter.ndim == 0:
        return config.decay_scalars or config.decay_vectors
    return parameter.ndim > 1 or config.decay_vectors


def layer_scales(model: Any, config: LayerDecayConfig) -> dict[str, tuple[Layer, float]]:
    """Returns layer and learning-rate factor of each parameter of an InternVL-14B, by name."""
    official = _official_names(model)
    depths = {
        "vision": model.config.vision_config.num_hidden_layers,
        "qllama": model.config.text_config.num_hidden_layers,
    }
    rates = {"vision": config.vision, "qllama": config.qllama}
    layers = {name: layer_of(official[name], depths) for name, _ in model.named_parameters()}
    return {
        name: (layer, lr_scale(layer[1], depths[layer[0]], rates[layer[0]]))
        for name, layer in layers.items()
    }


def _official_names(model: Any) -> dict[str, str]:
    """Returns the official name of each parameter; an adapter has that of the weight it is on."""
    if model.config.model_type != "internvl_14b":
        raise UserError("optim.layer_decay is for InternVL-14B alone; remove it")
    plain = {
        name: re.sub(r"\.(base_layer|lora_[AB]\.default)\.", ".", name)
        for name, _ in model.named_parameters()
    }
    theirs = {
        name: group.official[0]
        for group in keys.groups(model.config, dict.fromkeys(plain.values()))
        for name in group.ours
    }
    return {name: theirs[base] for name, base in plain.items()}


def layer_of(official: str, depths: Mapping[str, int]) -> Layer:
    """Returns the layer that the original assigns a parameter to: 0 before the first block, i + 1
    for block i, depth + 2 after the last.

    Original: `get_num_layer_for_vit_and_qllama` of `trainer_monkey_patch.py`.

    Args:
        official: name of the parameter in an official checkpoint.
        depths: blocks of "vision" and of "qllama".
    """
    tower = "vision" if official.startswith(("vision_model.", "clip_projector.")) else "qllama"
    # Blocks are 1 to depth there, and depth + 1 is no layer's.
    block = re.search(r"\.layers\.(\d+)\.", official)
    if block is not None:
        return tower, int(block[1]) + 1
    first = ("vision_model.", "query_tokens", "logit_scale", "qllama.model.embed_tokens.")
    return tower, 0 if official.startswith(first) else depths[tower] + 2


def lr_scale(layer: int, depth: int, rate: float) -> float:
    """Returns the learning-rate factor of a layer in a tower of `depth` blocks, at most 1."""
    # Layer depth + 2 would have a rate above the recipe's.
    return min(1.0, rate ** (depth + 1 - layer))


def set_lr(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimConfig
) -> float:
    """Sets the learning rate of every group for step `step` (from 0); returns the largest layer's.

    As shipped, the first update alone has the layers' own rates: from the second on DeepSpeed's
    schedule sets one for all.
    """
    lr = lr_at(step, num_steps, config)
    uniform = config.schedule == "as_shipped" and step > 0
    for group in optimizer.param_groups:
        rate = lr if uniform else lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):  # torchao's step is compiled around it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return lr


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """Returns the learning rate of step `step` (from 0), before a layer's factor.

    Original: the cosine schedule of transformers, warm-up steps rounded up; as shipped,
    `WarmupDecayLR` of DeepSpeed 0.10 to 0.15.2, whose first update has the peak.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * num_steps)
    if config.schedule == "as_shipped":
        warmup = max(2, warmup)  # the schedule divides by the logarithm of it
        if step <= warmup:
            return config.lr * (math.log(step) / math.log(warmup) if step else 1.0)
        return config.lr * max(0.0, (num_steps - step + 1) / max(1, num_steps - warmup))
    if step < warmup:
        return config.lr * step / warmup
    # Warm-up, stable, decay: only the last `decay_ratio` of the steps decays.
    if config.schedule == "wsd":
        share = (num_steps - step) / max(1, math.ceil(config.decay_ratio * num_steps))
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * min(1.0, share))
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
