"""Packed rows give the loss and every gradient of their samples one by one."""

import json

import numpy as np
import pytest
import torch
from chat_folders import GOLDEN, IMAGE_TOKEN_ID, KEPT, golden_folder
from safetensors.torch import load_file

from internvl.config import DataConfig, SftConfig
from internvl.data.packing import (
    WEIGHTS,
    best_fit,
    first_buffer,
    least_padded,
    make_units,
    pack,
    padded_tokens,
    unpack,
)
from internvl.data.records import IGNORE, Example, Unit
from internvl.errors import BadSample
from internvl.inference import load as loading
from internvl.models.attention.packed import dense_mask
from internvl.models.chat.model import Supervision
from internvl.models.vision import normalize_tiles
from internvl.objectives.sft import Sft

K = 9  # visual tokens of an 84-pixel tile
SOURCES = [{"name": "x", "annotations": "x.jsonl"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path_factory.mktemp("model"))
    return loading.load(
        folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32"
    ).model.train()


def example(rng, name, lead, *turns, num_tiles=1):
    """Ids `lead` (an image's placeholders among them), then (question, answer) lengths."""
    ids, labels = list(lead), [IGNORE] * len(lead)
    for question, answer in turns:
        new = rng.integers(10, 500, question + answer).tolist()
        ids += new
        labels += [IGNORE] * question + new[question:]
    tiles = (num_tiles,) if num_tiles else ()
    return Example(name, np.array(ids), np.array(labels), tiles)


def lead(rng, num_tiles, text):
    return [5, *[IMAGE_TOKEN_ID] * (K * num_tiles), 6, *rng.integers(10, 500, text).tolist()]


def tiles(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 84, 84), dtype=torch.uint8, generator=generator)


def five_captions(rng):
    shared = lead(rng, 2, 4)
    names = [f"caption {i}" for i in range(5)]
    return [example(rng, n, shared, (0, 2 + i), num_tiles=2) for i, n in enumerate(names)], tiles(
        1, 2
    )


def many_questions(rng):
    shared = lead(rng, 1, 2)
    return [example(rng, f"vqa {i}", shared, (3 + i, 1 + i % 2)) for i in range(4)], tiles(2, 1)


def two_turns(rng):
    """Two samples whose first turn is the same, answer included; and one of its own."""
    first = example(rng, "turns 0", lead(rng, 1, 3), (2, 3), (4, 2))
    second = Example("turns 1", first.input_ids[:-2], first.labels[:-2], (1,))
    other = example(rng, "turns 2", first.input_ids[:14].tolist(), (5, 2), (1, 1))
    return [first, second, other], tiles(3, 1)


def text_only(rng):
    return [example(rng, "text", [7, 8, 9], (4, 5), num_tiles=0)], None


GROUPS = (five_captions, many_questions, two_turns, text_only)


def objective(weighting="token", **data):
    config = DataConfig(sources=SOURCES, **{"max_tokens": 256, "max_tiles": 8, **data})
    encoder = type("Encoder", (), {"context_id": IMAGE_TOKEN_ID, "tokens_per_tile": K})()
    return Sft(SftConfig(weighting=weighting), config, encoder)


def units_of(groups, share):
    return [
        unit
        for examples, pixels in groups
        for unit in make_units(examples, pixels, IMAGE_TOKEN_ID, share=share)
    ]


def step(model, objective, units):
    """(rows, loss, gradients) of one optimizer step, as the loop computes them."""
    rows = objective.batches(units)
    count = sum(objective.counts(row)["sft"] for row in rows)
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for row in rows:
        term = objective(model, row)["sft"] / count
        term.backward()
        loss += float(term.detach())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return rows, loss, gradients


def unpacked(model, groups, weighting):
    """The same through the model's own forward, one sample a call."""
    terms = []
    for examples, pixels in groups:
        for e in examples:
            positions = np.flatnonzero(e.labels != IGNORE)
            weight = WEIGHTS[weighting](len(positions))
            terms.append((e, pixels, torch.from_numpy(positions), weight))
    count = sum(len(positions) * weight for _, _, positions, weight in terms)
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for e, pixels, positions, weight in terms:
        targets = torch.from_numpy(e.labels)[positions]
        output = model(
            input_ids=torch.from_numpy(e.input_ids)[None],
            pixel_values=None if pixels is None else normalize_tiles(pixels, torch.float32),
            supervision=Supervision(positions - 1, targets, torch.full((len(positions),), weight)),
        )
        (output.loss / count).backward()
        loss += float(output.loss.detach()) / count
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=2e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("share", [True, False])
def test_packed_equals_unpacked(model, weighting, share):
    groups = [group(np.random.default_rng(0)) for group in GROUPS]
    rows, *found = step(model, objective(weighting), units_of(groups, share))
    assert len(rows) == (1 if share else 3)
    assert_same(found, unpacked(model, groups, weighting))


@pytest.mark.parametrize("group", GROUPS[:3])
def test_a_prefix_is_shared(group):
    examples, pixels = group(np.random.default_rng(0))
    (unit,) = make_units(examples, pixels, IMAGE_TOKEN_ID, share=True)
    separate = make_units(examples, pixels, IMAGE_TOKEN_ID, share=False)
    saved = (len(examples) - 1) * unit.prefix
    assert unit.num_tokens == sum(one.num_tokens for one in separate) - saved
    assert unit.num_tiles == len(pixels)
    assert unit.prefix >= K * len(pixels) + 2


@pytest.mark.parametrize("share", [True, False])
def test_a_row_gives_its_examples_back(share):
    rng = np.random.default_rng(0)
    shared = lead(rng, 1, 2)
    # The first question is asked, the second sample answers at once: both follow the same prefix.
    mixed = [example(rng, "asks", shared, (3, 2)), example(rng, "answers", shared, (0, 4))]
    groups = [five_captions(rng), many_questions(rng), text_only(rng), (mixed, tiles(3, 1))]
    (row,) = pack(units_of(groups, share), max_tokens=4096, max_tiles=48)
    found = {example.name: example for example in unpack(row)}
    wanted = {example.name: example for group, _ in groups for example in group}
    assert found.keys() == wanted.keys()
    for name, given in wanted.items():
        assert found[name].input_ids.tolist() == given.input_ids.tolist(), name
        assert found[name].labels.tolist() == given.labels.tolist(), name


def test_a_prefix_without_the_picture_is_not_shared():
    rng = np.random.default_rng(0)
    examples = [example(rng, str(i), [5, i + 10, *[IMAGE_TOKEN_ID] * K], (2, 2)) for i in range(2)]
    assert len(make_units(examples, tiles(0, 1), IMAGE_TOKEN_ID, share=True)) == 2


def test_a_step_cut_in_1_2_and_8_has_one_gradient(model):
    """8 samples as 1 row of 8, about 2 rows of 4, 8 rows of 1."""
    rng = np.random.default_rng(1)
    groups = [
        ([example(rng, str(i), lead(rng, 1, 3), (2, 1 + i % 4))], tiles(i, 1)) for i in range(8)
    ]
    units = units_of(groups, share=True)
    cuts = {}
    for max_tiles in (8, 4, 1):
        rows, *result = step(model, objective(max_tiles=max_tiles), units)
        cuts[len(rows)] = result
    assert sorted(cuts) == [1, 2, 8]
    for found in (cuts[2], cuts[8]):
        assert_same(found, cuts[1])


def test_documents_do_not_see_each_other(model):
    rng = np.random.default_rng(2)
    groups = [([example(rng, str(i), lead(rng, 1, 3), (2, 3))], tiles(i, 1)) for i in range(3)]
    (row,) = objective().batches(units_of(groups, share=True))
    with torch.no_grad():
        together = objective()(model, row)["sft"]
        changed = row.input_ids.clone()
        first = (row.document == 0) & (row.input_ids[0] != IMAGE_TOKEN_ID)
        changed[0, first] = (changed[0, first] + 7) % 400 + 10
        kept = row.document[row.loss_positions] > 0
        row.loss_weights = torch.where(kept, 1.0, 0.0)
        before = objective()(model, row)["sft"]
        row.input_ids = changed
        after = objective()(model, row)["sft"]
    assert float(together) != float(before)
    assert float(after) == pytest.approx(float(before), rel=1e-6)


@pytest.mark.parametrize("case", ["internlm2", "qwen2"])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_golden_packed_rows(case, weighting, tmp_path):
    """The original's packed forward: three samples in a row, and each way to weight them."""
    golden = load_file(GOLDEN / "packed_forward" / "tensors.safetensors")
    results = json.loads((GOLDEN / "packed_forward" / "results.json").read_text())[case]
    inputs = {
        key.split(".input.")[1]: value
        for key, value in golden.items()
        if key.startswith(f"{case}.input.")
    }
    folder = golden_folder(f"chat_{case}", "v2.sel-1", tmp_path)
    model = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32").model
    ends = inputs["cu_seqlens"][0].tolist()
    names = [str(i) for i in range(len(ends) - 1)]
    pieces = zip(names, ends, ends[1:], strict=False)
    units = [
        Unit((Example(n, *(inputs[k][0, a:b].numpy() for k in ("input_ids", "labels"))),), 0, None)
        for n, a, b in pieces
    ]
    (row,) = pack(units, max_tokens=128, max_tiles=8, weighting=weighting)
    # Longest first, as these already are, so that the rows are equal position by position.
    assert row.input_ids.equal(inputs["input_ids"])
    assert row.position_ids.equal(inputs["position_ids"])
    flags = inputs["image_flags"].bool()
    mask = dense_mask(row.document, row.branch)
    with torch.no_grad():
        given = {
            "input_ids": row.input_ids,
            "position_ids": row.position_ids,
            "attention_mask": mask,
            "pixel_values": inputs["pixel_values"][flags],
        }
        logits = model(**given).logits
        supervision = Supervision(row.loss_positions, row.targets, row.loss_weights)
        loss = model(**given, supervision=supervision).loss / row.loss_weights.sum()
    torch.testing.assert_close(
        logits[..., KEPT], golden[f"{case}.pad0.logits"], atol=1e-4, rtol=1e-5
    )
    wanted = results[f"{case}.{weighting}.pad0"]["loss"]
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def sized(tokens, num_tiles=0, name="x"):
    pixels = torch.zeros(num_tiles, 3, 0, 0, dtype=torch.uint8) if num_tiles else None
    ids = np.arange(tokens)
    return Unit((Example(name, ids, np.where(ids > 0, ids, IGNORE)),), 0, pixels)


def test_rows_keep_to_both_budgets_and_hold_every_sample_once():
    rng = np.random.default_rng(0)
    units = [
        sized(int(t), int(n), str(i))
        for i, (t, n) in enumerate(
            zip(rng.integers(2, 100, 300), rng.integers(0, 9, 300), strict=True)
        )
    ]
    rows = pack(units, max_tokens=128, max_tiles=12)
    assert sorted(name for row in rows for name in row.names) == sorted(map(str, range(300)))
    assert all(row.num_tokens <= 128 and row.num_tiles <= 12 for row in rows)
    assert sum(row.num_tokens for row in rows) == sum(unit.num_tokens for unit in units)


def test_a_sample_beyond_a_row_is_a_bad_sample():
    with pytest.raises(BadSample, match="far: 200 tokens, but a row takes 128; raise data.max_tok"):
        pack([sized(200, name="far")], max_tokens=128, max_tiles=12)
    with pytest.raises(BadSample, match="13 tiles, but a row takes 12; raise data.max_tiles"):
        pack([sized(20, 13)], max_tokens=128, max_tiles=12)


def test_a_group_beyond_a_row_repeats_its_prefix():
    examples, pixels = five_captions(np.random.default_rng(0))
    (unit,) = make_units(examples, pixels, IMAGE_TOKEN_ID, share=True)
    rows = pack([unit], max_tokens=unit.prefix + 10, max_tiles=2)
    assert [row.num_samples for row in rows] == [3, 1, 1]
    assert all(row.num_tiles == 2 for row in rows)


def test_official_packing_by_hand():
    """Buffers with the most tiles first; full rows leave at once; the rest at the end."""
    sizes = [(40, 2), (50, 4), (30, 1), (100, 0), (70, 3), (5, 0), (60, 1)]
    # 1 joins 0; 2 opens; 3 is full alone; 4 fills up 2; 5 joins the first again; 6 opens.
    rows = first_buffer(sizes, 100, 8, 20)
    assert rows == [[3], [2, 4], [0, 1, 5], [6]]
    assert first_buffer([(10, 8), (20, 1)], 100, 8, 20) == [[0], [1]]
    assert first_buffer([(60, 1), (60, 2), (60, 3)], 100, 8, 1) == [[1], [2], [0]]


def test_official_packing_counts_the_white_tile_of_a_text():
    """Rows of the original's `PackedDataset`: 6 tiles, 100 tokens, 3 buffers, no overflow."""
    sizes = [
        *((41, 0), (49, 1), (5, 0), (49, 3), (30, 0), (32, 3), (39, 2), (20, 3), (58, 0), (7, 0)),
        *((19, 2), (25, 1), (35, 2), (26, 2), (11, 2), (6, 0), (4, 3), (6, 1), (12, 3), (59, 0)),
        *((14, 0), (40, 3), (46, 0), (17, 0)),
    ]
    wanted = [
        *([5, 6], [7, 8, 10], [3, 4, 9], [11, 12, 13, 15], [0, 1, 2, 16], [14, 17, 18]),
        *([21, 22], [19, 20, 23]),
    ]
    assert first_buffer(sizes, 100, 6, 3) == wanted
    units = [sized(tokens, num_tiles, str(i)) for i, (tokens, num_tiles) in enumerate(sizes)]
    rows = pack(units, max_tokens=100, max_tiles=6, packing="official", num_buffers=3)
    assert [row.names for row in rows] == [tuple(map(str, row)) for row in wanted]
    # The white tile itself is not shown to the model.
    assert [row.num_tiles for row in rows] == [sum(sizes[i][1] for i in row) for row in wanted]


CONTEXT = 2


def overflowing(number, question, images, answer, per_image=1):
    """A sample of a question, image blocks of three placeholders a tile, and an answer."""
    block = [1, *[CONTEXT] * 3 * per_image, 3] * images
    ids = [100 + number] * question + block + [100 + number] * answer
    labels = [IGNORE] * (len(ids) - answer) + [100 + number] * answer
    count = images * per_image
    pixels = torch.full((count, 3, 1, 1), number, dtype=torch.uint8) if count else None
    example = Example(str(number), np.array(ids), np.array(labels), (per_image,) * images)
    return Unit((example,), 0, pixels)


def overfilled(units, max_tokens=50, max_tiles=8, num_buffers=4):
    """(name, tokens, tiles, supervised) of every sample of every row."""
    rows = pack(
        units,
        max_tokens=max_tokens,
        max_tiles=max_tiles,
        packing="official",
        num_buffers=num_buffers,
        branches=False,
        overflow_id=CONTEXT,
    )
    for row in rows:
        assert row.num_tiles * 3 == int((row.input_ids == CONTEXT).sum())
        assert row.position_ids[0, row.starts[:-1]].tolist() == [0] * row.num_samples
    return [
        [
            (e.name, len(e.input_ids), int((e.input_ids == 1).sum()), e.num_supervised)
            for e in unpack(row)
        ]
        for row in rows
    ]


def test_overflow_cuts_rows_as_the_original_does():
    """Rows of the original's `PackedDataset`: 8 tiles, 50 tokens, 4 buffers, overflow."""
    specs = [
        *((2, 3, 6), (5, 3, 13), (5, 1, 6), (1, 1, 11), (0, 3, 13), (3, 2, 6), (4, 3, 13)),
        *((4, 2, 10), (3, 3, 13), (4, 1, 6), (5, 3, 8), (5, 1, 11), (5, 1, 13), (5, 3, 6)),
    ]
    assert overfilled([overflowing(i, *spec) for i, spec in enumerate(specs)]) == [
        [("1", 33, 3, 13), ("3", 17, 1, 11)],
        [("6", 23, 2, 13), ("7", 24, 2, 10), ("8", 3, 0, 0)],
        [("4", 28, 3, 13), ("5", 19, 2, 6)],
        [("0", 23, 3, 6), ("2", 16, 1, 6), ("6", 9, 1, 0)],
        [("8", 28, 3, 13), ("9", 15, 1, 6), ("10", 5, 0, 0)],
        [("10", 23, 3, 8), ("11", 21, 1, 11), ("12", 5, 0, 0)],
        [("12", 18, 1, 13), ("13", 26, 3, 6)],
    ]


def test_overflow_keeps_images_of_several_tiles_whole():
    """The original counts one tile an image when it cuts, and stops on these."""
    units = [overflowing(0, 0, 1, 30, 3), overflowing(1, 8, 2, 9, 2), overflowing(2, 20, 0, 22)]
    # Token 50 lies in the first image of 1, so the row of 0 ends before it, and the rest of 1 is a
    # row with more tiles, which leaves first. The text overfills the other, and has no image.
    assert overfilled(units, num_buffers=1) == [
        [("1", 25, 2, 9)],
        [("0", 41, 1, 30), ("1", 8, 0, 0), ("2", 1, 0, 0)],
    ]


def test_a_sample_without_anything_supervised_weighs_nothing():
    ids = np.arange(5, 10)
    silent = Unit((Example("silent", ids, np.full(5, IGNORE)),), 0, None)
    for weighting in WEIGHTS:
        (row,) = pack([silent, sized(4)], max_tokens=20, max_tiles=1, weighting=weighting)
        assert (row.num_samples, row.targets.tolist()) == (2, [1, 2, 3])
        assert row.loss_weights.sum() == pytest.approx(WEIGHTS[weighting](3) * 3)
        (row,) = pack([silent], max_tokens=20, max_tiles=1, weighting=weighting)
        assert (len(row.loss_weights), WEIGHTS[weighting](0)) == (0, 1.0 * (weighting == "token"))
        sft = objective(weighting)
        sft.config = SftConfig(weighting=weighting, loss_normalization="micro_batch")
        (row,) = sft.batches([silent])
        assert sft.counts(row) == {"sft": 0.0}


def test_official_packing_gives_the_same_loss(model):
    groups = [group(np.random.default_rng(0)) for group in GROUPS]
    units = units_of(groups, share=True)
    _, *wanted = step(model, objective(), units)
    rows = pack(units, max_tokens=256, max_tiles=8, packing="official")
    assert sorted(n for row in rows for n in row.names) == sorted(
        e.name for unit in units for e in unit.examples
    )
    assert sum(row.num_tokens for row in rows) == sum(unit.num_tokens for unit in units)
    assert wanted[0] > 0


def v12_like(count, seed=0):
    """(tokens, tiles) of a mixture like Chat-V1-2's: text, photos, documents, long dialogues."""
    rng = np.random.default_rng(seed)
    sizes = []
    for kind in rng.choice(4, count, p=[0.15, 0.5, 0.25, 0.1]):
        tiles = (0, rng.choice([5, 7]), rng.choice([7, 10, 13]), rng.choice([5, 7]))[kind]
        mean, spread = ((6.3, 0.7), (5.2, 0.6), (5.3, 0.7), (6.8, 0.4))[kind]
        text = int(np.clip(rng.lognormal(mean, spread), 60, 4096 - 256 * tiles))
        sizes.append((text + 256 * int(tiles), int(tiles)))
    return sizes


def test_rows_of_a_mixture_are_full():
    sizes = v12_like(1024)
    rows = best_fit(sizes, 16384, 64)
    filled = sum(tokens for tokens, _ in sizes) / (16384 * len(rows))
    assert filled >= 0.97


def padded(rows, sizes, max_tokens):
    return sum(padded_tokens(sum(sizes[i][0] for i in row), max_tokens) for row in rows)


def test_short_rows_take_what_whole_ones_would_pad():
    sizes = [(100, 0)] * 12  # of rows of ten: one whole and a fifth, or two of five eighths
    rows = least_padded(sizes, 1000, 64)
    assert sorted(len(row) for row in rows) == [6, 6]
    assert sorted(i for row in rows for i in row) == list(range(12))
    assert least_padded([(700, 0), (700, 0)], 1000, 64) == [[0], [1]]  # none fits a short row


@pytest.mark.parametrize("count", [5, 40, 128])
def test_no_piece_is_lost_and_no_more_is_padded(count):
    sizes = v12_like(count)
    rows = least_padded(sizes, 16384, 64)
    assert sorted(i for row in rows for i in row) == list(range(count))
    for row in rows:
        assert sum(sizes[i][0] for i in row) <= 16384
        assert sum(sizes[i][1] for i in row) <= 64
    assert padded(rows, sizes, 16384) <= padded(best_fit(sizes, 16384, 64), sizes, 16384)
