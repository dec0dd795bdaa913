"""Files of benchmarks as users have them: of other programs, damaged, changed, in part."""

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from chat_folders import prompt_folder
from drawn_benchmarks import Drawn, picture
from original_runs import Recorder

from internvl import evals
from internvl.config import TilesConfig, eval_config
from internvl.datasets import tasks
from internvl.errors import DataError, UserError
from internvl.evals.benchmark import readers, table
from internvl.evals.scoring import reviews
from internvl.inference import load as loading


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "m"
    return loading.load(prompt_folder("internlm2.internlm2-chat", folder), device="cpu")


def drawn(key: str, folder: Path) -> Drawn:
    """Files of the only data set of a key, below `folder`/data."""
    (dataset,) = tasks.tasks()[key].sets.values()
    return Drawn(dataset, folder / "data")


def built(key: str, files: Drawn, **options):
    config = eval_config(type="benchmark", task=key, annotations=files.places.root, **options)
    return evals.build({"x": config})["x"]


def recorder(chat, answers):
    tiles = TilesConfig(size=28, min=1, max=1)
    settings = (chat.model, chat.tokenizer, chat.template, tiles, None, Path("x/m"))
    return Recorder(*settings, tuple(answers))


def fields(items):
    return [dict(item.fields) for item in items]


TEXT_FILES = {"mme": "existence.txt", "mmvp": "", "mmbench-dev-en": "", "scienceqa": ""}


@pytest.mark.parametrize("key", TEXT_FILES)
def test_marks_and_ends_of_other_editors_change_nothing(tmp_path, key):
    files = drawn(key, tmp_path)
    path = files.places.file("questions") / TEXT_FILES[key]
    content, expected = path.read_bytes(), fields(readers.read(files.places))
    lines = content.replace(b"\r\n", b"\n")
    for other in (b"\xef\xbb\xbf" + content, lines.replace(b"\n", b"\r\n"), lines + b"\n\n"):
        path.write_bytes(other)
        assert fields(readers.read(files.places)) == expected


@pytest.mark.parametrize("key", TEXT_FILES)
def test_a_damaged_file_is_named_with_its_remedy(tmp_path, key):
    files = drawn(key, tmp_path)
    path = files.places.file("questions") / TEXT_FILES[key]
    content = path.read_bytes()
    for damaged, words in (
        (content.replace(b"s", b"\xe4", 1), "save it as UTF-8"),
        (content.decode().encode("utf-16"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=words) as caught:
            readers.read(files.places)
        assert path.name in str(caught.value)


def test_a_line_of_mme_without_its_columns_is_named(tmp_path):
    files = drawn("mme", tmp_path)
    (files.places.file("questions") / "existence.txt").write_text("1.jpg\tIs it so?\n")
    with pytest.raises(DataError, match=r"existence\.txt line 1: .* it has 2 columns"):
        readers.read(files.places)


def test_a_list_of_options_that_is_none_is_named(tmp_path):
    files = drawn("mmmu-dev", tmp_path)
    row = {"id": "dev_Art_1", "question": "?", "options": "['a', ", "question_type": "open"}
    folder = files.places.file("rows") / "Art"
    (folder / "dev.jsonl").write_text(json.dumps(row | {"image_1": "1.png"}))
    with pytest.raises(DataError, match="not in the form of MMMU_dev .SyntaxError"):
        readers.read(files.places)


def test_a_quotation_that_never_ends_takes_no_rows_with_it():
    head = "index\tquestion\tA\n"
    columns = table.parse_columns(f'{head}1\t"two\nlines, a ""quote"""\tx\n2\tsay "so"\ty\n')
    assert columns["question"] == ['two\nlines, a "quote"', 'say "so"']
    with pytest.raises(DataError, match="row 3: a quotation mark begins a cell that never ends"):
        table.parse_columns(f'{head}1\tone\tx\n2\t"two\ty\n3\tthree\tz\n')


def with_image(files: Drawn, cell: str) -> None:
    """Puts another image into MMBench's first row."""
    path = files.places.file("questions")
    rows = list(csv.reader(io.StringIO(path.read_text()), delimiter="\t"))
    rows[1][rows[0].index("image")] = cell
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")


def test_an_image_may_be_a_data_address(chat, tmp_path):
    files = drawn("mmbench-dev-en", tmp_path)
    text = base64.b64encode(picture(1)).decode()
    with_image(files, f"data:image/png;base64,{text}")
    recorded = recorder(chat, "AD")
    assert built("mmbench-dev-en", files).run(recorded, None).values == {"plain_accuracy": 1.0}
    assert recorded.calls[0].means == recorded.calls[1].means


def test_a_changed_image_in_a_table_is_asked_about_again(chat, tmp_path):
    """Answers on disk are of these very images, in a cell or in a file of the hub."""
    files = drawn("mmbench-dev-en", tmp_path)
    cache = tmp_path / "cache"
    for answers, seen in (("AD", 2), ("", 0)):
        recorded = recorder(chat, answers)
        built("mmbench-dev-en", files).run(recorded, cache)
        assert len(recorded.calls) == seen
    with_image(files, base64.b64encode(picture(2)).decode())
    recorded = recorder(chat, "BB")
    assert built("mmbench-dev-en", files).run(recorded, cache).values == {"plain_accuracy": 0.0}
    files = drawn("mmmu-dev", tmp_path)
    (path,) = files.places.file("rows").rglob("*.parquet")
    built("mmmu-dev", files).run(recorder(chat, "AA"), cache)
    rows = readers.Table(path)
    changed = [rows.row(n) | {"image_1": {"bytes": picture(9), "path": "1.png"}} for n in range(2)]
    files.parquet(path, changed)
    recorded = recorder(chat, "AA")
    built("mmmu-dev", files).run(recorded, cache)
    assert len(recorded.calls) == 2


def test_references_that_are_numbers_are_texts(chat, tmp_path):
    files = drawn("vqa-chartqa-test-human", tmp_path)
    path = files.places.file("questions")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"answer": value} for row, value in zip(rows, (14, [14, 2.5]), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = built("vqa-chartqa-test-human", files).run(recorder(chat, ["14", "2.5"]), None)
    assert scores.values == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("key", "row", "words"),
    [
        ("refcoco-val", {"bbox": None}, r"refcoco_val\.jsonl question 2: its reference cannot be"),
        ("vqa-ai2d-test", {"answer": None}, ""),
        ("vqa-docvqa-val", {"question_id": "11"}, ""),
    ],
)
def test_what_cannot_be_scored_is_found_before_it_is_asked(chat, tmp_path, key, row, words):
    files = drawn(key, tmp_path)
    path = files.places.file("questions")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second | row)}\n")
    if words:
        with pytest.raises(DataError, match=words):
            built(key, files)
        return
    # One without a reference counts nowhere, and a note says so.
    scores = built(key, files).run(recorder(chat, ["cat", "cat"]), None)
    assert [*scores.values.values()] == [1.0]
    assert any("1 of 2 questions have no reference in" in note for note in scores.notes)


def test_ids_that_never_match_are_no_score_of_zero(tmp_path):
    files = drawn("vqa-docvqa-val", tmp_path)
    path = files.places.file("questions")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"question_id": str(row["question_id"])} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="none of the 2 questions of docvqa_val has a reference"):
        built("vqa-docvqa-val", files)


def test_half_a_pair_of_mme_is_refused_before_it_is_asked(tmp_path):
    files = drawn("mme", tmp_path)
    with pytest.raises(UserError, match="--limit must be even$"):
        built("mme", files, limit=3)


def test_a_question_left_out_moves_no_other_to_its_pair(chat, tmp_path):
    files = drawn("mmvp", tmp_path)
    path = files.places.file("questions")
    head, *rows = csv.reader(io.StringIO(path.read_text()))
    for n in (3, 4):
        files.image(f"{n}.jpg", n)
        rows.append([str(n), *rows[n - 3][1:]])
    path.write_text("".join(",".join(row) + "\n" for row in (head, *rows)))
    Path(files.places.image("1.jpg")).unlink()
    evaluator = built("mmvp", files, on_bad_sample="skip")
    # Letters of rows 2 to 4 are B, A and B: 2 has lost its partner, 3 and 4 are a pair.
    scores = evaluator.run(recorder(chat, "BBB"), None)
    assert scores.values == {"accuracy": 0.0, "single_accuracy": pytest.approx(2 / 3)}
    scores = evaluator.run(recorder(chat, "AAB"), None)
    assert scores.values == {"accuracy": 1.0, "single_accuracy": pytest.approx(2 / 3)}


def test_a_question_left_out_moves_no_other_to_its_type():
    """MMHal-Bench's types are places in its file, modulo 8."""
    ratings = [0, 1, 2, 3, 4, 5, 6, 0, 6]
    whole = reviews.hallucination_scores(ratings)
    assert whole["type_1"] == 3.0
    rest = reviews.hallucination_scores(ratings[1:], range(1, 9))
    assert rest["type_1"] == 6.0
    assert [rest[f"type_{n}"] for n in range(2, 9)] == [whole[f"type_{n}"] for n in range(2, 9)]
