"""Every kind of source: its samples, its groups, and the sentence for what is wrong."""

import io
import json
import tarfile

import numpy as np
import pytest
from data_files import SHARED, chat_line, picture, turns, write_lines
from PIL import Image
from source_samples import good, opened, samples, says

from internvl.config import DataConfig, SourceConfig, recipes
from internvl.data import sampler
from internvl.data.images import FileSlice, open_rgb
from internvl.data.records import Message, Video
from internvl.data.sources import (
    SOURCES,
    check_files,
    open_source,
    open_sources,
    source_configs,
)
from internvl.errors import BadSample, ConfigError, DataError


def test_official_chat_of_all_four_kinds(tmp_path):
    rows = [
        chat_line("Text?", "Yes."),
        chat_line("<image>\nOne?", "Yes.", image="a.jpg", id=7),
        chat_line("Image-1: <image>\nImage-2: <image>\nTwo?", "Yes.", image=["a.jpg", "b.jpg"]),
        chat_line("<video>\nWhat?", "A bird.", video="c.mp4", clip=[1, 2.5]),
        chat_line("No image?", "None.", image=[]),
    ]
    text, one, two, video, none = good(opened(write_lines(tmp_path / "x.jsonl", rows), images="/i"))
    assert text.messages == (Message("user", "Text?"), Message("assistant", "Yes."))
    assert (text.images, none.images) == ((), ())
    assert (one.images, one.extra) == (("/i/a.jpg",), {"id": 7})
    assert two.images == ("/i/a.jpg", "/i/b.jpg")
    assert video.videos == (Video("/i/c.mp4", 1.0, 2.5),)
    assert one.name == f"{tmp_path / 'x.jsonl'} line 2"


def openai(content, **keys):
    answer = {"role": "assistant", "content": "Yes."}
    return {**keys, "messages": [{"role": "user", "content": content}, answer]}


def test_parts_with_and_without_images_of_their_own(tmp_path):
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "or <image>?"}]
    (sample,) = good(opened(write_lines(tmp_path / "x.jsonl", [openai(parts, images=["a.png"])])))
    assert [image.rpartition("/")[2] for image in sample.images] == ["b.png", "a.png"]
    assert sample.messages[0].content == "<image>\nor <image>?"


def test_groups_are_lines_of_the_same_pictures(tmp_path):
    rows = [
        chat_line("1", "a", image="a.jpg"),
        chat_line("text", "b"),
        chat_line('"image": "a.jpg" in text', "c"),
        chat_line("2", "d", image=["a.jpg", "b.jpg"]),
        chat_line("3", "e", image="a.jpg"),
        chat_line("4", "f", video="a.jpg"),
        openai("<image>", images=["a.jpg", "b.jpg"]),
    ]
    groups = opened(write_lines(tmp_path / "x.jsonl", rows)).groups.tolist()
    assert groups[0] == groups[4]
    assert len(set(groups)) == 5  # one image; two images twice; three alone (a video's too)
    assert groups[3] == groups[6]


def test_coco_captions(tmp_path):
    tree = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 11, "image_id": 1, "caption": "One."},
            {"id": 12, "image_id": 1, "caption": " Two. "},
            {"id": 13, "image_id": 2, "caption": "Lost."},
            {"id": 14, "image_id": 1, "caption": ""},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps(tree))
    source = opened(tmp_path / "x.json", "coco-captions", prompt="Describe.", images="/i")
    first, second = source.samples([0, 1])
    assert first.messages == (Message("user", "<image>\nDescribe."), Message("assistant", "One."))
    assert second.messages[1].content == "Two."
    assert source.groups[0] == source.groups[1]
    assert "annotation 13: there is no image 2 under `images`" in says(source, 2)
    assert "the caption is empty" in says(source, 3)
    (tmp_path / "bad.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="not a COCO caption file .key 'annotations' missing"):
        opened(tmp_path / "bad.json", "coco-captions", prompt="x")


@pytest.mark.parametrize(
    "lines",
    [
        "image,caption\na.jpg,One, two.\nb.jpg,Three.\n",
        "a.jpg#0\tOne, two.\nb.jpg#0\tThree.\n",
        "image_name| comment_number| comment\na.jpg| 0| One, two.\nb.jpg| 0| Three.\n",
        '\ufeffimage,caption\r\n"a.jpg","One, two."\r\nb.jpg,Three.\r\n',
    ],
)
def test_caption_lines(lines, tmp_path):
    (tmp_path / "x.txt").write_text(lines, encoding="utf-8", newline="")
    first, second = good(opened(tmp_path / "x.txt", "captions", prompt="Say:", images="/i"))
    assert (first.images, first.messages[1].content) == (("/i/a.jpg",), "One, two.")
    assert (second.images, second.messages[1].content) == (("/i/b.jpg",), "Three.")


def test_webdataset(tmp_path):
    data = picture(tmp_path / "a.png", (8, 8)).read_bytes()
    members = {
        "0001.json": json.dumps({"conversations": turns("<image>\nWhat?", "A.")}).encode(),
        "0001.png": data,
        "0002.png": data,
        "0002.txt": b"A square.",
        "0003.json": b"{",
    }
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = opened(tmp_path, "webdataset", prompt="Say:")
    chat, caption = source.samples([0, 1])
    assert isinstance(chat.images[0], FileSlice)
    assert np.array_equal(open_rgb(chat.images[0]), Image.open(tmp_path / "a.png"))
    assert caption.messages[1].content == "A square."
    assert "000.tar 0003: 0003.json cannot be read" in says(source, 2)
    (alone,) = opened(tmp_path, "webdataset").samples([1])
    assert alone.messages == caption.messages[1:]


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "gbk.txt").write_bytes("图,狗\n".encode("gbk"))
    for path, kind, problem in (
        ("no.jsonl", "chat", "there is no annotation file"),
        ("empty.jsonl", "chat", "is empty; it holds no sample"),
        ("", "chat", "Is a directory"),
        ("gbk.txt", "captions", "is not UTF-8"),
        ("", "webdataset", "there is no .tar file"),
        ("", "parquet", "no .parquet or .arrow file"),
        ("none", "parquet", "there is no annotation file"),
        ("empty.jsonl", "webdataset", "no uncompressed tar|is empty"),
    ):
        with pytest.raises(DataError, match=problem):
            opened(tmp_path / path, kind, prompt="x")
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b")] * 3)
    with pytest.raises(DataError, match="holds 3 samples, not 5 as its num_samples"):
        opened(file, num_samples=5)


def test_every_type_of_a_recipe_has_a_source():
    assert set(SOURCES) == set(SourceConfig.__annotations__["type"].__args__)


def meta(tmp_path, **entries):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    return DataConfig(meta=path)


def test_a_meta_file(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("What?", "A.", image="a.jpg")] * 4)
    entry = {"root": "/i", "annotation": str(file), "data_augment": True, "repeat_time": 1.5}
    data = meta(tmp_path, first={**entry, "length": 4, "max_dynamic_patch": 3}, second=entry)
    first, second = source_configs(data)
    assert (first.name, first.max_tiles, first.augment, first.repeat) == ("first", 3, True, 1.5)
    assert second.max_tiles is None
    files = [open_source(source) for source in (first, second)]
    assert good(files[0])[0].messages[0].content == "<image>\nWhat?"
    assert len(sampler.SampleOrder(files, share_prefix=True, seed=0)) == 12
    (wrong,) = source_configs(meta(tmp_path, x={**entry, "length": 5}))
    with pytest.raises(DataError, match="holds 4 samples, not 5 .*`length` in a meta file"):
        open_source(wrong)


def test_a_data_set_that_is_not_here_is_looked_up_in_its_meta_file(tmp_path):
    data = meta(tmp_path, first={"root": "", "annotation": "gone.jsonl"})
    check = f"check `annotation` of this entry in {data.meta}"
    for run in (open_sources, check_files):
        with pytest.raises(DataError, match=check):
            run(data)
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b")] * 3)
    data = meta(tmp_path, first={"root": "", "annotation": str(file), "length": 5})
    with pytest.raises(DataError, match=rf"`length` in {data.meta}\) says; set it to 3"):
        open_sources(data)


def test_a_wrong_meta_file_names_everything(tmp_path):
    with pytest.raises(DataError) as error:
        source_configs(meta(tmp_path, a={"root": "/i"}, b=3, c={"root": 1, "repeat_time": -1}))
    text = str(error.value)
    for part in (
        "5 problems",
        "a: `annotation` must be",
        "b: a JSON object",
        "`repeat_time` must",
    ):
        assert part in text
    with pytest.raises(DataError, match="there is no meta file"):
        source_configs(DataConfig(meta=tmp_path / "none.json"))


def meta_line(tmp_path):
    """(annotation file of one sample, absolute path of its image)"""
    image = picture(tmp_path / "a.png", (8, 8))
    row = chat_line("What?", "A.", image=str(image))
    return str(write_lines(tmp_path / "x.jsonl", [row])), str(image)


def test_an_empty_root_is_no_folder(tmp_path, monkeypatch):
    file, image = meta_line(tmp_path)
    entry = {"annotation": file, "repeat_time": 1}
    for root in ({"root": ""}, {"root": None}, {}, {"root": "/"}):
        (source,) = source_configs(meta(tmp_path, a={**entry, **root}))
        (sample,) = good(open_source(source))
        assert sample.images == (image,)
    # The recipe says it in the same way.
    assert good(opened(tmp_path / "x.jsonl", images=""))[0].images == (image,)
    tree = {
        "model": {"id": "x"},
        "run": "r",
        "global_batch": 1,
        "epochs": 1,
        "data": {"sources": [{"name": "x", "annotations": file, "images": ""}]},
    }
    (source,) = recipes.resolve(tree).data.sources
    assert good(open_source(source))[0].images == (image,)
    # Relative paths start from the working directory, and do not leave it.
    monkeypatch.chdir(tmp_path)
    rows = [chat_line("<image>", "A.", image=p) for p in ("b/../a.png", "../a.png", "s3://b/k.png")]
    rows += [chat_line("<video>", "A.", video="b/frames/")]
    source = opened(write_lines(tmp_path / "y.jsonl", rows), images="")
    first, outside, address, frames = samples(source)
    assert (first.images, address.images) == ((image,), ("s3://b/k.png",))
    assert frames.videos == (Video(f"{tmp_path}/b/frames/"),)
    assert "'../a.png' leaves the image folder '.'; name a folder above it" in str(outside)
    source = opened(tmp_path / "x.jsonl", images="/elsewhere")
    assert "leaves the image folder '/elsewhere'; name a folder above it (`images` of" in says(
        source
    )
    relative = write_lines(tmp_path / "z.jsonl", [chat_line("<image>", "A.", image="tmp/a.png")])
    assert good(opened(relative, images="/"))[0].images == ("/tmp/a.png",)


META_PROBLEMS = [
    ("{", "cannot read the meta file .*not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("[]", "a JSON object of data sets by name is expected"),
    ("{}", "names no data set"),
    ('{"a": {}, "a": {}}', "the key 'a' stands twice in one object; keep one"),
    ('{"a\\ud83d": {}}', "holds half a character"),
    ('{"a": {"annotation": "x", "repeat_time": NaN}}', "`repeat_time` must be a number above 0"),
    ('{"a": {"annotation": "x", "repeat_time": 1e999}}', "`repeat_time` must be a number above 0"),
    ('{"a": {"annotation": "x", "repeat_time": 1' + "0" * 400 + "}}", "`repeat_time` must be"),
    ('{"a": {"annotation": "x", "max_dynamic_patch": 2.5}}', "must be a whole number, not 2.5"),
    ('{"a": {"annotation": ""}}', "`annotation` must be the path of a file"),
    ('{"a": {"annotation": "x", "root": 1}}', "`root` must be a folder"),
    ('{"图里有狗": 1}'.encode("gbk"), "not UTF-8; save the file as UTF-8"),
    ("{}".encode("utf-16"), "not UTF-8; save the file as UTF-8"),
]


@pytest.mark.parametrize(("text", "problem"), META_PROBLEMS)
def test_a_meta_file_that_is_none_is_a_sentence(text, problem, tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=problem) as error:
        source_configs(DataConfig(meta=path))
    assert str(path) in str(error.value)


def test_meta_and_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    file, _ = meta_line(tmp_path)
    path = tmp_path / "meta.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": {"annotation": file}}).encode())
    assert [source.name for source in source_configs(DataConfig(meta=path))] == ["a"]
    text = f"{{model: {{id: x}}, run: r, global_batch: 1, epochs: 1, data: {{meta: {path}}}}}"
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert recipes.load_recipe(tmp_path / "recipe.yaml").data.meta == path


def test_a_tar_with_texts_that_are_none(tmp_path):
    image = picture(tmp_path / "a.png", (8, 8)).read_bytes()
    members = [
        ("1.png", image),
        ("1.json", json.dumps({"caption": "red \ud83d"}).encode()),
        ("2.png", image),
        ("2.json", b"\xef\xbb\xbf" + json.dumps({"caption": "two"}).encode()),
        ("3.png", image),
        ("3.json", b'{"caption":' + b"[" * 100_000),
        ("4.png", image),
        ("4.txt", b"\xff\xfe"),
        ("图片.png", image),
        ("图片.txt", b"five"),
    ]
    with tarfile.open(tmp_path / "0.tar", "w", encoding="gbk") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = opened(tmp_path / "0.tar", "webdataset")
    found = samples(source)
    bad = {n: str(s) for n, s in enumerate(found, start=1) if isinstance(s, BadSample)}
    assert list(bad) == [1, 3, 4]
    assert r"1: 1.json cannot be read (`caption` holds half a character (\ud83d)" in bad[1]
    assert "3.json cannot be read (its lists and objects are nested too deeply" in bad[3]
    assert "4.txt cannot be read ('utf-8' codec" in bad[4]
    assert [found[n].messages[0].content for n in (1, 4)] == ["two", "five"]
    found[4].name.encode()  # a name that is no UTF-8 can be printed, and its image read
    assert open_rgb(found[4].images[0]).size == (8, 8)


def test_pairs_and_captions_with_half_a_character(tmp_path):
    rows = [{"image": "a.png", "caption": c} for c in ("red", "blue \ud83d", "green")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    first, bad, last = samples(opened(tmp_path / "x.jsonl", "pairs"))
    assert (first.messages[0].content, last.messages[0].content) == ("red", "green")
    assert f"{tmp_path / 'x.jsonl'} line 2: " in str(bad)
    assert "half a character" in str(bad)


@pytest.mark.skipif(not (SHARED / "data" / "broken").is_dir(), reason="no broken files here")
def test_broken_caption_files():
    folder = SHARED / "data" / "broken"
    source = opened(folder / "captions_bad_rows.txt", "captions", prompt="x", images=folder)
    found = [str(s) if isinstance(s, BadSample) else s.messages[1].content for s in samples(source)]
    assert found[0] == "a good row"
    assert "neither `image,caption` nor" in found[1]
    assert "no image is named" in found[3]
    assert "the caption is empty" in found[4]
    assert found[5] == "quoted, with a comma"
    assert "blank" in found[6]
    with pytest.raises(DataError, match="is not UTF-8; save it as UTF-8"):
        opened(folder / "captions_gbk.txt", "captions", prompt="x")
    assert good(opened(folder / "captions_utf8_bom_crlf.txt", "captions", prompt="x"))


def test_a_recipe_needs_a_source_and_a_prompt():
    tree = {"model": {"id": "x"}, "run": "r", "global_batch": 1, "epochs": 1, "data": {}}
    with pytest.raises(ConfigError, match="data.sources: no source; give one, or data.meta"):
        recipes.resolve(tree)
    tree["data"] = {"sources": [{"name": "x", "annotations": "y", "type": "captions"}]}
    with pytest.raises(ConfigError, match="data.sources.0.prompt: missing"):
        recipes.resolve(tree)
