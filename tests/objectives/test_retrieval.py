"""The retrieval objectives: the original's numbers, and one gradient however a step is cut."""

import json
from dataclasses import replace
from pathlib import Path

import pair_runs
import pytest
import torch
import torch.nn.functional as F
from chat_folders import shared
from ranks import run_ranks
from safetensors.torch import load_file

from internvl.compute import compilation, kernels
from internvl.config import (
    ComputeConfig,
    DataConfig,
    LayerDecayConfig,
    OptimConfig,
    RetrievalConfig,
    SourceConfig,
    Stage2Config,
    TilesConfig,
)
from internvl.config.recipes import load_recipe
from internvl.data.records import IGNORE, PairBatch
from internvl.data.sampler import UnitRef
from internvl.data.sources import open_source
from internvl.inference import load as loading
from internvl.models import keys
from internvl.objectives import OBJECTIVES
from internvl.objectives.retrieval import RetrievalObjective, contrastive_losses
from internvl.training import optim

NOTHING = torch.zeros(0, dtype=torch.long)


class Normalized(RetrievalObjective):
    """Takes images that are normalized already, as the golden ones are."""

    def _normalized(self, batch):
        return batch.pixel_values


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pair_runs.make(folder)
    return folder


@pytest.fixture
def dual(project):
    return loading.load(project / "start", device="cpu", dtype="float32")


def source(folder):
    path = folder / "captions.txt"
    return open_source(
        SourceConfig(name="shapes", type="captions", annotations=path, images=str(folder))
    )


def objective(dual, name="retrieval", **settings):
    if name == "retrieval":
        settings.pop("label_smoothing", None)  # of stage2 alone
    sections = {"retrieval": RetrievalConfig, "stage2": Stage2Config}
    return OBJECTIVES[name](
        sections[name](**settings), DataConfig(tiles=TilesConfig(size=84)), dual.encoder
    )


def pairs(folder, made, numbers=range(8)):
    reader = made.reader([source(folder)], seed=1)
    return [pair for row in numbers for pair in reader[UnitRef(0, (row,), 0, row)].units]


def backward(loss):
    if loss.requires_grad:  # the contrastive term may be done already
        loss.backward()


def gradients(model, made, units, prepare=True):
    """{term: mean}, {name: gradient} of a step."""
    model.zero_grad(set_to_none=True)
    batches = made.batches(units)
    counts = [made.counts(batch) for batch in batches]
    total = {name: sum(count[name] for count in counts) for name in made.weights}
    if prepare:
        made.begin_step(model, iter(batches), total)
    means = dict.fromkeys(total, 0.0)
    for batch in batches:
        sums = made(model, batch)
        backward(sum(made.weights[name] * sums[name] / total[name] for name in sums))
        for name, value in sums.items():
            means[name] += float(value.detach()) / total[name]
    return means, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, tolerance=2e-5):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if "k_proj.bias" in name or "norm_k.bias" in name:
            continue  # softmax does not see them: rounding alone
        worst = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert worst < tolerance, (name, float(worst))


def golden_batch(tensors):
    number = len(tensors["input.pixel_values"])
    both = {
        name: torch.cat([tensors[f"input.{kind}_{name}"] for kind in ("negative", "positive")])
        for name in ("input_ids", "attention_mask")
    }
    return PairBatch(
        pixel_values=tensors["input.pixel_values"],
        image_ids=tensors["input.image_ids"][:, 0],
        text_ids=tensors["input.summarize_input_ids"],
        text_mask=tensors["input.summarize_attention_mask"].bool(),
        text_counts=torch.ones(number),
        match_ids=both["input_ids"],
        match_mask=both["attention_mask"].bool(),
        match_labels=torch.tensor([0] * number + [1] * number),
        written_ids=NOTHING,
        written_mask=NOTHING,
        loss_positions=NOTHING,
        targets=NOTHING,
        names=tuple(f"golden {i}" for i in range(number)),
    )


def test_golden_losses_and_gradients(tmp_path, dual):
    case = shared("golden/internvl_14b_retrieval_loss")
    config = json.loads((case / "case.json").read_text())["config"] | {"model_type": "internvl"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to((case / "weights.safetensors").resolve())
    golden = json.loads((case / "losses.json").read_text())
    tensors = load_file(case / "tensors.safetensors")
    model = loading.load(tmp_path, device="cpu", dtype="float32").model.train()

    settings = OptimConfig(layer_decay=LayerDecayConfig(vision=0.9, qllama=0.9))
    optimizer = optim.build(model, settings)
    made = Normalized(RetrievalConfig(), DataConfig(), dual.encoder)
    batch = golden_batch(tensors)
    sums, counts = made(model, batch), made.counts(batch)
    assert counts == {"itc": 6, "itm": 12}
    for name in ("itc", "itm"):
        mean = float((sums[name] / counts[name]).detach())
        assert mean == pytest.approx(golden["losses"][f"loss_{name}"], rel=1e-5)
    sum(sums[name] / counts[name] for name in sums).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == ["lm_head.weight"]
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    found = dict(keys.ours_to_official(model.config, grads))
    for name, norm in golden["grad_norms"].items():
        if norm is not None and not name.endswith(("k_bias", "norm1_k.bias")):
            assert float(found[name].norm()) == pytest.approx(norm, rel=2e-3), name
    for name, wanted in tensors.items():
        if name.startswith("grad."):
            got = found[name.removeprefix("grad.")]
            close = {"rtol": 1e-3, "atol": 1e-4 * float(wanted.abs().max())}
            torch.testing.assert_close(got, wanted, **close)
    optimizer.step()


def naive(own, targets, scale):
    """The loss of each pair, pair by pair."""
    found = []
    for i, row in enumerate(own):
        loss = 0.0
        for branch in range(1, own.shape[1]):
            to_text = torch.stack([scale.exp() * row[branch] @ other[0] for other in own])
            to_image = torch.stack([scale.exp() * row[0] @ other[branch] for other in own])
            for scores in (to_text, to_image):
                loss = loss - 0.5 * (targets[i] * torch.log_softmax(scores, 0)).sum()
        found.append(loss)
    return torch.stack(found)


def test_the_contrastive_loss_equals_the_naive_one():
    torch.manual_seed(0)
    own = F.normalize(torch.randn(5, 3, 6, dtype=torch.float64), dim=-1)
    same = torch.tensor([0, 1, 0, 2, 1])
    targets = (same[:, None] == same).double()
    targets /= targets.sum(1, keepdim=True)
    scale = torch.tensor(1.3, dtype=torch.float64)
    found = contrastive_losses(own, own, targets, scale)
    torch.testing.assert_close(found, naive(own, targets, scale))


def test_captions_of_a_picture_share_the_target(project, dual):
    made = objective(dual)
    (batch,) = made.batches(pairs(project, made, range(4)))
    wanted = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    assert torch.equal(made.targets(batch.image_ids), wanted)


@pytest.mark.parametrize("name", ["retrieval", "stage2"])
@pytest.mark.parametrize(("micro_batch", "kept"), [(1, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 9)])
def test_micro_batches_equal_one_batch(project, dual, name, micro_batch, kept):
    whole = objective(dual, name, label_smoothing=0.1)
    units = pairs(project, whole)
    wanted, wanted_gradients = gradients(dual.model.train(), whole, units)
    settings = {"micro_batch": micro_batch, "kept_micro_batches": kept}
    cut = objective(dual, name, label_smoothing=0.1, **settings)
    found, found_gradients = gradients(dual.model, cut, units)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert_same(found_gradients, wanted_gradients)
    assert "logit_scale" in found_gradients


def test_without_the_first_pass_micro_batches_would_differ(project, dual):
    """The tests above can fail: in-batch negatives do depend on the batch."""
    cut = objective(dual, micro_batch=4)
    units = pairs(project, cut)
    wanted, _ = gradients(dual.model.train(), objective(dual), units)
    found, _ = gradients(dual.model, cut, units, prepare=False)
    assert abs(found["itc"] - wanted["itc"]) > 0.1


def random_model(project):
    """With stochastic depth and adapter dropout."""
    changes = {
        "model": {
            "id": str(project / "start"),
            "train": ["heads"],
            "drop_path": 0.5,
            "lora": {"rank": 4, "dropout": 0.3, "on": ["vision_tower", "language_model"]},
        }
    }
    dual = loading.for_training(load_recipe(pair_runs.make(project, **changes)))
    for parameter in dual.model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # B of the adapters
    dual.model.train()
    return dual


def frozen_tower(project, drop_path=0.0):
    """Heads train, and adapters with dropout on QLLaMA; the tower does not."""
    lora = {"rank": 4, "dropout": 0.3, "on": ["language_model"]}
    model = {"id": str(project / "start"), "train": ["heads"], "lora": lora}
    changes = {"model": {**model, "drop_path": drop_path}}
    dual = loading.for_training(load_recipe(pair_runs.make(project, **changes)))
    for parameter in dual.model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    dual.model.train()
    return dual


def looks(model, made, units):
    """(images that the tower looked at, the step's means and gradients)."""
    seen = []
    torch.manual_seed(5)
    with model.model.vision_tower.register_forward_hook(
        lambda module, args, output: seen.append(len(output.last_hidden_state))
    ):
        return seen, gradients(model, made, units)


@pytest.mark.parametrize("name", ["retrieval", "stage2"])
def test_a_frozen_tower_looks_once(project, name):
    """What it saw serves both passes, and not a bit of the result changes."""
    dual = frozen_tower(project)
    made = objective(dual, name, micro_batch=3)
    units = pairs(project, made)
    seen, found = looks(dual.model, made, units)
    assert seen == [3, 2, 3]
    assert not made._cached
    dual.model.kept_bytes = 0
    seen, wanted = looks(dual.model, made, units)
    assert seen == [3, 2, 3, 3, 2]  # the first comes last, and goes on from there
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])
    with torch.no_grad():
        vision = dual.model.vision_tokens(torch.zeros(3, 3, 84, 84))
    dual.model.kept_bytes = vision.nbytes  # room for one of them
    seen, again = looks(dual.model, made, units)
    assert seen == [3, 2, 3, 2]
    assert again[0] == wanted[0]


def test_micro_batches_under_a_frozen_tower_equal_one_batch(project):
    dual = frozen_tower(project)
    for module in dual.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "rate"):  # of the adapters
            module.rate = 0.0
    whole, cut = objective(dual), objective(dual, micro_batch=3)
    units = pairs(project, whole)
    seen, (means, wanted) = looks(dual.model, whole, units)
    assert seen == [8]
    seen, (found, cached) = looks(dual.model, cut, units)
    assert seen == [3, 2, 3]
    assert found == pytest.approx(means, rel=1e-5)
    assert_same(cached, wanted)


def test_a_frozen_tower_that_drops_blocks_looks_twice(project):
    dual = frozen_tower(project, drop_path=0.5)
    settings = RetrievalConfig(micro_batch=4, weights={"itm": 0})
    made = Recording(settings, DataConfig(tiles=TilesConfig(size=84)), dual.encoder)
    seen, _ = looks(dual.model, made, pairs(project, made))
    assert seen == [4, 4, 4]
    second, _, second_again = made.seen
    assert torch.equal(second, second_again)


class Recording(RetrievalObjective):
    """Keeps the features of every pass."""

    def features(self, model, seen, batch):
        found = super().features(model, seen, batch)
        self.seen = [*getattr(self, "seen", []), found.detach()]
        return found


def one_of_each_kind(towers):
    """Blocks that always run and that may drop, layers that look at the image and that do not."""
    blocks, layers = towers.vision_tower.encoder.layer, towers.language_model.layers
    towers.vision_tower.encoder.layer = torch.nn.ModuleList([blocks[0], blocks[-1]])
    towers.language_model.layers = layers[:2]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig(),
        ComputeConfig(checkpointing="full"),
        pytest.param(ComputeConfig(compile=True), marks=pytest.mark.slow),
    ],
    ids=["eager", "checkpointing", "compiled"],
)
def test_both_passes_have_the_same_features(project, compute):
    """Compiled blocks draw other random numbers where no gradient is wanted."""
    dual = random_model(project)
    one_of_each_kind(dual.model.model)
    kernels.apply_compute(dual.model, torch.device("cpu"), compute)
    settings = RetrievalConfig(micro_batch=3, weights={"itm": 0})
    made = Recording(settings, DataConfig(tiles=TilesConfig(size=84)), dual.encoder)
    with compilation.tracing():
        gradients(dual.model, made, pairs(project, made, range(6)))
    second, first, second_again = made.seen
    assert torch.equal(second, second_again)
    torch.manual_seed(0)
    made.seen = []
    with compilation.tracing():
        gradients(dual.model, made, pairs(project, made, range(6)))
    assert not torch.equal(made.seen[1], first)  # there is something to draw
    torch._dynamo.reset()  # what was compiled counts against other tests' limits


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_both_passes_draw_the_same_random_numbers(project, kept):
    """So the gradient is that of a single graph over all micro-batches."""
    dual = random_model(project)
    model = dual.model
    made = objective(dual, micro_batch=2, kept_micro_batches=kept)
    units = pairs(project, made)
    torch.manual_seed(5)
    found, found_gradients = gradients(model, made, units)

    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    batches = made.batches(units)
    seeds = [int(torch.randint(2**62, ())) for _ in batches[kept:]]

    def encode(batch):
        seen = model.encode_kv(model.vision_tokens(made._normalized(batch)))
        return seen, made.features(model, seen, batch)

    # Those that are kept go on from the generator's state, first their features, then the rest.
    left = [(None, batch, encode(batch)) for batch in batches[:kept]]
    left += zip(seeds, batches[kept:], [None] * len(seeds), strict=True)
    features, matched = [], 0.0
    for seed, batch, encoded in left:
        if seed is not None:
            torch.manual_seed(seed)
        seen, found_here = encoded or encode(batch)
        features.append(found_here)
        mask = model.joint_mask("itm", batch.match_mask)
        queries, _ = model.joint_states(seen, batch.match_ids, mask)
        logits = model.itm_logits(queries)
        matched = matched + F.cross_entropy(logits, batch.match_labels, reduction="sum") / 16
    own = torch.cat(features)
    ids = torch.cat([batch.image_ids for batch in batches])
    contrast = contrastive_losses(own, own, made.targets(ids), model.logit_scale).mean()
    (contrast + matched).backward()
    wanted = {"itc": contrast.item(), "itm": matched.item()}
    assert found == pytest.approx(wanted, rel=1e-5)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(found_gradients, wanted, tolerance=1e-4)


def test_padding_changes_nothing(project, dual):
    for name in ("retrieval", "stage2"):
        made = objective(dual, name)
        (batch,) = made.batches(pairs(project, made))
        assert batch.text_ids.shape[1] % 8 == 0
        longer = {
            key: F.pad(getattr(batch, key), (0, 80 - batch.text_ids.shape[1]))
            for key in ("text_ids", "text_mask", "match_ids", "match_mask")
        }
        with torch.no_grad():
            found, wanted = made(dual.model, replace(batch, **longer)), made(dual.model, batch)
        for term in wanted:
            torch.testing.assert_close(found[term], wanted[term], rtol=1e-5, atol=1e-5)


def test_a_term_of_weight_zero_is_left_out(project, dual):
    made = objective(dual, weights={"itm": 0.0, "itc": 2.0})
    (batch,) = made.batches(pairs(project, made, range(2)))
    assert made.weights == {"itc": 2.0}
    assert made.counts(batch).keys() == made(dual.model, batch).keys() == {"itc"}


def test_stage2_matches_half_of_a_step_with_another_caption(project, dual):
    made = objective(dual, "stage2", micro_batch=2)
    units = pairs(project, made, range(5))
    batches = made.batches(units)
    assert [len(batch.match_ids) for batch in batches] == [2, 2, 1]
    found = {
        name: (int(label), tuple(row[row > 0].tolist()))
        for batch in batches
        for name, label, row in zip(batch.names, batch.match_labels, batch.match_ids, strict=True)
    }
    assert list(found) != [pair.name for pair in units]  # the longest come first
    for number, pair in enumerate(units):
        own = number > 2
        assert found[pair.name] == (own, pair.positive if own else pair.negative)


def test_pairs_of_like_length_are_encoded_together(project, dual):
    """Less padding; all that a step holds is the same."""
    made = objective(dual, micro_batch=2)
    units = pairs(project, made)
    units = [
        replace(pair, summary=pair.summary * (1 + 5 * (i % 2))) for i, pair in enumerate(units)
    ]
    batches = made.batches(units)
    widths = [batch.text_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert sorted(n for batch in batches for n in batch.names) == sorted(p.name for p in units)
    (whole,) = objective(dual).batches(units)
    assert list(whole.names) == [pair.name for pair in units]


def test_stage2_equals_the_joint_sequence_of_the_original(project, dual):
    """One pass over queries and text under the "itc" mask, and shifted labels for captioning."""
    model, made = dual.model, objective(dual, "stage2", label_smoothing=0.1)
    units = pairs(project, made, range(6))
    units[2] = replace(units[2], summary=tuple(dual.encoder.embedding("")))
    (batch,) = made.batches(units)
    assert batch.text_counts.tolist() == [1, 1, 0, 1, 1, 1]
    with torch.no_grad():
        sums, counts = made(model, batch), made.counts(batch)
        seen = model.encode_kv(model.vision_tokens(made._normalized(batch)))
        mask = model.joint_mask("itc", batch.text_mask)
        queries, text = model.joint_states(seen, batch.text_ids, mask)
        g = F.normalize(model.query_embeds(queries), dim=-1)
        t = F.normalize(model.text_embeds(text, batch.text_mask), dim=-1)
        logits = model.logit_scale.exp() * g @ t.T
        labels = torch.tensor([0, 1, IGNORE, 3, 4, 5])
        ways = [F.cross_entropy(x, labels, label_smoothing=0.1) for x in (logits, logits.T)]
        itc = float(sums["itc"] / counts["itc"])
        assert itc == pytest.approx(float(sum(ways)) / 2, rel=1e-5)

        mask = model.joint_mask("itg", batch.written_mask)
        _, text = model.joint_states(seen, batch.written_ids, mask)
        labels = batch.written_ids.masked_fill(~batch.written_mask, IGNORE)
        labels[:, : units[0].num_given] = IGNORE
        logits = model.lm_head(text)[:, :-1].flatten(0, 1)
        itg = float(sums["itg"] / counts["itg"])
        wanted = float(F.cross_entropy(logits, labels[:, 1:].flatten()))
        assert itg == pytest.approx(wanted, rel=1e-5)


def test_stage2_does_not_match_empty_captions(project, dual):
    made = objective(dual, "stage2")
    empty = tuple(dual.encoder.matching(""))
    units = [replace(pair, positive=empty) for pair in pairs(project, made, range(4))]
    (batch,) = made.batches(units)
    assert batch.match_labels.tolist() == [0, 0, IGNORE, IGNORE]
    assert made.counts(batch)["itm"] == 2


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from torch import distributed
from internvl import dist
from internvl.inference import load as loading
from test_retrieval import CASES, backward, objective, pairs

dist.init_from_env("cpu")
folder, rank = Path({folder!r}), dist.rank()
model = loading.load(folder / "start", device="cpu", dtype="float32")
for case, (name, micro_batch, even) in enumerate(CASES):
    made = objective(model, name, label_smoothing=0.1, micro_batch=micro_batch)
    units = pairs(folder, made)
    batches = made.batches(units[rank::2] if even else [units[:2], units[2:]][rank])
    counted = [made.counts(batch) for batch in batches]
    counts = dist.sum_counts({{term: sum(c[term] for c in counted) for term in made.weights}})
    model.model.train().zero_grad()
    made.begin_step(model.model, iter(batches), counts)
    for batch in batches:
        sums = made(model.model, batch)
        backward(sum(sums[term] / counts[term] for term in sums))
    found = {{}}
    for key, parameter in model.model.named_parameters():
        found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        distributed.all_reduce(found[key])
    if rank == 0:
        torch.save(found, folder / f"ranks-{{case}}.pt")
dist.shutdown()
"""
CASES = [("retrieval", None, True), ("retrieval", 2, False), ("stage2", 2, True)]
"""Objective, pairs of a micro-batch, whether both ranks have as many."""


def test_two_ranks_give_the_gradient_of_one(project, dual):
    """In one pass, and in two with 2 and 6 pairs."""
    run_ranks(RANKS.format(folder=str(project), tests=str(Path(__file__).parent)))
    for case, (name, _, _) in enumerate(CASES):
        found = torch.load(project / f"ranks-{case}.pt", weights_only=True)
        whole = objective(dual, name, label_smoothing=0.1)
        _, wanted = gradients(dual.model.train(), whole, pairs(project, whole))
        assert_same({n: g for n, g in found.items() if n in wanted}, wanted)
        assert all(not g.any() for n, g in found.items() if n not in wanted)
