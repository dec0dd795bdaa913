"""Shards train as one process does, whatever rows a rank has."""

from dataclasses import replace

import kills
import pair_runs
import pytest
import sharded_runs
import tiny_run
from ranks import run_ranks
from sharded_runs import CUT_TOWER, TRAINED, WHOLE_TOWER, Case

STAGES = ("zero1", "zero2", "zero3")
SMALL_STEPS = ("steps=2", "optim.lr=1e-4")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The small project, each sample with a row of its own, every second without an image."""
    return sharded_runs.project(tmp_path_factory.mktemp("project"))


def test_every_stage_takes_the_steps_of_one_process(project, tmp_path):
    """With a trained tower and tied embeddings; a rank has no row, then no image."""
    settings = ("global_batch=3", "data.max_tokens=64", *SMALL_STEPS)
    one = sharded_runs.take(project, tmp_path, {"one": Case(settings, deal="True")}, num_ranks=1)
    deal = "(rank == 0) == (step == 0 or row.num_tiles > 0)"
    cases = {s: Case((*settings, f"parallel.shard={s}"), deal=deal) for s in STAGES}
    several = sharded_runs.take(project, tmp_path, cases, num_ranks=2)
    for stage in STAGES:
        (_, (rows, tiles)), ((no_rows, _), (texts, no_tiles)) = several[stage].rows
        assert (min(rows, tiles, texts) > 0, no_rows, no_tiles) == (True, 0, 0)
        sharded_runs.assert_same(one["one"], several[stage])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "stages", "steps"), [(["full"], STAGES, 20), ([*TRAINED][1:], ["zero3"], 3)]
)
def test_losses_of_everything_that_trains(project, tmp_path, names, stages, steps):
    """With activation checkpointing and shared prefixes; one rank, then the other lacks images."""
    common = ("global_batch=2", "data.max_tokens=64", f"steps={steps}", "optim.lr=1e-4")
    common = (*common, "compute.checkpointing=full")
    deal = "ranks == 1 or (rank == step % 2) == (row.num_tiles > 0)"
    cases = {
        name: Case((*common, *TRAINED[name].settings), TRAINED[name].before, deal) for name in names
    }
    one = sharded_runs.take(project, tmp_path, cases, num_ranks=1)
    for stage in stages:
        cut = {
            name: replace(case, settings=(*case.settings, f"parallel.shard={stage}"))
            for name, case in cases.items()
        }
        for name, several in sharded_runs.take(project, tmp_path, cut, num_ranks=2).items():
            # Norms after the first step are of weights that rounding has led elsewhere.
            sharded_runs.assert_same(one[name], several, later=1e-4)


@pytest.mark.slow
def test_two_copies_of_two_shards(project, tmp_path):
    """On four ranks, of which one has no row; CPU offload, and 8-bit moments where torchao is."""
    common = ("global_batch=3", "data.max_tokens=64", "steps=3", "optim.lr=1e-4")
    deal = "(i + step) % 3 == rank if ranks > 1 else True"
    one = sharded_runs.take(project, tmp_path, {"one": Case(common, deal=deal)}, num_ranks=1)
    settings = {
        "zero1": ("parallel.shard=zero1",),
        "zero2": ("parallel.shard=zero2", "parallel.offload=cpu"),
        "zero3": ("parallel.shard=zero3", "parallel.offload=cpu"),
    }
    cases = {
        name: Case((*common, *more, "parallel.replicas=2"), deal=deal)
        for name, more in settings.items()
    }
    for several in sharded_runs.take(project, tmp_path, cases, num_ranks=4).values():
        sharded_runs.assert_same(one["one"], several)


@pytest.mark.slow
def test_compiled_blocks_of_shards(tmp_path):
    """Beside one process that compiles nothing."""
    project = tiny_run.make(tmp_path, size=kills.SIZE)
    common = ("global_batch=4", "data.max_tokens=128", *SMALL_STEPS)
    one = sharded_runs.take(project, tmp_path, {"one": Case(common)}, num_ranks=1)
    compiled = (*common, "compute.compile=true", "parallel.shard=zero3")
    cases = {
        "kept": Case(compiled),
        "recomputed": Case((*compiled, "compute.checkpointing=full")),
    }
    several = sharded_runs.take(project, tmp_path, cases, num_ranks=2)
    assert several["recomputed"].graphs > several["kept"].graphs > one["one"].graphs == 0
    for case in cases:
        sharded_runs.assert_same(one["one"], several[case], later=1e-4)


GRAPHS = """
from functools import partial

from torch._inductor import compile_fx

from internvl.compute import kernels

# As `graphs_alone`: to write and build their code would take most of the time.
compile_fx.compile_fx = partial(compile_fx.compile_fx, inner_compile=lambda graph, _, **more: graph)

def refuse():
    raise AssertionError("a block's graph ends inside of it")

kernels.nullcontext = refuse
"""


@pytest.mark.slow
def test_compiled_pairs_of_shards(tmp_path):
    """Of layers with cross-attention too a graph holds all: what is recomputed is compiled."""
    project = pair_runs.make(tmp_path / "pairs", objective={"name": "stage2"})
    common = ("global_batch=4", "steps=1", "optim.lr=1e-4")
    one = sharded_runs.take(project, tmp_path, {"one": Case(common)}, num_ranks=1)
    compiled = (*common, "compute={compile: true, checkpointing: full}", "parallel.shard=zero3")
    whole = Case(compiled, before=GRAPHS)
    several = sharded_runs.take(project, tmp_path, {"cut": whole}, num_ranks=2)
    assert several["cut"].graphs > 0
    sharded_runs.assert_same(one["one"], several["cut"])


@pytest.mark.slow
def test_8_bit_moments_of_shards(project, tmp_path):
    pytest.importorskip("torchao")
    # Compiled for every shape, the update takes minutes.
    before = "torch.compiler.set_stance('force_eager')"
    common = ("optim.name=adamw-8bit", *SMALL_STEPS)
    one = sharded_runs.take(project, tmp_path, {"one": Case(common, before)}, num_ranks=1)
    cases = {s: Case((*common, f"parallel.shard={s}"), before) for s in ("zero1", "zero3")}
    for several in sharded_runs.take(project, tmp_path, cases, num_ranks=2).values():
        sharded_runs.assert_same(one["one"], several)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "stages"), [("retrieval", STAGES), ("stage2", ["zero1"])])
def test_pairs_with_gradient_caching(tmp_path, objective, stages):
    """Micro-batches of two of five pairs, of which one rank has two and the other one."""
    project = pair_runs.make(tmp_path / "pairs", objective={"name": objective, "micro_batch": 2})
    common = ("global_batch=5", "compute.checkpointing=full", *SMALL_STEPS)
    frozen = (*common, "model.train=[language_model, heads]")
    ones = {"full": Case(common), "frozen": Case(frozen)}
    one = sharded_runs.take(project, tmp_path, ones, num_ranks=1)
    cases = {s: Case((*common, f"parallel.shard={s}"), WHOLE_TOWER) for s in stages}
    cases["frozen"] = Case((*frozen, "parallel.shard=zero3"), CUT_TOWER)
    several = sharded_runs.take(project, tmp_path, cases, num_ranks=2)
    for name in cases:
        sharded_runs.assert_same(one["frozen" if name == "frozen" else "full"], several[name])


MEMORY = """
import gc
import torch
from torch.distributed.tensor import DTensor

from internvl import dist, train
from internvl.config import recipes
from internvl.training.run import reading

def held():
    \"\"\"Bytes of all tensors of this process, each memory once.\"\"\"
    storages = {{}}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if tensor is not None and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

gc.freeze()  # what is there by now has no tensor of a run, and would be looked at every time
for stage in {stages!r}:
    settings = [*{settings!r}, "parallel.shard=" + stage]
    run = train.build(recipes.load_recipe({recipe!r}, settings))
    peaks = []

    def note(module, inputs, output):
        # In the second step, when there are moments.
        if run.step:
            output.register_hook(lambda gradient: peaks.append(held()))

    for layer in run.model.model.language_model.layers:
        layer.register_forward_hook(note)
    for step in reading.steps(run):
        train.train_step(run, step.batches)
    print(stage, len(step.batches), max(peaks), held())
    del run, layer, step
    gc.collect()
"""


@pytest.mark.slow
def test_each_stage_takes_less_memory_than_the_one_before(tmp_path):
    """Counted on both of two ranks, in the backward pass of a step of several rows and after it."""
    project = tiny_run.make(tmp_path / "images")  # in every row, or a rank has no gradient of some
    settings = ["data.max_tokens=64", "global_batch=12", "steps=2", f"run={tmp_path / 'run'}"]
    stages = ("none", *STAGES)
    code = MEMORY.format(stages=stages, settings=settings, recipe=str(project))
    for out in run_ranks(code):
        lines = [line.split() for line in out.splitlines()]
        assert [line[0] for line in lines] == list(stages)
        assert min(int(line[1]) for line in lines) > 1
        none, zero1, zero2, zero3 = (int(line[2]) for line in lines)
        assert zero3 < zero2 < zero1 < none
        after = [int(line[3]) for line in lines]
        # Weights and moments, 12 bytes a weight, are halves then under every stage.
        assert max(after[1:]) < 0.6 * after[0]
