"""Readers of the benchmarks' annotation files: each makes the questions of a data set.

An entry of tasks.yaml names one of READERS. What a reader puts in `fields` can be named by the
entry's template and result rows.
"""

import ast
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from internvl.data.json_rows import read_json
from internvl.data.tables import Table
from internvl.data.texts import read_text
from internvl.datasets.tasks import Places
from internvl.errors import DataError, UserError, counted
from internvl.evals.benchmark import video
from internvl.evals.benchmark.table import read_columns
from internvl.evals.scoring import domains, mmmu, yes_no

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PHRASE_INSTRUCTION = "Answer the question using a single word or phrase."
_NUM_IMAGES = 7  # columns image_1 … image_7 of MMMU


@dataclass(frozen=True)
class Item:
    """A question of a data set."""

    fields: Mapping[str, Any]
    """Name -> value, for the template, the result row and the score."""
    images: Sequence[Any] = ()
    """Paths, `data:` addresses or encoded images."""
    load: Callable[[], Sequence[Any]] | None = field(default=None, repr=False)
    """Decodes the images, where they are not files of their own."""
    sources: Sequence[str] = ()
    """Files that `load` reads: other answers belong to a changed one."""

    @property
    def paths(self) -> list[str]:
        """Image files of the question."""
        return [image for image in self.images if not _is_encoded(image)]


def _is_encoded(image: Any) -> bool:
    return not isinstance(image, str) or image.startswith("data:")


def _inline(cell: Any) -> str:
    """Returns the `data:` address of a base64 text, which may be one already."""
    text = str(cell)
    return text if text.startswith("data:") else f"data:image/jpeg;base64,{text}"


Reader = Callable[[Places], Iterator[Item]]


def read(places: Places) -> list[Item]:
    """Reads the questions of a data set, in the original's order.

    Raises:
        ConfigError: a missing file, with its address.
        DataError: a file that is not in its form.
    """
    places.check()
    reader = READERS[places.dataset.reader]
    try:
        return list(reader(places))
    except UserError:
        raise
    # A damaged list of options is a ValueError or a SyntaxError of literal_eval.
    except (LookupError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        paths = ", ".join(str(places.file(role)) for role in places.dataset.files)
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{paths}: not in the form of {places.dataset.name} ({reason}); fetch it again from "
            f"{next(iter(places.dataset.files.values())).address}"
        ) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file."""
    # Split at line feeds alone: a JSON text may hold other separators as they are.
    for position, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path} line {position}: no JSON ({error}); fetch the file again"
            ) from None


def option_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options and their lines: `option_lines`, and `option_block` with a line break
    before it if there are any."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return {
        "options": options,
        "option_lines": lines,
        "option_block": f"\n{lines}" if options else "",
    }


def _lettered(texts: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(_LETTERS, texts, strict=False))


def _vqa(places: Places) -> Iterator[Item]:
    answers = _answers_by_question(places)
    for row in read_lines(places.file("questions")):
        question_id = row["question_id"]
        fields = {
            "question": row["question"],
            "question_id": question_id,
            # Files of test splits have no answers.
            "annotation": row.get("answer"),
            "vizwiz_name": str(question_id).replace("data/vizwiz/test/", ""),
        }
        if answers is not None:
            # Compared as they are: the original knows no other form of an id.
            fields["answers"] = answers.get(question_id)
        yield Item(fields, [places.image(row["image"])])


def _answers_by_question(places: Places) -> dict[Any, list[str]] | None:
    """Returns question id -> its answers, from VQA's annotation file or the documents' one."""
    files = places.dataset.files
    if "annotations" in files:
        rows = read_json(places.file("annotations"))["annotations"]
        # Ten people's, whatever their confidence.
        return {row["question_id"]: [a["answer"] for a in row["answers"]] for row in rows}
    if "answers" in files:
        rows = read_json(places.file("answers"))["data"]
        return {row["questionId"]: row.get("answers", []) for row in rows}
    return None


def _pages(places: Places) -> Iterator[Item]:
    for row in read_json(places.file("questions"))["data"]:
        fields = {
            "question": row["question"],
            "question_id": row["questionId"],
            "annotation": row.get("answers"),
            "answers": row.get("answers"),
        }
        yield Item(fields, [places.image(f"{page}.jpg") for page in row["page_ids"]])


def _grounding(places: Places) -> Iterator[Item]:
    for row in read_lines(places.file("questions")):
        fields = {
            "sent": row["sent"],
            "gt_bbox": row["bbox"],
            "hw": [row["height"], row["width"]],
        }
        yield Item(fields, [places.image(row["image"])])


def _remote_grounding(places: Places) -> Iterator[Item]:
    for row in read_json(places.file("questions")):
        fields = {"prompt": row["prompt"], "bbox": row["bbox"], "size": row["size"]}
        yield Item(fields, [places.image(row["image"])])


def _remote_questions(places: Places) -> Iterator[Item]:
    for row in read_json(places.file("questions")):
        fields = {name: row[name] for name in ("question", "gt_answer", "type")}
        yield Item(fields | {"index": int(row["id"])}, [places.image(row["image"])])


def _mme(places: Places) -> Iterator[Item]:
    folder = places.file("questions")
    tasks = [task for names in yes_no.MME_TASKS.values() for task in names]
    # Sorted: the original takes the order of the directory.
    for path in sorted(folder.glob("*.txt")):
        if path.stem not in tasks:
            # A stray file would be a task of its own in the sum.
            raise DataError(f"{path}: MME has no task {path.stem!r}; it has {', '.join(tasks)}")
        for position, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            columns = line.strip().split("\t")
            if len(columns) != 3:
                raise DataError(
                    f"{path} line {position}: image, question and answer stand between tabs, and "
                    f"it has {counted(len(columns), 'column')}; fetch the file again"
                )
            image, question, expected = columns
            fields = {
                "task": path.stem,
                "image_name": image,
                "question": question,
                "expected": expected,
            }
            yield Item(fields, [places.image(f"{path.stem}/{image}")])


def _pope(places: Places) -> Iterator[Item]:
    folder = places.file("labels")
    # The file of questions, LLaVA's, has no labels.
    labels = {
        path.stem.removeprefix("coco_pope_"): [row["label"] for row in read_lines(path)]
        for path in sorted(folder.glob("coco_pope_*.json"))
    }
    positions = dict.fromkeys(labels, 0)
    for row in read_lines(places.file("questions")):
        category = row["category"]
        if category not in labels:
            raise DataError(f"{folder}: there is no coco_pope_{category}.json")
        # The nth answer of a category belongs to the nth line of its file.
        position = positions[category]
        positions[category] += 1
        fields = {
            "text": row["text"],
            "bare_text": row["text"].replace(_PHRASE_INSTRUCTION, "").strip(),
            "question_id": row["question_id"],
            "category": category,
            "label": labels[category][position] if position < len(labels[category]) else None,
            "metadata": {},
        }
        yield Item(fields, [places.image(row["image"])])


def _option_table(places: Places) -> Iterator[Item]:
    columns = read_columns(places.file("questions"))
    for index in range(len(columns["index"])):
        row = {name: values[index] for name, values in columns.items()}
        # Missing by pandas' rules: an option "None" is lost, as in the original.
        options = {letter: row[letter] for letter in "ABCDE" if row.get(letter) is not None}
        hint = row.get("hint")
        lines = "".join(f"\n{letter}. {text}" for letter, text in options.items())
        fields = {
            # An empty cell stops the original.
            "question": "" if row["question"] is None else row["question"],
            "hint_line": "" if hint is None else f"{hint}\n",
            "options": options,
            "option_lines": lines,
            "index": row["index"],
            "letter_of_answer": row.get("answer"),
            "category": row.get("category"),
        }
        yield Item(fields, [_inline(row["image"])])


def _science(places: Places) -> Iterator[Item]:
    for row in read_lines(places.file("questions")):
        options = _lettered(row["choices"])
        fields = {
            "question": row["question"],
            "hint_line": f"{row['hint']}\n" if row["hint"] else "",
            "letter_of_answer": _LETTERS[row["answer"]],
            "image_path": row["image"],
        }
        yield Item(fields | option_fields(options), [places.image(row["image"])])


def _seed(places: Places) -> Iterator[Item]:
    types = read_json(places.file("types"))
    names = {value: name for name, value in types["question_type"].items()}
    by_id = {row["question_id"]: row for row in types["questions"]}
    for row in read_lines(places.file("questions")):
        entry = by_id.get(row["question_id"], {})
        type_id = entry.get("question_type_id")
        fields = {
            "text": row["text"],
            "question_id": row["question_id"],
            "letter_of_answer": row.get("answer"),
            "type_id": type_id,
            "type": names.get(type_id),
            # Scored by the official file, whatever the row says.
            "scored_answer": entry.get("answer"),
        }
        yield Item(fields, [places.image(row["image"])])


def pair_options(text: str) -> dict[str, str]:
    """Splits "(a) Open (b) Closed" to {"A": "Open", "B": "Closed"}."""
    # evaluate_mmvp.py:63 splits here alone: a second "(b)" makes a third option.
    choices = text.split("(b)")
    choices[0] = choices[0].replace("(a)", "")
    return _lettered([choice.strip() for choice in choices])


def _mmvp(places: Places) -> Iterator[Item]:
    rows = csv.DictReader(io.StringIO(read_text(places.file("questions"))))
    for position, row in enumerate(rows):
        # The official file spells its first column with an l.
        row_id = row["lndex"] if "lndex" in row else row["Index"]
        expected = row["Correct Answer"]
        for letter in "abcd":
            expected = expected.replace(f"({letter})", letter.upper())
        fields = {"question": row["Question"], "id": row_id, "letter_of_answer": expected}
        # Questions of a pair follow each other in the file, whichever are left out later.
        fields |= {"pair": position // 2, **option_fields(pair_options(row["Options"]))}
        yield Item(fields, [places.image(f"{row_id}.jpg")])


@dataclass(frozen=True)
class _Again:
    """Reads a row once more."""

    read: Callable[[], Mapping[str, Any]]
    file: str

    def item(self, fields: Mapping[str, Any], columns: Sequence[str], folder: Path) -> Item:
        """Returns the question about the images in some columns, each one or a list."""

        def cells() -> list[Any]:
            row = self.read()
            listed = (row[c] if isinstance(row[c], list) else [row[c]] for c in columns)
            return [_cell_image(cell, folder) for row_cells in listed for cell in row_cells]

        return Item(fields, load=cells, sources=[self.file])


def _table_rows(folder: Path, split: str) -> Iterator[tuple[dict[str, Any], "_Again"]]:
    """Yields the rows of a split and what reads each again: its images stay on disk.

    The split is SPLIT.jsonl, or the Parquet and Arrow files of the hub whose names begin with it.
    """
    lines = folder / f"{split}.jsonl"
    if lines.is_file():
        for row in read_lines(lines):
            yield row, _Again(partial(dict, row), str(lines))
        return
    files = sorted(p for p in folder.rglob(f"{split}*") if p.suffix in (".parquet", ".arrow"))
    if not files:
        raise DataError(f"{folder}: there is no {split}*.parquet and no {split}.jsonl in it")
    for table in map(Table, files):
        for index in range(len(table)):
            row = table.row(index)
            yield row, _Again(partial(table.row, index), str(table.path))


def _cell_image(cell: Any, folder: Path) -> Any:
    """Returns an image of a table cell: its bytes, or the path that a JSON row has."""
    if isinstance(cell, Mapping):
        # The hub's image columns hold bytes, or the path of a file beside the table.
        if cell.get("bytes"):
            return cell["bytes"]
        cell = cell["path"]
    return cell if isinstance(cell, bytes) else str(folder / cell)


def _mmmu(places: Places) -> Iterator[Item]:
    folder, dataset = places.file("rows"), places.dataset
    key = None
    if "answers" in dataset.files:
        key = read_json(places.file("answers"))
    # Subjects without a folder have no rows: a part of the set can be measured alone.
    for name in mmmu.SUBJECTS:
        if not (folder / name).is_dir():
            continue
        for row, again in _table_rows(folder / name, dataset.split):
            # A Python list as text, in MMMU's own files; literal_eval runs no code.
            texts = [text.strip() for text in ast.literal_eval(row["options"])]
            names = [f"image_{n}" for n in range(1, _NUM_IMAGES + 1)]
            present = [column for column in names if row.get(column) is not None]
            fields = {
                "question": row["question"].strip(),
                "id": row["id"],
                "question_type": row["question_type"],
                "answer_of_set": row.get("answer"),
                "expected": None if key is None else key.get(row["id"]),
            }
            fields |= option_fields(_lettered(texts))
            yield again.item(fields, present, folder)
    if not any((folder / name).is_dir() for name in mmmu.SUBJECTS):
        raise DataError(f"{folder}: there is no folder of a subject, such as {mmmu.SUBJECTS[0]}")


def _mmmu_pro(places: Places) -> Iterator[Item]:
    folder = places.file("rows")
    for row, again in _table_rows(folder, "test"):
        texts = ast.literal_eval(str(row["options"]))
        columns = ["image"]
        if places.dataset.config != "vision":
            columns = []
            # The original stops at the first column without an image.
            for n in range(1, _NUM_IMAGES + 1):
                if not row.get(f"image_{n}"):
                    break
                columns.append(f"image_{n}")
        fields = {
            "question": _plain_marks(row.get("question", "")),
            "letter_of_answer": row["answer"],
            "row": {k: v for k, v in row.items() if not k.startswith("image")},
        }
        lines = option_fields(_lettered([_plain_marks(str(text)) for text in texts]))
        fields |= lines | {"options": _lettered([str(text) for text in texts])}
        yield again.item(fields, columns, folder)


def _plain_marks(text: str) -> str:
    """Replaces <image 1> … <image 7> by <image>."""
    return re.sub(r"<image [1-7]>", "<image>", text)


def _mathvista(places: Places) -> Iterator[Item]:
    folder = places.file("rows")
    for row, again in _table_rows(folder, places.dataset.split):
        columns = {k: v for k, v in row.items() if k != "decoded_image"}
        yield again.item({"query": row["query"], "row": columns}, ["decoded_image"], folder)


def _mantis(places: Places) -> Iterator[Item]:
    folder = places.file("rows")
    for row, again in _table_rows(folder, "test"):
        count = len(row["images"])
        is_choice = row["question_type"] == "multi-choice"
        block = ""
        if is_choice:
            # Without a line break of its own even if there are no options, as in the original.
            block = "\n" + "\n".join(text.strip() for text in row["options"])
        # The images come as numbered lines instead of the leading block of marks.
        question = interleaved_question(row["question"], count)
        fields = {
            # An empty question leaves no empty line before the instruction.
            "question_lines": f"{question}{block}\n".lstrip(),
            "question_type": row["question_type"],
            "row": {k: v for k, v in row.items() if k not in ("images", "data_source")},
        }
        yield again.item(fields, ["images"], folder)


def interleaved_question(question: str, num_images: int) -> str:
    """Drops the leading run of <image>, one for each image; names the others Image-1, Image-2, …"""
    text = question.replace(" ".join(["<image>"] * num_images), "").strip()
    for n in range(1, num_images + 1):
        text = text.replace("<image>", f"Image-{n}", 1)
    return text


def _mirb(places: Places) -> Iterator[Item]:
    # Sorted: the original takes the order of the directory.
    for path in sorted(places.file("questions").glob("*.json")):
        for row in read_json(path):
            fields = {
                "questions": row["questions"],
                # Numbers in some tasks' files; evaluate_mirb.py:42 compares their text.
                "answers": str(row["answers"]),
                "task": path.stem,
                "instruction": domains.mirb_instruction(path.stem),
            }
            yield Item(fields, [places.image(name) for name in row["images"]])


def listed_options(text: str) -> dict[str, str]:
    """Splits lines "A: cat" to {"A": "cat"}; a line's own letter and colon go wherever they are."""
    options = {}
    for letter, line in zip(_LETTERS, text.split("\n"), strict=False):
        line = line.strip()
        if line.startswith(f"{letter}:"):
            # evaluate_mmiu.py:72 replaces every one of the line, not the first alone.
            line = line.replace(f"{letter}:", "")
        options[letter] = line.strip()
    return options


def _mmiu(places: Places) -> Iterator[Item]:
    for row in read_lines(places.file("questions")):
        names = row["input"]["input_image_path"]
        fields = {
            "question": row["input"]["question"],
            "context": row["input"]["context"],
            "image_names": names,
            "gt": row["output"]["output_text"],
            "task": row["task"],
            "options": listed_options(row["options"]),
        }
        yield Item(fields, [places.image(name) for name in names])


def _tiny(places: Places) -> Iterator[Item]:
    root = places.file("questions")
    for folder in sorted(path.parent for path in root.glob("*/dataset.json")):
        for row in read_json(folder / "dataset.json"):
            # As the original joins them; the category is the folder before the last name.
            name = os.path.join(places.dataset.files["questions"].path, folder.name)
            path = os.path.join(name, row["image_path"])
            fields = {
                "question": row["question"],
                "gt_answers": row["gt_answers"],
                "image_path": path,
                "task_type": path.split("/")[-2],
            }
            yield Item(fields, [str(folder / row["image_path"])])


def _questions(places: Places) -> Iterator[Item]:
    for row in read_lines(places.file("questions")):
        fields = {
            "text": row["text"],
            "question_id": row["question_id"],
            # MM-Vet's evaluator looks answers up by this form.
            "v1_id": f"v1_{row['question_id']}",
            "category": row.get("category", "default"),
            "image_name": row["image"],
            "metadata": {},
        }
        yield Item(fields, [places.image(row["image"])])


def _mmvet_v2(places: Places) -> Iterator[Item]:
    for question_id, row in read_json(places.file("questions")).items():
        # Text and images take turns; the first of each is asked about.
        text, *names = row["question"].split("<IMG>")
        if not names:
            raise DataError(f"{places.file('questions')}: {question_id} names no image")
        fields = {"text": text, "question_id": question_id, "expected": row.get("answer")}
        yield Item(fields, [places.image(names[0])])


def _mmhal(places: Places) -> Iterator[Item]:
    for position, row in enumerate(read_lines(places.file("questions"))):
        image = row.get("image")
        shown = _inline(image) if image else places.path(row["image_path"])
        fields = {
            "question": row["question"],
            "position": position,
            "row": {k: v for k, v in row.items() if k != "image"},
        }
        yield Item(fields, [str(shown)])


def _drivelm(places: Places) -> Iterator[Item]:
    for row in read_lines(places.file("questions")):
        question, expected = row["conversations"][:2]
        fields = {
            "question_text": question["value"].strip(),
            "question_old": row["question_old"],
            "expected": expected["value"].strip(),
            "id": row["id"],
        }
        yield Item(fields, [places.image(row["image"])])


def _world(places: Places) -> Iterator[Item]:
    rows = read_json(places.file("questions"))
    # The original measures a subtask at a time; its default is driving.
    chosen = [row for row in rows if row["Subtask"] == places.dataset.subtask]
    if not chosen:
        names = ", ".join(sorted({row["Subtask"] for row in rows}))
        raise DataError(f"MME-RealWorld has no subtask {places.dataset.subtask!r}; it has {names}")
    for row in chosen:
        fields = {
            "question": row["Text"],
            "choices": row["Answer choices"],
            "choice_lines": "\n".join(row["Answer choices"]),
            "letter_of_answer": row["Ground truth"],
            "index": row["Question_id"],
            "category": row["Category"],
            "task": row["Task"],
        }
        yield Item(fields, [places.image(row["Image"])])


def _mvbench(places: Places) -> Iterator[Item]:
    folder, segments = places.file("questions"), places.dataset.segments
    for task in video.TASKS:
        path = folder / task.file
        # A part of the tasks can be measured alone.
        if not path.is_file():
            continue
        for row in read_json(path):
            # By text, as evaluate_mvbench.py:167: of equal candidates the last one counts.
            letters = {text: _LETTERS[n] for n, text in enumerate(row["candidates"])}
            lines = "".join(f"\n({_LETTERS[n]}) {c}" for n, c in enumerate(row["candidates"]))
            bound = (float(row["start"]), float(row["end"])) if task.has_bounds else None
            clip = places.path(f"data/MVBench/video/{task.folder}/{row['video']}")
            fields = {
                "question": row["question"],
                # The question and its options end without white space, as in the original.
                "option_lines": lines.rstrip(),
                "gt": f"({letters.get(row['answer'], '@')}) {row['answer']}",
                "task_type": task.name,
                "video_path": str(clip),
            }
            load = partial(video.read_segments, clip, bound, segments)
            yield Item(fields, load=load, sources=[str(clip)])


READERS: dict[str, Reader] = {
    "vqa": _vqa,
    "pages": _pages,
    "grounding": _grounding,
    "remote_grounding": _remote_grounding,
    "remote_questions": _remote_questions,
    "mme": _mme,
    "pope": _pope,
    "option_table": _option_table,
    "science": _science,
    "seed": _seed,
    "mmvp": _mmvp,
    "mmmu": _mmmu,
    "mmmu_pro": _mmmu_pro,
    "mathvista": _mathvista,
    "mantis": _mantis,
    "mirb": _mirb,
    "mmiu": _mmiu,
    "tiny": _tiny,
    "questions": _questions,
    "mmvet_v2": _mmvet_v2,
    "mmhal": _mmhal,
    "drivelm": _drivelm,
    "world": _world,
    "mvbench": _mvbench,
}
"""By the name in tasks.yaml."""
