"""Linear probe: a linear layer trained on the features of a training split, as CLIP_benchmark's."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl.config import ClassifyEval
from internvl.errors import UserError, counted


def choose(labels: Tensor, shots: int | None, generator: torch.Generator) -> Tensor:
    """Returns the indices to train on, int64: all in random order, or `shots` of every class.

    Raises:
        UserError: a class has fewer images.
    """
    order = torch.randperm(len(labels), generator=generator)
    if shots is None:
        return order
    # Within the random order: position of an image among those of its class.
    shuffled = labels[order]
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (shuffled == label).nonzero().flatten()
        if len(rows) < shots:
            raise UserError(
                f"shots: {shots} of every class, but class {label} has "
                f"{counted(len(rows), 'image')} to train on"
            )
        taken[rows[:shots]] = True
    return order[taken]


def fit(features: Tensor, labels: Tensor, num_classes: int, config: ClassifyEval) -> nn.Linear:
    """Trains a linear layer by AdamW with a cosine schedule.

    Args:
        features: float32 (N, E), of unit length.
        labels: int64 (N,).
        config: learning rate, epochs, batch size, shots and seed.
    """
    generator = torch.Generator().manual_seed(config.probe_seed)
    chosen = choose(labels, config.shots, generator)
    features, labels = features[chosen.to(features.device)], labels[chosen].to(features.device)
    layer = nn.Linear(features.shape[1], num_classes)
    # From the generator, not torch's global one: a run that evaluates draws the same batches.
    bound = 1 / math.sqrt(features.shape[1])
    for parameter in layer.parameters():
        parameter.data.uniform_(-bound, bound, generator=generator)
    layer = layer.to(features.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config.probe_lr, weight_decay=0.0)
    size = config.batch_size
    steps, step = config.probe_epochs * math.ceil(len(labels) / size), 0
    # Evaluations run without gradients; this one learns.
    with torch.enable_grad():
        for _ in range(config.probe_epochs):
            order = torch.randperm(len(labels), generator=generator).to(features.device)
            for rows in order.split(size):
                for group in optimizer.param_groups:
                    group["lr"] = 0.5 * (1 + math.cos(math.pi * step / steps)) * config.probe_lr
                optimizer.zero_grad()
                F.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimizer.step()
                step += 1
    return layer
