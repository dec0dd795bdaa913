"""Steps: the same samples for any number of ranks and workers, and from any position."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_folders import GOLDEN
from data_files import chat_line, picture, write_lines
from PIL import Image

from internvl.config import DataConfig, SftConfig, SourceConfig, TilesConfig
from internvl.data import loader
from internvl.data.chat import ChatEncoder
from internvl.data.images import open_rgb, size_of
from internvl.data.records import IGNORE, Example, Unit
from internvl.data.sampler import SampleOrder, UnitRef
from internvl.data.sources import open_source
from internvl.data.templates import template
from internvl.data.tokenizers import load_tokenizer
from internvl.objectives.sft import Sft


def encode(samples, tiles):
    """A unit per group of samples; ids say nothing here, names do."""
    ids = np.arange(4)
    examples = tuple(Example(s.name, ids, np.where(ids > 1, ids, IGNORE)) for s in samples)
    return [Unit(examples, 0, None if tiles is None else tiles.pixels)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(9):
        picture(folder / f"{number}.png", (30, 20))
        rows += [chat_line("<image>\nWhat?", f"{number}", image=f"{number}.png")] * (1 + number % 3)
    write_lines(folder / "chat.jsonl", rows)  # 18 lines in 9 groups
    write_lines(folder / "text.jsonl", [chat_line("Say", str(i)) for i in range(5)])
    return folder


def build(folder, share=True, workers=0, repeat=1.0):
    sources = (
        SourceConfig(name="chat", annotations=folder / "chat.jsonl", images=folder, repeat=repeat),
        SourceConfig(name="text", annotations=folder / "text.jsonl"),
    )
    data = DataConfig(
        sources=sources, share_prefix=share, workers=workers, tiles=TilesConfig(size=28)
    )
    files = [open_source(source) for source in sources]
    order = SampleOrder(files, share_prefix=share, seed=3)
    return order, loader.UnitReader(files, data, encode, pixels=False)


def names(step):
    return [e.name for unit in step.batches for e in unit.examples]


def run(folder, *, ranks=1, workers=0, share=True, first=0, last=9, total=56, global_batch=7):
    """The sample names of every step, of all ranks together."""
    order, reader = build(folder, share, workers)
    found = [[] for _ in range(first, last)]
    for rank in range(ranks):
        for step in loader.steps(
            order,
            reader,
            list,
            first=first,
            last=last,
            global_batch=global_batch,
            total=total,
            workers=workers,
            rank=rank,
            world_size=ranks,
        ):
            found[step.index - first] += names(step)
    return found


@pytest.mark.parametrize("share", [True, False])
def test_every_sample_once_an_epoch_and_steps_of_exactly_a_batch(folder, share):
    order, _ = build(folder, share)
    assert (len(order), order.num_groups) == (23, 14 if share else 23)
    steps = run(folder, share=share, last=7, total=46)
    assert [len(step) for step in steps] == [7] * 6 + [4]
    seen = [name for step in steps for name in step]
    assert len(set(seen[:23])) == 23
    assert sorted(seen[:23]) == sorted(seen[23:])
    assert seen[:23] != seen[23:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of few cores
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_workers_see_the_same_steps(folder, ranks, workers):
    wanted = [sorted(step) for step in run(folder, last=4)]
    found = [sorted(step) for step in run(folder, ranks=ranks, workers=workers, last=4)]
    assert found == wanted


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_workers_hand_over_in_groups_is_what_was_read(folder, tmp_path, ranks):
    """Units, their pixels and bad samples, in the same order, in groups of other sizes each."""
    rows = [chat_line("<image>\nW?", str(n), image=f"{folder}/{n % 9}.png") for n in range(40)]
    rows[11] = b"{"
    rows[23] = chat_line("<image>\nW?", "gone", image="none.png")
    write_lines(tmp_path / "chat.jsonl", rows)
    source = SourceConfig(name="chat", annotations=tmp_path / "chat.jsonl", images="/")
    data = DataConfig(sources=(source,), tiles=TilesConfig(size=28, max=4))
    files = [open_source(source)]
    order = SampleOrder(files, share_prefix=False, seed=3)
    reader = loader.UnitReader(files, data, encode)

    def found(workers, rank):
        for step in loader.steps(
            order,
            reader,
            list,
            first=0,
            last=3,
            global_batch=37,
            total=100,
            workers=workers,
            rank=rank,
            world_size=ranks,
        ):
            yield names(step), [unit.tiles for unit in step.batches], [str(b) for b in step.bad]

    num_bad = 0
    for rank in range(ranks):
        steps = [[*found(workers, rank)] for workers in (0, 1, 3)]
        for wanted, *others in zip(*steps, strict=True):
            num_bad += len(wanted[2])
            for other in others:
                assert (other[0], other[2]) == (wanted[0], wanted[2])
                assert all(map(torch.equal, other[1], wanted[1]))
    assert num_bad in (4, 5, 6)  # 2 in each of two epochs and a half


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_from_the_middle(folder, workers):
    whole = run(folder, last=8)
    assert run(folder, workers=workers, first=5, last=8) == whole[5:]
    # Another number of ranks after the interruption: every sample of the run still once.
    rest = run(folder, ranks=2, workers=workers, first=5, last=8)
    assert [sorted(step) for step in rest] == [sorted(step) for step in whole[5:]]


def test_repeat(folder):
    order, _ = build(folder, repeat=2.5)
    assert len(order) == 18 * 2 + 9 + 5
    shown = [line for ref in order.step(0, 50, 50) for line in ref.lines if ref.file == 0]
    assert np.bincount(shown).tolist() == [3] * 9 + [2] * 9
    order, _ = build(folder, repeat=0.25)
    assert len(order) == 4 + 5


def test_a_group_is_one_unit_where_a_step_takes_it_whole(folder):
    order, _ = build(folder)
    sizes = sorted(len(ref.lines) for ref in order.step(0, 23, 23))
    assert sizes == [1] * 5 + [1] * 3 + [2] * 3 + [3] * 3


def test_the_order_depends_on_seed_and_epoch_only(folder):
    first, again = (build(folder)[0] for _ in range(2))
    assert first.step(2, 7, 100) == again.step(2, 7, 100)
    other = SampleOrder(first.files, share_prefix=True, seed=4)
    assert other.step(2, 7, 100) != first.step(2, 7, 100)


def test_all_kinds_in_one_file_become_rows(tmp_path):
    """Text, one image, several, a video, OpenAI style: encoded, packed, tiles in their places."""
    picture(tmp_path / "a.png", (168, 84))
    picture(tmp_path / "b.png", (84, 84))
    for number in range(3):
        picture(tmp_path / "clip" / f"frame_{number}.png", (100, 60))
    openai = [{"role": "user", "content": "<image>\nC?"}, {"role": "assistant", "content": "c"}]
    rows = [
        chat_line("Text?", "t"),
        chat_line("<image>\nA?", "a", image="a.png"),
        chat_line("<image> and <image>\nB?", "b", image=["a.png", "b.png"]),
        chat_line("<video>\nD?", "d", video="clip/"),
        {"messages": openai, "images": ["b.png"]},
    ]
    write_lines(tmp_path / "x.jsonl", rows)
    config = SourceConfig(name="x", annotations=tmp_path / "x.jsonl", images=tmp_path, augment=True)
    data = DataConfig(sources=(config,), workers=0, tiles=TilesConfig(size=84, max=6))
    tokenizer = load_tokenizer(GOLDEN / "label_masks" / "tokenizer_qwen2")
    objective = Sft(SftConfig(), data, ChatEncoder(tokenizer, template("internvl2_5"), 9))
    files = [open_source(config)]
    order = SampleOrder(files, share_prefix=True, seed=0)

    def step(seed):
        reader = loader.UnitReader(files, data, objective.encode, seed=seed)
        (found,) = loader.steps(
            order, reader, objective.batches, first=0, last=1, global_batch=5, total=5
        )
        assert found.bad == []
        return found.batches

    (row,) = step(0)
    assert (row.num_samples, row.num_tiles) == (5, 0 + 3 + (3 + 1) + 3 + 1)
    assert int((row.input_ids == objective.encoder.context_id).sum()) == 9 * row.num_tiles
    assert row.pixel_values.shape == (11, 3, 84, 84)
    assert torch.equal(step(0)[0].pixel_values, row.pixel_values)
    assert not torch.equal(step(1)[0].pixel_values, row.pixel_values)  # other JPEG qualities


def test_a_sample_of_too_many_tiles_is_a_bad_sample(folder):
    order, reader = build(folder)
    reader.config = replace(reader.config, max_tiles=1, tiles=TilesConfig(size=28, min=2))
    (step,) = loader.steps(order, reader, list, first=0, last=1, global_batch=23, total=23)
    assert len(step.bad) == 18
    assert "tiles, but a row takes 1; raise data.max_tiles or lower" in step.bad[0].reason
    assert len(names(step)) == 5


def test_exif_orientation_and_images_beyond_jpeg(tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    file = picture(tmp_path / "turned.jpg", (60, 40), exif=orientation)
    picture(tmp_path / "frames" / "frame_1.jpg", (60, 40), exif=orientation)
    Image.new("RGB", (65_600, 1)).save(tmp_path / "wide.png")
    rows = [
        chat_line("<image>\nWhat?", "1", image="turned.jpg"),
        chat_line("<video>\nWhat?", "1", video="frames/"),
        chat_line("<image>\nWhat?", "1", image="wide.png"),
    ]
    path = write_lines(tmp_path / "chat.jsonl", rows)
    source = SourceConfig(name="chat", annotations=path, images=tmp_path, augment=True)
    for exif, size in (("ignore", (60, 40)), ("apply", (40, 60))):
        data = DataConfig(sources=(source,), exif=exif, tiles=TilesConfig(size=28, max=1))
        reader = loader.UnitReader([open_source(source)], data, encode)
        ref = UnitRef(0, (0,), 0)
        for line in (0, 1):
            (sample,) = reader.files[0].samples([line])
            (pixels, *_), _ = reader.images(sample, ref)
            assert size_of(pixels) == size
            assert np.array_equal(pixels, open_rgb(file, exif))
        (bad,) = reader[UnitRef(0, (2,), 0, 2)].bad
        assert "65600 x 1 pixels cannot be degraded" in bad.reason
