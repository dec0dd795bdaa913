"""A run that goes on knows the data it began with: what a change is, and what then happens."""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter

import pytest
from data_files import chat_line, picture, recipe, turns, write_lines
from ranks import run_ranks

from internvl.config import SourceConfig, recipes
from internvl.data import changes
from internvl.data.changes import Fingerprints
from internvl.data.sampler import Earlier, GrownOrder, SampleOrder
from internvl.data.sources import Content, open_source, source_configs
from internvl.errors import DataError, RunError
from internvl.training import run_folder

BATCH = 4


def rows(*numbers, image=True):
    return [
        chat_line(f"<image>\n{n}?", "Yes.", image=f"{n // 2}.png") if image else chat_line(n, "x")
        for n in numbers
    ]


def made(tmp_path, *overrides, name="x.jsonl"):
    """A recipe of epochs of eight samples, or more; two samples show the same image."""
    found = recipe(tmp_path / "model", tmp_path / name, tmp_path, tmp_path / "run", *overrides)
    found.run.mkdir(exist_ok=True)
    return found


def resumed(found, done):
    files = [open_source(source) for source in source_configs(found.data)]
    return run_folder.order_of(found, files, done)


def shown(order, first, last, total=1000):
    """Lines in the order of steps `first` … `last` - 1."""
    refs = (ref for step in range(first, last) for ref in order.step(step, BATCH, total))
    return [line for ref in refs for line in ref.lines]


def begun(tmp_path, *overrides, numbers=range(8)):
    write_lines(tmp_path / "x.jsonl", rows(*numbers))
    found = made(tmp_path, *overrides)
    return found, resumed(found, 0)


def test_a_run_notes_its_data_and_goes_on_where_they_are_the_same(tmp_path):
    found, order = begun(tmp_path)
    fingerprints = changes.read(found.run)
    assert fingerprints.sources["chat"].samples == 8
    assert not list(found.run.glob(".*"))
    file = tmp_path / "x.jsonl"
    os.utime(file, (1, 1))
    assert shown(resumed(found, BATCH), 0, 4) == shown(order, 0, 4)
    file.rename(tmp_path / "y.jsonl")  # moved, and named as before by a link
    file.symlink_to(tmp_path / "y.jsonl")
    assert shown(resumed(found, BATCH), 0, 4) == shown(order, 0, 4)
    assert changes.read(found.run) == fingerprints


CHANGES = {
    "one more": (range(9), "had 8 samples, has 9; the first ones are as they were"),
    "one less": (range(7), "had 8 samples, has 7"),
    "another order": ((1, 0, *range(2, 8)), "has 8 samples as before, but of other content"),
    "another line": ((*range(7), 9), "has 8 samples as before, but of other content"),
    "one before": ((8, *range(8)), "had 8 samples, has 9, and the first ones are not as they were"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_with_the_file_and_the_remedy(change, tmp_path):
    numbers, said = CHANGES[change]
    found, _ = begun(tmp_path)
    fingerprints = changes.read(found.run)
    file = write_lines(tmp_path / "x.jsonl", rows(*numbers))
    with pytest.raises(RunError) as error:
        resumed(found, BATCH)
    assert f"holds a run on other data ({file} {said}); put the file back" in str(error.value)
    assert "choose another `run` to start anew, or set data.changed=accept" in str(error.value)
    assert changes.read(found.run) == fingerprints  # so that it is refused the next time too
    write_lines(file, rows(*range(8)))
    resumed(found, BATCH)


def test_nothing_is_refused_before_the_first_checkpoint(tmp_path):
    found, _ = begun(tmp_path)
    write_lines(tmp_path / "x.jsonl", rows(*range(9)))
    assert len(resumed(found, 0)) == 9
    assert changes.read(found.run).sources["chat"].samples == 9


@pytest.mark.parametrize("share", [True, False])
def test_added_samples_wait_for_the_next_epoch(share, tmp_path, caplog):
    """Eight samples, steps of four; at step 3, in the second epoch, there are ten."""
    how = f"data.share_prefix={share}"
    found, order = begun(tmp_path, how, "epochs=4")
    write_lines(tmp_path / "x.jsonl", rows(*range(10)))
    grown = resumed(made(tmp_path, how, "epochs=4", "data.changed=accept"), 3 * BATCH)
    assert shown(grown, 0, 4) == shown(order, 0, 4)
    assert Counter(shown(grown, 2, 4)) == Counter(range(8))
    later = shown(grown, 4, 9)
    assert Counter(later[:10]) == Counter(later[10:]) == Counter(range(10))
    assert later[:10] != later[10:]
    # Epochs are numbered through, so that what is random in a sample is drawn anew.
    assert [ref.epoch for ref in grown.step(4, BATCH, 1000)] == [2] * len(
        grown.step(4, BATCH, 1000)
    )
    # Two epochs of eight and two of ten.
    assert grown.epoch_size(4) * 4 == 36
    assert made(tmp_path, "epochs=4").num_steps(grown.epoch_size(4)) == 9
    assert changes.read(found.run).earlier == (Earlier(16, (8,)),)
    # The next start finds nothing changed and goes on alike, from any step.
    for step in (3, 4, 7):
        again = resumed(made(tmp_path, how, "epochs=4"), step * BATCH)
        assert shown(again, 0, 9) == shown(grown, 0, 9)


def test_it_may_grow_again(tmp_path):
    begun(tmp_path)
    accept = made(tmp_path, "data.changed=accept")
    write_lines(tmp_path / "x.jsonl", rows(*range(10)))
    resumed(accept, BATCH)
    write_lines(tmp_path / "x.jsonl", rows(*range(12)))  # in the same epoch: ten were never shown
    assert changes.read(accept.run).earlier == (Earlier(8, (8,)),)
    grown = resumed(accept, BATCH)
    assert Counter(shown(grown, 2, 5)) == Counter(range(12))
    write_lines(tmp_path / "x.jsonl", rows(*range(13)))
    grown = resumed(accept, 5 * BATCH)  # an epoch has just ended
    assert changes.read(accept.run).earlier == (Earlier(8, (8,)), Earlier(20, (12,)))
    lines = shown(grown, 0, 9)
    assert Counter(lines[:8]) == Counter(range(8))
    assert Counter(lines[8:20]) == Counter(range(12))
    assert Counter(lines[20:33]) == Counter(range(13))


def test_other_changes_are_taken_in_a_new_order(tmp_path, caplog):
    begun(tmp_path)
    write_lines(tmp_path / "x.jsonl", rows(*range(6)))
    with caplog.at_level("WARNING", logger="internvl"):
        run_folder.log.get_logger().propagate = True
        order = resumed(made(tmp_path, "data.changed=accept"), BATCH)
    assert "had 8 samples, has 6: it goes on in a new order" in caplog.text
    assert isinstance(order, SampleOrder)
    assert set(shown(order, 1, 5)) <= set(range(6))


def test_a_last_line_without_an_end_gets_one_when_more_is_added(tmp_path):
    begun(tmp_path)
    file = tmp_path / "x.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    shutil.rmtree(tmp_path / "run")
    resumed(made(tmp_path), 0)
    accept = made(tmp_path, "data.changed=accept")
    for end in (b"\n", b"\r\n"):
        write_lines(file, [*whole[:-1].split(b"\n")[:-1]])
        last = whole[:-1].split(b"\n")[-1]
        with file.open("ab") as added:
            added.write(last + end + json.dumps(rows(8)[0]).encode())
        (source,) = [open_source(source) for source in source_configs(accept.data)]
        assert source.begins_with(changes.read(accept.run).sources["chat"])
    with file.open("ab") as added:  # part of the old last line is not the old last line
        added.write(b"{}")
    file.write_bytes(whole[:-1] + b" {}\n" + b"{}\n")
    (source,) = [open_source(source) for source in source_configs(accept.data)]
    assert not source.begins_with(changes.read(accept.run).sources["chat"])


CRLF, MARK = (b"\n", b"\r\n"), b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda old: old.replace(*CRLF),
        lambda old: MARK + old,
        lambda old: MARK + old.replace(*CRLF),
        lambda old: old[:-1],
        lambda old: old.replace(*CRLF)[:-2],
        lambda old: old + b"\n \r\n",  # blank lines at the end
    ],
)
@pytest.mark.parametrize("chunk", [1 << 25, 7])  # bytes; line ends are cut by small ones
def test_line_ends_and_a_byte_order_mark_are_no_change(rewrite, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("internvl.data.index._CHUNK", chunk)
    begun(tmp_path)
    file = tmp_path / "x.jsonl"
    before = file.read_bytes()
    file.write_bytes(rewrite(before))
    (source,) = [open_source(source) for source in source_configs(made(tmp_path).data)]
    assert not changes.source_changes(changes.read(tmp_path / "run"), [source])
    # Added samples are seen as such, and another text as another one.
    file.write_bytes(rewrite(before + json.dumps(rows(8)[0]).encode() + b"\n"))
    (source,) = [open_source(source) for source in source_configs(made(tmp_path).data)]
    assert [*changes.source_changes(changes.read(tmp_path / "run"), [source]).values()] == [True]
    file.write_bytes(rewrite(before.replace(b"Yes", b"No")))
    (source,) = [open_source(source) for source in source_configs(made(tmp_path).data)]
    assert [*changes.source_changes(changes.read(tmp_path / "run"), [source]).values()] == [False]


def test_line_ends_of_a_list_are_no_change(tmp_path):
    file = tmp_path / "x.json"
    config = SourceConfig(name="x", type="chat", annotations=file, images=str(tmp_path))
    file.write_text(json.dumps(rows(1, 2), indent=1))
    before = open_source(config).content()
    file.write_bytes(MARK + file.read_bytes().replace(*CRLF))
    assert open_source(config).content() == before


def test_a_run_that_noted_the_digest_of_the_bytes_goes_on(tmp_path):
    begun(tmp_path)
    file = tmp_path / "x.jsonl"
    file.write_bytes(file.read_bytes().replace(*CRLF))
    fingerprints = changes.read(tmp_path / "run")
    digest, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
    old = Fingerprints({"chat": Content(8, size, digest)})
    (source,) = [open_source(source) for source in source_configs(made(tmp_path).data)]
    assert fingerprints.sources["chat"].digest != digest
    assert not changes.source_changes(old, [source])


@pytest.mark.parametrize("text", ['{"sources": {"x": 1}}', '{"sources": 5}', "[]", "{", "7", ""])
def test_a_damaged_note_is_said_in_a_sentence(text, tmp_path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"cannot read .*data\.json \(.*\); remove it to") as said:
        changes.read(tmp_path)
    assert "object" not in str(said.value)
    assert "argument" not in str(said.value)


def test_a_list_grows_as_lines_do(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(rows(*range(8)), indent=1))
    found = made(tmp_path, name="x.json")
    resumed(found, 0)
    file.write_text(json.dumps(rows(*range(9)), indent=1))
    with pytest.raises(RunError, match=r"x.json had 8 samples, has 9; the first ones are as"):
        resumed(found, BATCH)


def test_a_run_of_an_older_version_goes_on_and_says_so(tmp_path, caplog):
    found, order = begun(tmp_path)
    (found.run / changes.FILE).unlink()
    with caplog.at_level("WARNING", logger="internvl"):
        run_folder.log.get_logger().propagate = True
        again = resumed(found, BATCH)
    assert (
        len([r for r in caplog.records if "does not say what its annotations held" in r.msg]) == 1
    )
    assert shown(again, 0, 4) == shown(order, 0, 4)
    assert changes.read(found.run).sources["chat"].samples == 8
    (found.run / changes.FILE).write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*data.json .*; remove it to go on"):
        resumed(found, BATCH)


def test_a_changed_meta_file_is_another_recipe(tmp_path):
    entry = {"root": str(tmp_path), "annotation": str(tmp_path / "x.jsonl"), "repeat_time": 1}
    file = tmp_path / "meta.json"

    def start(done, **entries):
        file.write_text(json.dumps(entries))
        found = made(tmp_path, "data.sources=[]", f"data.meta={file}")
        return resumed(found, done)

    write_lines(tmp_path / "x.jsonl", rows(*range(8)))
    start(0, a=entry)
    shutil.copy(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    start(BATCH, a={**entry, "annotation": str(tmp_path / "y.jsonl")})
    with pytest.raises(RunError) as error:
        start(BATCH, a={**entry, "repeat_time": 2}, b=entry)
    assert "holds a run of another meta file than" in str(error.value)
    assert "(a.repeat_time was 1, is 2; b was not there, is now)" in str(error.value)
    assert "set it back to go on, or choose another `run`" in str(error.value)


def test_changed_evaluations_are_said(tmp_path, caplog):
    write_lines(tmp_path / "x.jsonl", rows(*range(8)))
    held_out = write_lines(tmp_path / "val.jsonl", rows(20))
    found = made(tmp_path, f"evals.val={{type: loss, annotations: {held_out}}}")
    resumed(found, 0)
    write_lines(held_out, rows(20, 21))
    with caplog.at_level("WARNING", logger="internvl"):
        run_folder.log.get_logger().propagate = True
        resumed(found, BATCH)
        resumed(found, BATCH)
    assert [r.getMessage() for r in caplog.records] == [
        f"{held_out} was changed since the run began; scores before and after are not comparable"
    ]


def opened(path, kind, **keys):
    return open_source(SourceConfig(name="x", type=kind, annotations=path, **keys))


def test_tars_and_tables_are_told_by_what_they_hold(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def shard(path, numbers):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for n in numbers:
                picture(tmp_path / "p" / f"{n}.png", (8, 8))
                (tmp_path / "p" / f"{n}.txt").write_text(f"caption {n}")
                for ending in ("png", "txt"):
                    tar.add(tmp_path / "p" / f"{n}.{ending}", f"{n}.{ending}")

    def table(path, numbers):
        path.parent.mkdir(exist_ok=True)
        columns = {
            "image": [{"bytes": b"x" * n, "path": f"{n}.png"} for n in numbers],
            "conversations": [turns("<image>\n?", str(n)) for n in numbers],
        }
        parquet.write_table(pyarrow.table(columns), path)

    for kind, write, ending in (("webdataset", shard, "tar"), ("parquet", table, "parquet")):
        folder = tmp_path / kind
        write(folder / f"0.{ending}", (1, 2))
        before = opened(folder, kind).content()
        assert before.samples == 2
        os.utime(folder / f"0.{ending}", (1, 1))
        assert opened(folder, kind).content() == before
        folder.rename(tmp_path / f"{kind}-moved")
        folder = tmp_path / f"{kind}-moved"
        assert opened(folder, kind).content() == before
        write(folder / f"1.{ending}", (3,))
        grown = opened(folder, kind)
        assert grown.content() != before
        assert grown.begins_with(before)
        write(folder / f"0.{ending}", (1, 4))
        assert not opened(folder, kind).begins_with(before)


RANKS = """
import os
from internvl import dist
from internvl.config import recipes
from internvl.data.sources import Content, open_source, source_configs
from internvl.errors import RunError
from internvl.training import run_folder

dist.init_from_env("cpu")
name = {names!r}[dist.rank()]
found = recipes.load_recipe({recipe!r}, ["data.sources.0.annotations=" + name])
try:
    run_folder.order_of(found, [open_source(s) for s in source_configs(found.data)], {done})
    print("goes on")
except RunError as error:
    print(error)
"""


def test_all_ranks_look_and_refuse_alike(tmp_path):
    found, _ = begun(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(found))
    same = str(tmp_path / "x.jsonl")
    other = str(write_lines(tmp_path / "y.jsonl", rows(*range(9))))
    for names, done, said in (
        ([same, same], 4, ["goes on"] * 2),
        ([same, other], 4, ["rank 1 reads other annotations than rank 0; give all the same"] * 2),
        ([other, other], 4, [f"{found.run} holds a run on other data ({other} had 8"] * 2),
    ):
        code = RANKS.format(names=names, done=done, recipe=str(tmp_path / "recipe.yaml"))
        for out, wanted in zip(run_ranks(code), said, strict=True):
            assert out.startswith(wanted)


def test_a_grown_order_of_no_epochs_is_that_of_steps(tmp_path):
    write_lines(tmp_path / "x.jsonl", rows(*range(10)))
    (source,) = [open_source(source) for source in source_configs(made(tmp_path).data)]
    grown = GrownOrder([source], (Earlier(8, (8,)),), share_prefix=True, seed=0)
    assert (grown.epoch_size(None), len(grown), grown.num_groups) == (10, 10, 5)
    assert grown.epoch_size(1) == 8
    assert grown.epoch_size(0.5) == 8
    assert grown.epoch_size(2) == 9
    with pytest.raises(DataError, match="shows no sample"):
        GrownOrder([source], (Earlier(8, (0,)),), share_prefix=True, seed=0)
