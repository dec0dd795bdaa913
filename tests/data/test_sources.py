"""Every kind of source: its samples, its groups, and the sentence for what is wrong."""

import base64
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from data_files import SHARED, chat_line, picture, turns, write_lines
from PIL import Image

from internvl.config import DataConfig, SourceConfig, recipes
from internvl.data import index, sampler
from internvl.data.images import FileSlice, open_rgb
from internvl.data.records import Message, Sample, Video
from internvl.data.sources import SOURCES, open_source, source_configs
from internvl.errors import BadSample, ConfigError, DataError


def opened(path, kind="chat", **keys):
    return open_source(SourceConfig(name="x", type=kind, annotations=path, **keys))


def samples(source):
    return list(source.samples(range(len(source))))


def good(source):
    found = samples(source)
    assert all(isinstance(sample, Sample) for sample in found), found
    return found


def says(source, number=0):
    (bad,) = source.samples([number])
    assert isinstance(bad, BadSample), bad
    return str(bad)


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


def test_openai_chat(tmp_path):
    data = picture(tmp_path / "a.png", (8, 8)).read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    rows = [
        openai("<image>\nWhat?", images=["a.png"]),
        openai("<video>\nWhat?", videos=["a.mp4"]),
        openai([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]),
        openai([{"type": "image_url", "image_url": {"url": address}}]),
        openai([{"type": "image"}, {"type": "text", "text": "What?"}], images=["a.png"]),
    ]
    source = opened(write_lines(tmp_path / "x.jsonl", rows), images=str(tmp_path))
    marks, video, parts, inline, separate = good(source)
    assert marks.images == parts.images == separate.images == (str(tmp_path / "a.png"),)
    assert video.videos == (Video(str(tmp_path / "a.mp4")),)
    assert parts.messages[0] == separate.messages[0] == Message("user", "<image>\nWhat?")
    assert inline.images == (data,)


CHAT_PROBLEMS = [
    (b"", "the line is blank"),
    (b"{", "not JSON"),
    (b"[1]", "a JSON object is expected, not list"),
    (b"\xff\xfe", "not UTF-8"),
    ({"image": "a.jpg"}, "`conversations` must be a list of turns; it is missing"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "from 'robot'; known: human, gpt"),
    ({"conversations": [{"from": "human"}]}, "turn 1 has no text under `value`"),
    ({"conversations": [5]}, "turn 1 is from None"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "from 'tool'; known: system, user"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio'"),
    (chat_line("x", "y", image=3), "`image` must be a path"),
    (chat_line("x", "y", image="../a.jpg"), "leaves the image folder"),
    (
        chat_line("x", "y", image="https://h.org/a.jpg"),
        "https://h.org/a.jpg is an address, and files are named from the image folder '.' on; "
        "download it there and write its path",
    ),
    (chat_line("x", "y", image="file:///d/a.jpg"), "write its path without `file://`"),
    (chat_line("x", "y", video="s3://d/a.mp4"), "s3://d/a.mp4 is an address, and files are"),
    (chat_line("x", "y", image=["a.jpg", " "]), "`image[1]` is an empty path; write the file's"),
    (chat_line("x", "y", image="  "), "`image` is an empty path; write the file's name or remove"),
    (
        json.dumps(chat_line("x", "y")).encode() + b",",
        "not JSON (a comma stands after it; JSON Lines has none between lines, remove it)",
    ),
    (chat_line("x", "y", image="a.jpg", video="b.mp4"), "images and videos"),
    (chat_line("x", "y", video="b.mp4", clip=[3, 1]), "`clip` must be [start, end] in seconds"),
    (openai([{"type": "image", "image": "data:image/png;base64,?"}]), "is not base64"),
]


@pytest.mark.parametrize(("row", "problem"), CHAT_PROBLEMS)
def test_bad_lines(row, problem, tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b"), row])
    assert problem in says(opened(file), 1)
    assert f"{file} line 2: " in says(opened(file), 1)


def test_a_mark_is_put_only_where_the_source_says_so(tmp_path):
    rows = [chat_line("What?", "A.", image="a.jpg"), chat_line("What?", "A.", video="a.mp4")]
    file = write_lines(tmp_path / "x.jsonl", rows)
    plain, _ = good(opened(file))
    assert plain.messages[0].content == "What?"
    image, video = good(opened(file, insert_image_mark=True))
    assert image.messages[0].content == "<image>\nWhat?"
    assert video.messages[0].content == "<video>\nWhat?"


@pytest.mark.parametrize(
    ("questions", "keys", "marked"),
    [
        (["Hello", "<image>\nWhat?"], {"image": "a.jpg"}, None),  # it has one, in a later question
        (["Hello", "<video>\nWhat?"], {"video": "a.mp4"}, None),
        (["Hello", "And?"], {"image": "a.jpg"}, "<image>\nHello"),
        (["Hello", "And?"], {"image": ["a.jpg"]}, "<image>\nHello"),
        ([r"Is \<image> a tag?", "And?"], {"image": "a.jpg"}, "<image>\n" + r"Is \<image> a tag?"),
        (["Hello", "<image>"], {"video": "a.mp4"}, "<video>\nHello"),
        (["Hello", "And?"], {"image": ["a.jpg", "b.jpg"]}, None),
        (["Hello", "And?"], {}, None),
    ],
)
def test_a_mark_is_put_only_where_no_question_has_one(questions, keys, marked, tmp_path):
    texts = [questions[0], "An answer with <image>.", questions[1], "Yes."]
    row = {**chat_line(*texts[:2]), "conversations": turns(*texts), **keys}
    row["conversations"].insert(0, {"from": "system", "value": "Be <image> short."})
    file = write_lines(tmp_path / "x.jsonl", [row])
    (plain,) = good(opened(file))
    (found,) = good(opened(file, insert_image_mark=True))
    assert found.messages[1].content == (marked or questions[0])
    assert [*found.messages[:1], *found.messages[2:]] == [*plain.messages[:1], *plain.messages[2:]]


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


def test_preferences(tmp_path):
    row = {"image": "a.jpg", "question": "<image>\nWhat?", "chosen": "A cat.", "rejected": "No."}
    file = write_lines(tmp_path / "x.jsonl", [row, {**row, "chosen": ""}])
    source = opened(file, "preference")
    (sample,) = source.samples([0])
    assert sample.messages[1] == Message("assistant", "A cat.")
    assert sample.extra == {"rejected": "No."}
    assert "`chosen` must be a text that is not empty" in says(source, 1)


def test_tables(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = picture(tmp_path / "a.png", (8, 8)).read_bytes()
    rows = [
        {"image": {"bytes": data, "path": None}, "conversations": turns("<image>\nWhat?", "A.")},
        {"image": None, "conversations": turns("Text?", "B.")},
        {"image": {"bytes": data, "path": None}, "conversations": turns("<image>\nAgain?", "C.")},
    ]
    folder = tmp_path / "parts"
    folder.mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows[:2]), folder / "0.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows[2:]), folder / "1.parquet")
    source = opened(folder, "parquet")
    first, text, again = good(source)
    assert (first.images, text.images, again.images) == ((data,), (), (data,))
    assert source.groups[0] == source.groups[2] != source.groups[1]
    assert good(pickle.loads(pickle.dumps(source))) == [first, text, again]
    captions = arrow.Table.from_pylist([{"image": "a.png", "text": "A square."}])
    parquet.write_table(captions, tmp_path / "c.parquet")
    (one,) = good(opened(tmp_path / "c.parquet", "parquet", prompt="Say:", images="/i"))
    assert (one.images, one.messages[1].content) == (("/i/a.png",), "A square.")
    (one,) = good(opened(tmp_path / "c.parquet", "parquet", images="/i"))
    assert [message.role for message in one.messages] == ["assistant"]
    stream = tmp_path / "saved" / "data-00000.arrow"
    stream.parent.mkdir()
    with (
        arrow.OSFile(str(stream), "wb") as sink,
        arrow.ipc.new_stream(sink, captions.schema) as out,
    ):
        out.write_table(captions)
    assert len(opened(stream.parent, "parquet", prompt="Say:")) == 1


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


def test_a_wrong_meta_file_names_everything(tmp_path):
    with pytest.raises(DataError) as error:
        source_configs(meta(tmp_path, a={"root": "/i"}, b=3, c={"root": 1, "repeat_time": -1}))
    text = str(error.value)
    for part in (
        "5 problem(s)",
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


def test_a_table_with_texts_that_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ends = np.array([0, 2, 4, 6], dtype=np.int32).tobytes()
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"ok\xff\xfehi")]
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    whole = pyarrow.array(["a", "b", "c"])
    for image, text, wanted in ((whole, broken, ("ok", "hi")), (broken, whole, ("a", "c"))):
        parquet.write_table(pyarrow.table({"image": image, "text": text}), tmp_path / "x.parquet")
        source = opened(tmp_path / "x.parquet", "parquet")
        first, bad, last = samples(source)
        assert (first.messages[-1].content, last.messages[-1].content) == wanted
        assert f"{tmp_path / 'x.parquet'} row 2: a text in it is not UTF-8" in str(bad)
        assert len(set(source.groups.tolist())) == 3


def test_pairs_and_captions_with_half_a_character(tmp_path):
    rows = [{"image": "a.png", "caption": c} for c in ("red", "blue \ud83d", "green")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    first, bad, last = samples(opened(tmp_path / "x.jsonl", "pairs"))
    assert (first.messages[0].content, last.messages[0].content) == ("red", "green")
    assert f"{tmp_path / 'x.jsonl'} line 2: " in str(bad)
    assert "half a character" in str(bad)


def test_weights(tmp_path):
    def source(name, lines, weight):
        file = write_lines(tmp_path / f"{name}.jsonl", [chat_line(name, "b")] * lines)
        return open_source(SourceConfig(name=name, annotations=file, weight=weight))

    files = [source("a", 30, 1.0), source("b", 10, 3.0)]
    epoch = sampler.SampleOrder(files, share_prefix=True, seed=0)
    shown = [ref.file for ref in epoch.step(0, 40, 40) for _ in ref.lines]
    assert np.bincount(shown).tolist() == [10, 30]


def test_a_random_part(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line(str(i), "b") for i in range(40)])

    def lines(part, seed=0):
        source = opened(file, repeat=0.25, part=part)
        epoch = sampler.SampleOrder([source], share_prefix=True, seed=seed)
        return sorted(line for ref in epoch.step(0, 10, 10) for line in ref.lines)

    assert lines("first") == list(range(10))
    assert lines("random") == lines("random") != lines("first")
    assert lines("random") != lines("random", seed=1)


def test_the_index_follows_the_content(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b"), chat_line("c", "d")])
    first = index.index_lines(file)
    again = index.index_lines(file)
    assert first.folder == again.folder
    write_lines(file, [chat_line("a", "b")])
    changed = index.index_lines(file)
    assert (len(changed), changed.folder != first.folder) == (1, True)
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert [json.loads(line) for line in index.index_lines(file).lines([0])] == [
        chat_line("a", "b")
    ]


def test_an_index_is_the_same_however_it_is_read(tmp_path, monkeypatch):
    rows = [chat_line("x" * (i % 50), "y", image=f"{i % 7}.jpg") for i in range(200)]
    file = write_lines(tmp_path / "x.jsonl", rows)
    whole = index.index_lines(file, tmp_path / "one")
    monkeypatch.setattr(index, "_CHUNK", 333)
    pieces = index.index_lines(file, tmp_path / "two")
    assert np.array_equal(whole.starts, pieces.starts)
    assert np.array_equal(whole.groups, pieces.groups)
    assert len(set(whole.groups.tolist())) == 7
    assert list((tmp_path / "two").iterdir()) == [pieces.folder]


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


def test_a_file_that_changes_and_an_epoch_without_samples(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b")] * 4)
    source = opened(file, repeat=0.1)
    with pytest.raises(DataError, match="an epoch shows no sample; raise `repeat`"):
        sampler.SampleOrder([source], share_prefix=True, seed=0)
    write_lines(file, [chat_line("a", "b")] * 5)
    with pytest.raises(DataError, match="was changed while it is read"):
        samples(source)
