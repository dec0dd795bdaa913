"""Preference pairs of every kind of media, a small model, and the loss of two plain models."""

import json
import math

import torch
import torch.nn.functional as F
from data_files import model_folder, picture, write_lines
from PIL import Image

import internvl
from internvl.data.images import STATISTICS
from internvl.data.records import Message
from internvl.data.sampler import UnitRef
from internvl.models.vision import normalize_tiles

PAIRS = [
    {"image": "a.png", "question": "<image>\nWhat is this?", "chosen": "A red gradient.",
     "rejected": "A cat."},
    {"image": "a.png", "question": "<image>\nWhich color?", "chosen": "Red, mostly, I think.",
     "rejected": "None at all, it is a photo of a dog in a park."},
    {"image": ["a.png", "b.png"], "question": "<image>\n<image>\nWhich is wider?",
     "chosen": "The second one.", "rejected": "The first."},
    {"question": "What is 2 + 3?", "chosen": "5", "rejected": "2 + 3 is six."},
    {"video": "c.gif", "question": "<video>\nWhat happens?", "chosen": "It turns blue.",
     "rejected": "Nothing."},
    {"image": "b.png", "question": "<image>\nHow many dogs?", "chosen": "None.",
     "rejected": "Two dogs sit on the left."},
]  # fmt: skip


def make(folder, pairs=PAIRS, **changes):
    """Writes everything below `folder` and returns the recipe; `changes` are top-level keys."""
    picture(folder / "a.png")
    picture(folder / "b.png", (200, 90))
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "purple", "blue")]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:], duration=500)
    write_lines(folder / "pairs.jsonl", pairs)
    if not (folder / "start").exists():
        model_folder(folder / "start")
    source = {
        "name": "pairs",
        "type": "preference",
        "annotations": str(folder / "pairs.jsonl"),
        "images": str(folder),
    }
    tree = {
        "model": {
            "id": str(folder / "start"),
            "train": ["vision_tower", "multi_modal_projector", "language_model"],
        },
        "data": {
            "sources": [source],
            "tiles": {"max": 2},
            "video": {"sampling": "fps2"},
            "max_tokens": 256,
            "row_tokens": 320,
            "workers": 0,
        },
        "objective": {"name": "mpo"},
        "optim": {"lr": 1e-3},
        "run": str(folder / "run"),
        "global_batch": len(pairs),
        "steps": 3,
        "dtype": "float32",
        "device": "cpu",
    }
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({**tree, **changes}))
    return recipe


class TwoModels:
    """The objective as its paper has it: two models, every answer alone, whole logits."""

    def __init__(self, recipe):
        self.policy = internvl.load(recipe.model.id, device="cpu").model.train()
        self.reference = internvl.load(recipe.model.id, device="cpu").model.eval()
        self.recipe = recipe
        self.rewards = []
        """Mean rewards of all steps so far."""

    def logps(self, model, example, tiles):
        """Log-probability of the supervised tokens of a conversation, and their number."""
        pixels = None
        if tiles is not None:
            statistics = STATISTICS[self.recipe.data.statistics]
            pixels = normalize_tiles(tiles, torch.float32, *statistics)
        ids = torch.from_numpy(example.input_ids)[None]
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, :-1].float()
        labels = torch.from_numpy(example.labels)[1:]
        kept = labels >= 0
        chosen = logits.log_softmax(-1)[kept].gather(1, labels[kept][:, None])
        return chosen.sum(), int(kept.sum())

    def step(self, pairs):
        """Loss of a step of (chosen, rejected, tiles); gradients are left in the policy.

        Returns dict of losses, delta and log-probabilities (n, 2).
        """
        config = self.recipe.objective
        policy, reference, lengths = [], [], []
        for chosen, rejected, tiles in pairs:
            both = [self.logps(self.policy, e, tiles) for e in (chosen, rejected)]
            policy.append(torch.stack([logp for logp, _ in both]))
            lengths.append([length for _, length in both])
            with torch.no_grad():
                both = [self.logps(self.reference, e, tiles)[0] for e in (chosen, rejected)]
            reference.append(torch.stack(both))
        policy, reference = torch.stack(policy), torch.stack(reference)
        lengths = torch.tensor(lengths).float()
        r_c, r_r = (config.beta * (policy - reference)).unbind(1)
        self.rewards.append(float((r_c + r_r).mean().detach() / 2))
        delta = math.fsum(self.rewards) / len(self.rewards)
        dpo = -F.logsigmoid(r_c - r_r).mean()
        bco = (-F.logsigmoid(r_c - delta) - F.logsigmoid(-(r_r - delta))).mean()
        sft = (-policy[:, 0] / lengths[:, 0]).mean()
        if config.normalize == "tokens":
            sft = -policy[:, 0].sum() / lengths[:, 0].sum()
        loss = 0.8 * dpo + 0.2 * bco + sft
        loss.backward()
        terms = {"loss": loss, "dpo": dpo, "bco": bco, "sft": sft}
        return {name: float(value.detach()) for name, value in terms.items()} | {
            "delta": delta,
            "logps/chosen": float(policy[:, 0].mean().detach()),
            "logps/rejected": float(policy[:, 1].mean().detach()),
            "rewards/margins": float((r_c - r_r).mean().detach()),
            "rewards/accuracies": float((r_c > r_r).float().mean()),
        }


def encoded(state):
    """(chosen, rejected, tiles) of every line, encoded one answer at a time."""
    pairs = []
    (source,) = state.order.files
    for line in range(len(source)):
        (sample,) = source.samples([line])
        (ready,), _, tiles = state.reader.prepare([sample], UnitRef(0, (line,), 0))
        per_image = () if tiles is None else tiles.per_image
        examples = [
            state.objective.encoder.encode(
                type(ready)(
                    ready.name, (*ready.messages[:-1], Message("assistant", text)), ready.images
                ),
                per_image,
            )
            for text in (ready.messages[-1].content, ready.rejected)
        ]
        pairs.append((*examples, None if tiles is None else tiles.pixels))
    return pairs
