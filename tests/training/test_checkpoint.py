"""Checkpoints of several ranks, and those that cannot be written, or only in part."""

import json
import subprocess

import pytest
import tiny_run
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from stopped_runs import EPOCH, run
from tiny_run import command, losses
from torch import nn

from internvl import export, train
from internvl.config import recipes
from internvl.inference import load as loading
from internvl.models.adapters import lora
from internvl.training import checkpoint, optim


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_checkpoints_one_after_the_other_hold_the_values_of_their_steps(device, tmp_path):
    """torch 2.11's own stager takes a single one; the copies outlive the steps that follow."""
    model = nn.Linear(300, 200).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    weights = {}
    with checkpoint.Saver(torch.device(device)) as saver:
        # One process on a CPU copies nothing, but several do, by this.
        saver._stager = saver._stager or checkpoint._stager(torch.device(device))
        for step in (1, 2, 3):
            model(torch.ones(2, 300, device=device)).sum().backward()
            optimizer.step()
            weights[step] = model.weight.detach().cpu().clone()
            saver.save(tmp_path, step, model, optimizer, {}, keep=3)
    for step, expected in weights.items():
        loaded = {"model.weight": torch.empty(200, 300)}
        dcp.load(loaded, checkpoint_id=tmp_path / f"{step:06d}", no_dist=True)
        assert torch.equal(loaded["model.weight"], expected)


@pytest.mark.parametrize("name", ["adamw", "offloaded"])
def test_a_weight_that_no_loss_had_reached_begins_at_its_first_step(tmp_path, name):
    """A tower, say, whose first images come after the checkpoint: texts alone went before."""

    def made():
        torch.manual_seed(0)
        model = nn.ModuleDict({"text": nn.Linear(4, 4), "image": nn.Linear(4, 4)})
        kind = torch.optim.AdamW if name == "adamw" else optim.OffloadedAdamW
        return model, kind(model.parameters(), lr=0.1)

    def step(model, optimizer, parts):
        sum(model[part](torch.ones(2, 4)).pow(2).sum() for part in parts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model, optimizer = made()
    step(model, optimizer, ["text"])
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)
    resumed, its_optimizer = made()
    checkpoint.load(tmp_path, 1, resumed, its_optimizer)
    for _ in range(3):
        step(model, optimizer, ["text", "image"])
        step(resumed, its_optimizer, ["text", "image"])
    for expected, found in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(project, tmp_path):
    """On a file system of 60 MiB two checkpoints of 23 MiB fit, a third does not."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("unshare -rm is not allowed here")
    disk = tmp_path / "disk"
    disk.mkdir()
    words = command(project, disk / "run", "checkpoint.every=2", "checkpoint.keep=9", "steps=20")
    script = (
        f"mount -t tmpfs -o size=60m tmpfs {disk} && {' '.join(map(repr, words))}; "
        f"echo code $?; ls -a {disk}/run/checkpoints"
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], check=False, capture_output=True, text=True
    )
    assert "code 1" in done.stdout, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "000002" in done.stdout
    assert "partial" not in done.stdout


def assert_close(folder, expected):
    steps = losses(folder)
    assert steps.keys() == expected.keys()
    found = torch.tensor(list(steps.values()), dtype=torch.float64)
    wanted = torch.tensor(list(expected.values()), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def straight(project, tmp_path_factory):
    """The samples and the losses of a run on one process, and its folder."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    names = run(project, folder, num_ranks=1)
    assert len(set(names)) == len(names) == 48
    return names, losses(folder), folder


def test_settings_of_the_optimizer_are_the_recipes_and_not_saved(tmp_path, monkeypatch):
    """Earlier versions wrote them with each parameter; such a checkpoint loads as well."""

    def stepped(lr):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    checkpoint.save(tmp_path / "now", 1, *stepped(0.1), {}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_is_setting", lambda name: False)
        checkpoint.save(tmp_path / "earlier", 1, *stepped(0.1), {}, keep=1)
    names = {
        form: {
            *dcp.FileSystemReader(tmp_path / form / "000001").read_metadata().state_dict_metadata
        }
        for form in ("now", "earlier")
    }
    assert {name for name in names["earlier"] if "param_groups" in name} == (
        names["earlier"] - names["now"]
    )
    for form in names:
        model, optimizer = stepped(0.2)
        checkpoint.load(tmp_path / form, 1, model, optimizer)
        assert torch.equal(model.weight, stepped(0.1)[0].weight)
        assert optimizer.param_groups[0]["lr"] == 0.2


COPIES = """
import json
from pathlib import Path
import torch
from torch import nn
from internvl import dist
from internvl.training import checkpoint

dist.init_from_env("cpu")
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 32)).sum().backward()
optimizer.step()
shared = checkpoint._shared_out(checkpoint._tensors(model, optimizer))
with checkpoint.Saver(torch.device("cpu")) as saver:
    saver.save(Path({folder!r}), 1, model, optimizer, {{}}, keep=1)
with torch.no_grad():
    expected = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.zero_()
checkpoint.load(Path({folder!r}), 1, model, optimizer)
same = all(map(torch.equal, model.parameters(), expected))
print(json.dumps([sorted(shared), checkpoint._num_bytes(shared), same]))
dist.shutdown()
"""


def test_what_all_ranks_have_is_copied_by_one_of_them(tmp_path):
    ranks = [json.loads(out) for out in run_ranks(COPIES.format(folder=str(tmp_path)))]
    (names, size, same), (other_names, other_size, other_same) = ranks
    assert same
    assert other_same
    assert not set(names) & set(other_names)
    assert other_size == pytest.approx(size, rel=0.1)


def test_a_run_goes_on_with_other_ranks_and_another_sharding(project, straight, tmp_path):
    folder = tmp_path / "run"
    names = run(project, folder, "parallel.shard=zero3", num_ranks=2, until=2)
    assert checkpoint.steps(folder / "checkpoints") == [2]
    names += run(project, folder, num_ranks=1, until=4)
    names += run(project, folder, "parallel.shard=zero1", num_ranks=2)
    assert sorted(names) == sorted(straight[0])
    assert_close(folder, straight[1])


@pytest.mark.slow
def test_four_ranks_go_on_from_one_and_from_two(project, straight, tmp_path):
    folder = tmp_path / "run"
    lora = ("parallel.shard=zero3", "parallel.replicas=2")
    names = run(project, folder, "parallel.shard=zero2", num_ranks=2, until=2)
    names += run(project, folder, num_ranks=1, until=3)
    names += run(project, folder, *lora, num_ranks=4, until=5)
    names += run(project, folder, num_ranks=1)
    assert sorted(names) == sorted(straight[0])
    assert_close(folder, straight[1])


@pytest.mark.slow
def test_export_and_loading_read_what_two_ranks_wrote(project, tmp_path):
    """Adapters are merged tensor by tensor, to the bits of a model merged in memory."""
    folder = tmp_path / "run"
    adapted = ("model.lora={rank: 4}", "model.train=[multi_modal_projector]", "steps=1")
    run(project, folder, "parallel.shard=zero3", *adapted, num_ranks=2)
    adapter = loading.load(folder / "adapter", device="cpu").model
    model = loading.load(folder, device="cpu").model
    written, loaded = lora.adapter_state(adapter), lora.adapter_state(model)
    assert written.keys() == loaded.keys()
    assert all(torch.equal(written[name], loaded[name]) for name in written)
    merged = lora.merge(model).state_dict()
    for format in ("hf", "official"):
        exported = export.run(folder, tmp_path / format, format)
        found = loading.load(exported, device="cpu", dtype="float32").model.state_dict()
        assert found.keys() == merged.keys()
        assert all(torch.equal(found[name], merged[name]) for name in merged)
    # One process that goes on from it writes the same values.
    words = [f"run={folder}", *EPOCH, *adapted, "global_batch=8"]
    state = train.build(recipes.load_recipe(project, words))
    checkpoint.load(folder / "checkpoints", 1, state.model, state.optimizer)
    checkpoint.save(tmp_path / "alone", 1, state.model, state.optimizer, {}, keep=1)
    alone = checkpoint.read_weights(tmp_path / "alone", 1)
    together = checkpoint.read_weights(folder / "checkpoints", 1)
    assert alone.keys() == together.keys()
    for name, tensor in together.items():
        assert torch.equal(tensor.read(), alone[name].read())
        rows = len(tensor.read())
        assert torch.equal(tensor.rows(1, rows - 1), alone[name].read()[1 : rows - 1])


FAILS = """
import resource
from internvl.training import checkpoint

class Limited(checkpoint.Saver):
    def save(self, folder, step, *values, **options):
        self.wait()
        if int(os.environ["RANK"]) == 1:
            limit = 300_000 if step in (2, 3, 6) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        super().save(folder, step, *values, **options)

checkpoint.Saver = Limited
"""


@pytest.mark.slow
def test_a_run_goes_on_while_a_rank_cannot_write_and_at_its_end_says_so(project, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(AssertionError) as failed:
        run(project, folder, "parallel.shard=zero3", num_ranks=2, before=FAILS)
    lines = str(failed.value).splitlines()
    sentences = [line for line in lines if line.startswith("internvl.errors.CheckpointError")]
    assert len(sentences) == 2
    assert len(set(sentences)) == 1
    assert f"checkpoint {folder / 'checkpoints/000006'} was not written" in sentences[0]
    assert "check the rights, the quota and the largest file (ulimit -f)" in sentences[0]
    for step in (2, 3):
        goes_on = [line for line in lines if f"checkpoints/{step:06d} was not written" in line]
        assert all("This run goes on, and saves again at the next" in line for line in goes_on)
        assert goes_on
    assert list(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "000005",
        "LATEST",
    ]


SHORT = ("parallel.shard=zero3", "steps=3")
KILLS = """
from internvl.training import checkpoint

original = {where}

def killed(*values, **options):
    if {name!r} in str(values) + str(options) and int(os.environ["RANK"]) == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*values, **options)

{where} = killed
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "rank", "left"),
    [
        ("checkpoint.dcp.save", ".000002", 1, {1}),  # its files are missing
        ("checkpoint.write_json", ".000002", 0, {1}),  # all files are there but the last
        ("checkpoint.shutil.rmtree", "checkpoints/000001", 0, {1, 2}),  # complete, not yet alone
    ],
)
def test_a_kill_within_a_checkpoint_costs_nothing(
    project, undisturbed, tmp_path, where, name, rank, left
):
    folder = tmp_path / "run"
    before = KILLS.format(where=where, name=name, rank=rank)
    with pytest.raises(AssertionError, match=f"rank {rank} failed"):
        run(project, folder, *SHORT, num_ranks=2, before=before)
    assert set(checkpoint.steps(folder / "checkpoints")) == left
    run(project, folder, *SHORT, num_ranks=2)
    assert losses(folder) == losses(undisturbed)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "000003",
        "LATEST",
    ]


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The folder of a sharded run of two ranks that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(project, folder, *SHORT, num_ranks=2)
    return folder
