"""Training pairs: what is drawn is a function of (seed, epoch, sample); bad ones are named."""

import json
import tarfile
from collections import Counter

import numpy as np
import pair_runs
import pytest
import torch
from PIL import Image

from internvl.config import SourceConfig
from internvl.config.recipes import resolve
from internvl.data.pair_reader import PairReader, image_and_caption, image_id_of, make_batch
from internvl.data.pairs import CaptionEncoder
from internvl.data.records import Sample
from internvl.data.sampler import UnitRef
from internvl.data.sources import open_source
from internvl.data.tokenizers import load_tokenizer
from internvl.errors import BadSample, ConfigError, DataError


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pair_runs.make(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(project):
    return CaptionEncoder(load_tokenizer(project / "start"))


def source(path, images, kind="flickr_format", **settings):
    config = SourceConfig(
        name=path.stem, type=kind, annotations=path, images=str(images), **settings
    )
    return open_source(config)


def reader(project, encoder, seed=0, **settings):
    return PairReader(
        [source(project / "captions.txt", project)], encoder, 28, seed=seed, **settings
    )


def ref(line, epoch=0):
    return UnitRef(0, (line,), epoch, line)


def only(read):
    (pair,) = read.units
    assert not read.bad
    return pair


def text(encoder, ids):
    return encoder.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_pair_is_a_function_of_seed_epoch_and_sample(project, encoder):
    first, again = reader(project, encoder), reader(project, encoder)
    [again[ref(line)] for line in (5, 9)]  # what was read before does not matter
    a, b = only(first[ref(3)]), only(again[ref(3)])
    assert torch.equal(a.pixels, b.pixels)
    assert (a.summary, a.positive, a.negative) == (b.summary, b.positive, b.negative)
    others = [only(first[ref(3, epoch=1)]), only(reader(project, encoder, seed=1)[ref(3)])]
    for other in others:
        assert not torch.equal(other.pixels, a.pixels)
        assert other.positive == a.positive
    assert len({pair.negative for pair in (a, *others)}) > 1


def test_what_a_pair_holds(project, encoder):
    pair = only(reader(project, encoder)[ref(1)])
    assert pair.pixels.shape == (3, 28, 28)
    assert pair.pixels.dtype == torch.uint8
    assert list(pair.positive) == encoder.matching("this image shows a red circle")
    assert list(pair.summary) == encoder.embedding("this image shows a red circle")
    assert (pair.written, pair.num_given) == ((), 0)
    same, other = (only(reader(project, encoder)[ref(line)]) for line in (0, 2))
    assert same.image_id == pair.image_id != other.image_id
    assert text(encoder, same.positive) == "a red circle"  # cleaned


def test_negatives_are_uniform_over_captions_of_other_pictures(project, encoder):
    made = reader(project, encoder)
    drawn = Counter(text(encoder, only(made[ref(0, epoch)]).negative) for epoch in range(60 * 46))
    assert not any("red circle" in caption for caption in drawn)
    assert len(drawn) == 46
    expected = 60
    chi2 = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi2 < 100  # 45 degrees of freedom: above once in 10^5


def test_negatives_come_from_every_source_and_not_from_the_same_picture(tmp_path, encoder):
    """The second file names the image of the first again, so only its other line is left."""
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    (tmp_path / "a.txt").write_text("1.jpg,red\n1.jpg,a red\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("1.jpg,image\n2.jpg,circle\n", encoding="utf-8")
    files = [source(tmp_path / name, tmp_path) for name in ("a.txt", "b.txt")]
    made = PairReader(files, encoder, 28, seed=0)
    for epoch in range(20):
        assert text(encoder, only(made[ref(0, epoch)]).negative) == "circle"
    alone = PairReader(files[:1], encoder, 28, seed=0)
    (bad,) = alone[ref(0)].bad
    assert str(bad).startswith(f"{tmp_path}/a.txt line 1: 100 draws found no caption of another")


def test_a_bad_line_is_the_cause_where_no_other_caption_is_left(tmp_path, encoder):
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    path = tmp_path / "a.txt"
    path.write_text("1.jpg,red\n2.jpg,\n", encoding="utf-8")
    made = PairReader([source(path, tmp_path)], encoder, 28, seed=0)
    (bad,) = made[ref(1)].bad
    (follows,) = made[ref(0)].bad
    assert str(bad) == f"{path} line 2: the caption is empty; write it or remove it"
    assert str(follows) == (
        f"{path} line 1: no good caption of another image is left; first mend {bad}"
    )


def test_captions_to_be_written(project, encoder):
    """The prompt's last token is supervised too, and the whole stays within 80 tokens."""
    pair = only(reader(project, encoder, written=True)[ref(0)])
    prompt = encoder.prompt("English caption:")
    assert pair.num_given == len(prompt) - 1
    assert list(pair.written) == [*prompt, *encoder.matching("a red circle")[1:]]
    batch = make_batch([pair, pair], [((pair.positive, 1),)] * 2, [True, True])
    width = batch.written_ids.shape[1]
    for position, target in zip(batch.loss_positions.tolist(), batch.targets.tolist(), strict=True):
        row, column = divmod(position, width)
        assert batch.written_ids[row, column + 1] == target
    assert batch.targets.tolist() == 2 * [prompt[-1], *pair.written[len(prompt) :]]


def test_long_captions_end_with_their_end(tmp_path, encoder):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "1.jpg")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "2.jpg")
    words = " ".join(["ä"] * 50)
    (tmp_path / "a.txt").write_text(f"1.jpg,{words}\n2.jpg,red\n", encoding="utf-8")
    files = [source(tmp_path / "a.txt", tmp_path, prompt="this image:")]
    pair = only(PairReader(files, encoder, 28, seed=0, written=True)[ref(0)])
    for ids in (pair.summary, pair.positive, pair.written):
        assert len(ids) == 80
        assert ids[-1] == encoder.tokenizer.eos_token_id
    prompt = encoder.prompt("this image:")
    assert list(pair.written[: len(prompt)]) == prompt


def test_bad_samples_are_named(tmp_path, encoder):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").write_bytes(b"no image")
    lines = ["image,caption", "1.jpg,red", "2.jpg,red", "1.jpg,!!", "1.jpg,", "3.jpg,red", "red"]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = PairReader([source(tmp_path / "a.txt", tmp_path)], encoder, 28, seed=0)
    said = [str(bad) for line in range(6) for bad in made[ref(line)].bad]
    for number, part in [
        (3, "2.jpg: not an image Pillow knows"),
        (4, "nothing is left of the caption once it is cleaned"),
        (5, "the caption is empty"),
        (6, "there is no image"),
        (7, "not `name.jpg,caption`"),
    ]:
        assert any(s.startswith(f"{tmp_path}/a.txt line {number}: ") and part in s for s in said)
    assert len(said) == 5


FORMS = {
    "karpathy.json": json.dumps(
        [{"image_id": "coco_7", "image": "1.jpg", "caption": "red"}] * 2
        + [{"image_id": "coco_8", "image": "2.jpg", "caption": "blue, circle"}]
    ),
    "pairs.jsonl": '{"image": "1.jpg", "caption": ["red", "red"]}\n'
    '{"image": "2.jpg", "caption": "blue, circle"}\n',
    "pairs.csv": 'image,caption\n1.jpg,red\n1.jpg,red\n2.jpg,"blue, circle"\n',
    "flickr.txt": "image,caption\n1.jpg,red\n1.jpg,red\n2.jpg,blue, circle\n",
    "split.json": json.dumps(
        {
            "images": [
                {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "red"}] * 2},
                {"filename": "2.jpg", "split": "restval", "sentences": [{"raw": "blue, circle"}]},
                {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "gone"}]},
            ]
        }
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_one_sample_for_each_caption(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    found = source(tmp_path / name, tmp_path, "pairs")
    samples = list(found.samples(range(len(found))))
    read = [(sample.images[0], sample.messages[-1].content) for sample in samples]
    one, two = str(tmp_path / "1.jpg"), str(tmp_path / "2.jpg")
    assert read == [(one, "red"), (one, "red"), (two, "blue, circle")]
    assert found.groups[0] == found.groups[1] != found.groups[2]
    assert image_id_of(one) != image_id_of(two)


def test_tars_need_no_prompt(project, encoder, tmp_path):
    """As `pairs`, a caption a line, they are the same pairs as those of the files; as `webdataset`
    there is one for each image."""
    for number in range(4):
        texts = pair_runs.captions_of("red", pair_runs.SHAPES[number])
        (tmp_path / f"{number}.txt").write_text("\n".join(texts), encoding="utf-8")
        with tarfile.open(tmp_path / f"{number // 2}.tar", "a") as tar:
            tar.add(project / f"{number:04d}.jpg", f"{number}.jpg")
            tar.add(tmp_path / f"{number}.txt", f"{number}.txt")
    wanted = reader(project, encoder)
    made = PairReader([source(tmp_path, ".", "pairs")], encoder, 28, seed=0)
    ids = set()
    for line in range(8):
        ours, theirs = only(made[ref(line)]), only(wanted[ref(line)])
        assert torch.equal(ours.pixels, theirs.pixels)
        assert (ours.summary, ours.positive) == (theirs.summary, theirs.positive)
        assert ours.negative != ours.positive
        assert ours.name.startswith(f"{tmp_path} {line // 4}.tar {line // 2}")
        ids.add(ours.image_id)
    assert len(ids) == 4
    groups = made.files[0].groups
    assert groups[::2].tolist() == groups[1::2].tolist()
    assert len({*groups}) == 4
    one_each = source(tmp_path / "1.tar", ".", "webdataset")
    assert len(one_each) == 2
    pair = only(PairReader([one_each], encoder, 28, seed=0, written=True)[ref(0)])
    prompt = encoder.prompt("English caption:")
    assert list(pair.written[: len(prompt)]) == prompt


def test_the_original_formats_by_their_names(tmp_path):
    for name, kind in (("karpathy.json", "coco_format"), ("flickr.txt", "flickr_format")):
        (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
        assert len(source(tmp_path / name, tmp_path, kind)) == 3
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="is neither a COCO caption file"):
        source(tmp_path / "other.json", tmp_path, "coco_format")


def test_pairs_need_no_prompt_and_answers_do(project):
    tree = {
        "model": {"id": "m", "train": ["heads"]},
        "data": {"sources": [{"name": "x", "annotations": "x.txt", "type": "flickr_format"}]},
        "run": "r",
        "global_batch": 8,
        "steps": 1,
    }
    assert resolve({**tree, "objective": {"name": "retrieval"}}).objective.micro_batch is None
    with pytest.raises(ConfigError, match="a source of type flickr_format needs a question"):
        resolve(tree)
    for objective, said in [
        ({"name": "retrieval", "weights": {"itg": 1}}, "has no such term; it has itc, itm"),
        ({"name": "retrieval", "weights": {"itc": 0, "itm": 0}}, "nothing is learned"),
        ({"name": "sft", "micro_batch": 2}, "set data.row_tokens instead"),
    ]:
        with pytest.raises(ConfigError, match=said):
            resolve({**tree, "objective": objective})


def test_crops_are_of_the_whole_picture_on_average(project, encoder):
    """Mirrored in half of the epochs."""
    halves = []
    ramp = np.linspace(0, 255, 64)[None, :, None].repeat(64, 0).repeat(3, 2).astype(np.uint8)
    folder = project / "ramp"
    folder.mkdir()
    Image.fromarray(ramp).save(folder / "1.png")
    Image.fromarray(ramp).save(folder / "2.png")
    (folder / "a.jsonl").write_text(
        '{"image": "1.png", "caption": "red"}\n{"image": "2.png", "caption": "red"}\n'
    )
    made = PairReader([source(folder / "a.jsonl", folder, "pairs")], encoder, 28, seed=0)
    for epoch in range(200):
        pixels = only(made[ref(0, epoch)]).pixels.float()
        halves.append(bool(pixels[..., :14].mean() > pixels[..., 14:].mean()))
    assert 70 < sum(halves) < 130


def test_a_chat_line_without_turns_has_no_caption():
    with pytest.raises(BadSample, match=r"^a line 1: it has no turn to take the caption from"):
        image_and_caption(Sample("a line 1", (), images=("a.png",)))
