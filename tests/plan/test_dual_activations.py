"""memory: what autograd keeps of InternVL-14B's losses, against real small models."""

import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from saved_bytes import bytes_of, kept

from internvl import plan, zoo
from internvl.compute import kernels, placement
from internvl.config import recipes
from internvl.data.pair_reader import make_batch
from internvl.data.records import Pair
from internvl.models.adapters import lora
from internvl.models.dual import configs as dual_configs
from internvl.models.dual.model import DualModel
from internvl.objectives import OBJECTIVES
from internvl.plan import memory, time
from internvl.plan.load import load_of
from internvl.plan.work import first_step
from internvl.training import optim
from internvl.zoo import gpus

PAIRS, TOWERS = 3, ["vision_tower", "language_model"]
LORA = {"rank": 16, "dropout": 0.0, "on": TOWERS}
CHOICES = {
    "full": {"train": [*TOWERS, "heads"]},
    "lora": {
        "train": ["text_projection", "lm_head"],
        "lora": {"rank": 16, "dropout": 0, "on": TOWERS},
    },
    "head": {"train": ["heads"]},
    "queries": {"train": ["queries", "query_pool", "itm_head", "logit_scale"]},
}

TILES = {"size": 56, "min": 1, "max": 1, "thumbnail": False, "pad_square": False}


def recipe_of(choice, objective="retrieval", **compute):
    source = {"name": "pairs", "type": "pairs", "annotations": "pairs.csv"}
    return recipes.resolve(
        {
            "model": {"id": "OpenGVLab/InternVL-14B-224px", **CHOICES[choice]},
            "data": {"sources": [source], "tiles": TILES, "normalize": "imagenet"},
            "objective": {"name": objective},
            "compute": {"compile": False, **compute},
            "run": "run",
            "global_batch": PAIRS,
            "steps": 1,
        }
    )


def config_of(tower_layers, layers):
    official = zoo.official_config(zoo.find("InternVL-14B-224px"))
    vision = {"hidden_size": 192, "num_hidden_layers": tower_layers, "num_attention_heads": 4}
    vision |= {"intermediate_size": 640, "image_size": 56}
    text = {"hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    text |= {"intermediate_size": 704, "vocab_size": 500, "num_query_token": 16}
    parts = {
        "vision_config": official["vision_config"] | vision,
        "qllama_config": official["qllama_config"] | text,
    }
    sizes = {"clip_embed_dim": 32, "attn_pool_num_heads": 4, "force_image_size": 56}
    return dual_configs.from_official(official | parts | sizes)


def real(recipe, config):
    model = DualModel._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    lora.select_trainable(model, recipe.model.parts)
    if recipe.model.lora is not None:
        lora.attach(model, recipe.model.lora)
    return placement.to_device(model, torch.device("cpu"), "bfloat16").train()


def batch_of(objective):
    words = (1, *range(5, 27), 2)
    pairs = [
        Pair(
            name=str(row),
            pixels=torch.randint(256, (3, 56, 56), dtype=torch.uint8),
            image_id=row,
            summary=words,
            positive=words,
            negative=words[::-1],
            written=words if "itg" in objective.weights else (),
            num_given=4 if "itg" in objective.weights else 0,
        )
        for row in range(PAIRS)
    ]
    matches = [((words, 0), (words, 1))[: 2 if objective.config.name == "retrieval" else 1]] * PAIRS
    return make_batch(pairs, matches, [True] * PAIRS)


def objective_of(recipe):
    return OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, None)


def losses(objective, model, batch):
    sums = objective(model, batch)
    return torch.stack(list(sums.values())).sum()


def activations(recipe, config, objective, batch):
    """What a micro-batch keeps, predicted."""
    step = first_step([batch], objective.weights, PAIRS)
    model = plan.model_of(recipe, config)
    return memory.activations_of(model, recipe, load_of(recipe, model, step).largest)


def made_of(recipe, config):
    """(bytes that autograd keeps of a micro-batch, those predicted for tower and QLLaMA)."""
    model = real(recipe, config)
    kernels.apply_compute(model, torch.device("cpu"), recipe.compute)
    objective = objective_of(recipe)
    batch = batch_of(objective)
    counted = kept(model, partial(losses, objective, model, batch))
    predicted = activations(recipe, config, objective, batch)
    return counted, predicted.all_casts() + predicted.language() + predicted.tower()


def differences(recipe, *sizes):
    """(counted, predicted) bytes that each of `sizes` has more than the one before it."""
    made = [made_of(recipe, config_of(*layers)) for layers in sizes]
    for less, more in pairwise(made):
        yield more[0] - less[0], more[1] - less[1]


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("lora", marks=pytest.mark.slow),
        "head",
        pytest.param("queries", marks=pytest.mark.slow),
    ],
)
def test_what_autograd_keeps_of_blocks(choice):
    """Two layers of QLLaMA more, of which one looks at the image, and a block of the tower."""
    recipe = recipe_of(choice, "stage2" if choice == "queries" else "retrieval")
    for counted, predicted in differences(recipe, (1, 4), (1, 2), (2, 2)):
        assert predicted == pytest.approx(counted, rel=0.03)


class Saved:
    """Holds a tensor for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def peak_of(recipe, config):
    """(most bytes that autograd keeps at a time in a step of three micro-batches, predicted)."""
    model, objective = real(recipe, config), objective_of(recipe)
    kernels.apply_compute(model, torch.device("cpu"), recipe.compute)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive, peak = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal peak
        saved = Saved(tensor)
        alive.add(saved)
        storages = {one.tensor.untyped_storage() for one in alive}
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
        peak = max(peak, sum(sizes.values()))
        return saved

    batches = [batch_of(objective)] * 3
    counts = dict.fromkeys(objective.weights, 3.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        with torch.autocast("cpu", torch.bfloat16):
            objective.begin_step(model, iter(batches), counts)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                total = losses(objective, model, batch)
            total.backward()
    batch = activations(recipe, config, objective, batches[0])
    predicted = (recipe.objective.kept_micro_batches - 1) * batch.cached_graph()
    predicted += batch.all_casts() + batch.tower() + batch.language_in_turn()
    return peak, predicted - batch.cross_gradients()  # which no hook sees


@pytest.mark.slow
@pytest.mark.parametrize("kept_micro_batches", [1, 3])
def test_the_peak_of_a_step_in_micro_batches(kept_micro_batches):
    recipe = recipe_of("lora")
    settings = replace(recipe.objective, kept_micro_batches=kept_micro_batches)
    recipe = replace(recipe, objective=settings)
    made = [peak_of(recipe, config_of(*layers)) for layers in ((1, 2), (1, 4), (2, 4))]
    for less, more in pairwise(made):
        assert more[1] - less[1] == pytest.approx(more[0] - less[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("choice", ["full", "lora", "queries"])
@pytest.mark.usefixtures("graphs_alone")
def test_what_autograd_keeps_of_compiled_blocks(choice):
    recipe = recipe_of(choice, "stage2" if choice == "queries" else "retrieval", compile=True)
    # Blocks with and without cross-attention: once one by one, then together, for each is compiled.
    sizes = ((1, 1), (1, 2), (1, 3)) if choice == "full" else ((1, 1), (1, 3))
    for counted, predicted in differences(recipe, *sizes):
        assert predicted == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_frozen_tower_saw_is_kept_for_the_second_pass(choice):
    recipe, config = recipe_of(choice), config_of(1, 2)
    model, objective = real(recipe, config), objective_of(recipe)
    batches = [batch_of(objective)] * 3
    with torch.autocast("cpu", torch.bfloat16):
        objective.begin_step(model, iter(batches), {"itc": 3 * PAIRS})
    first, *others = objective._cached
    assert first.encoded is not None  # goes on from here, so nothing is seen again
    saw = [cached.vision for cached in others if cached.vision is not None]
    batch = activations(recipe, config, objective, batches[0])
    assert batch.cached_visual(2) == sum(vision.nbytes for vision in saw)
    assert bool(saw) == (choice in ("head", "queries"))
    batch.model.kept_bytes = batch.visual_bytes
    assert batch.cached_visual(2) == (batch.visual_bytes if saw else 0)


def test_a_plan_knows_who_looks_twice():
    """Cutting a step costs the tower's forward pass, but not where its output is kept."""
    config = config_of(2, 2)

    def first_pass(choice, **changes):
        recipe = recipe_of(choice)
        cut = replace(
            recipe,
            global_batch=4 * PAIRS,
            objective=replace(recipe.objective, micro_batch=PAIRS),
            model=replace(recipe.model, **changes),
        )
        model = plan.model_of(cut, config)
        seconds = time.seconds(cut, model, load_of(cut, model, None), gpus.find("H200"), 1)
        return dict(seconds)["first pass of gradient caching"]

    assert first_pass("head") < first_pass("head", drop_path=0.1)
    assert first_pass("full") == first_pass("full", drop_path=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointed_blocks_keep_what_enters_them(checkpointing):
    recipe = recipe_of("lora", checkpointing=checkpointing)
    ((counted, predicted),) = differences(recipe, (1, 2), (1, 4))
    # Checkpointing itself holds the images' keys and values, where no hook sees them.
    held = 2 * 2 * PAIRS * 17 * 256
    assert predicted == pytest.approx(counted + held, rel=0.03)


@pytest.mark.parametrize(("choice", "objective"), [("full", "retrieval"), ("full", "stage2")])
def test_states_are_those_of_the_real_run(choice, objective):
    """Trained weights that no loss reaches take no gradient and no moments."""
    recipe, config = recipe_of(choice, objective), config_of(1, 2)
    model = real(recipe, config)
    optimizer = optim.build(model, recipe.optim)
    made = objective_of(recipe)
    losses(made, model, batch_of(made)).backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [m for state in optimizer.state.values() for m in state.values() if m.ndim]
    empty = plan.model_of(recipe, config)
    found = memory.states(empty, recipe)
    assert found["trained weights"] == bytes_of(trained)
    assert found["gradients"] == bytes_of(p.grad for p in trained if p.grad is not None)
    scale = 2 * 4  # two moments of one number, which have no dimension
    assert found["optimizer states"] == bytes_of(moments) + scale
    assert found["gradients"] < found["trained weights"]
