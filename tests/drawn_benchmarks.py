"""Files of every benchmark, drawn in the layout of the published ones: a few questions each."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.datasets.tasks import Dataset, Places

LETTERS = "ABCD"


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> bytes:
    """A JPEG of noise."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Drawn:
    """Writes the files of one data set below a root, usually FOLDER/data."""

    def __init__(self, dataset: Dataset, root: Path) -> None:
        self.dataset = dataset
        self.places = Places(root, dataset)
        getattr(self, f"_{dataset.reader}")()

    def lines(self, role: str, rows: list[Any]) -> None:
        self.text(role, "".join(json.dumps(row) + "\n" for row in rows))

    def text(self, role: str, text: str) -> None:
        self.write(self.places.file(role), text.encode())

    def json(self, role: str, value: Any) -> None:
        self.text(role, json.dumps(value))

    def write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def image(self, name: str, seed: int = 0) -> str:
        """Draws an image where the annotations' `name` leads; returns the name."""
        self.write(Path(self.places.image(name)), picture(seed))
        return name

    def parquet(self, path: Path, rows: list[dict[str, Any]]) -> None:
        import pyarrow
        from pyarrow import parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def _vqa(self) -> None:
        folder = self.dataset.folders[0].path
        # VizWiz's ids are its images' names.
        ids: list[Any] = [11, 12]
        if self.dataset.name.startswith("vizwiz_test"):
            ids = [f"{folder}/VizWiz_test_{n}.jpg" for n in range(2)]
        rows = [
            {
                "image": self.image(f"{folder}/{n}.jpg", n),
                "question": f"What is number {n}?",
                "question_id": question_id,
                "answer": ["a cat", "cat"] if "ocrvqa" not in self.dataset.name else "cat",
            }
            for n, question_id in enumerate(ids)
        ]
        if "annotations" in self.dataset.files or "chart" in self.dataset.name:
            rows = [row | {"answer": "12.5"} for row in rows]
        self.lines("questions", rows)
        if "annotations" in self.dataset.files:
            answers = [{"answer": text} for text in ["cat"] * 7 + ["dog"] * 3]
            found = [{"question_id": i, "answers": answers} for i in ids]
            self.json("annotations", {"annotations": found})
        if "answers" in self.dataset.files:
            self.json("answers", {"data": [{"questionId": i, "answers": ["cat"]} for i in ids]})

    def _pages(self) -> None:
        rows = []
        for n in range(2):
            pages = [f"doc_p{page}" for page in range(n + 1)]
            for page in pages:
                self.image(f"{page}.jpg", n)
            rows.append({"questionId": n, "question": "Which total?", "page_ids": pages})
            if self.dataset.score:
                rows[-1]["answers"] = ["12.50"]
        self.json("questions", {"data": rows})

    def _grounding(self) -> None:
        folder = "data/coco/train2014"
        row = {"sent": "the left cat", "bbox": [0.0, 0.0, 45.0, 60.0], "height": 60, "width": 90}
        images = [self.image(f"{folder}/{n}.jpg", n) for n in range(2)]
        self.lines("questions", [{"image": image, **row} for image in images])

    def _remote_grounding(self) -> None:
        row = {"prompt": "<ref>a ship</ref>", "bbox": [0, 0, 50, 50], "size": [90, 60]}
        self.json("questions", [{"image": self.image("a/1.jpg"), **row}])

    def _remote_questions(self) -> None:
        image = self.image("1.tif.jpg")
        answers = {"presence": "yes", "count": "3", "area": "120m2", "comp": "no"}
        self.json(
            "questions",
            [
                {"id": n, "image": image, "question": "How?", "gt_answer": answer, "type": kind}
                for n, (kind, answer) in enumerate(answers.items())
            ],
        )

    def _mme(self) -> None:
        folder = self.places.file("questions")
        folder.mkdir(parents=True)
        for task in ("existence", "code_reasoning"):
            image = Path(self.image(f"{task}/1.jpg")).name
            asked = "Is it so? Please answer yes or no."
            text = f"{image}\t{asked}\tYes\n{image}\t{asked}\tNo\n"
            (folder / f"{task}.txt").write_text(text)

    def _pope(self) -> None:
        asked = "Is there a cat? Answer the question using a single word or phrase."
        rows = []
        for n, category in enumerate(("adversarial", "popular", "random")):
            image = self.image("1.jpg")
            row = {"question_id": n, "image": image, "text": asked, "category": category}
            rows.append(row)
            label = json.dumps({"label": "yes"}) + "\n"
            folder = self.places.file("labels")
            self.write(folder / f"coco_pope_{category}.json", label.encode())
        self.lines("questions", rows)

    def _option_table(self) -> None:
        head = "index question hint A B C D answer category image source l2-category comment"
        image = base64.b64encode(picture(1)).decode()
        cells = ["1", "What?", "", "cat", "dog", "", "", "A", "c", image, "s", "l", ""]
        more = ["2", "Which?", "Look.", "1", "2", "3", "4", "D", "c", image, "s", "l", ""]
        table = "\n".join("\t".join(row) for row in (head.split(), cells, more))
        self.text("questions", table + "\n")

    def _science(self) -> None:
        row = {"question": "Which?", "hint": "A hint.", "choices": ["cat", "dog"], "answer": 1}
        self.lines("questions", [{"image": self.image("data/science/1.jpg"), **row}])

    def _seed(self) -> None:
        names = {"Scene Understanding": 1, "Action Recognition": 10}
        rows, official = [], []
        for n, type_id in enumerate(names.values()):
            image = self.image(f"SEED-Bench-image/{n}.jpg")
            rows.append({"image": image, "text": "Which?\nA. x\nB. y", "question_id": str(n)})
            rows[-1]["answer"] = "B"
            official.append({"question_id": str(n), "question_type_id": type_id, "answer": "B"})
        self.lines("questions", rows)
        self.json("types", {"question_type": names, "questions": official})

    def _mmvp(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["lndex", "Question", "Options", "Correct Answer"])
        for n in (1, 2):
            self.image(f"{n}.jpg", n)
            writer.writerow([n, "Is it open?", "(a) Open (b) Closed", f"({'ab'[n - 1]})"])
        self.text("questions", text.getvalue())

    def _mmmu(self) -> None:
        folder, split = self.places.file("rows"), self.dataset.split
        images = {f"image_{n}": None for n in range(1, 8)}
        first = {"bytes": picture(3), "path": "1.png"}
        rows = [
            {
                "id": f"{split}_Art_{n}",
                "question": "What is <image 1>?",
                "options": str(options),
                "answer": "A",
                "question_type": kind,
                **images,
                "image_1": first,
            }
            for n, (kind, options) in enumerate(
                {"multiple-choice": ["cat", "dog"], "open": []}.items(), start=1
            )
        ]
        self.parquet(folder / "Art" / f"{split}-00000-of-00001.parquet", rows)
        if "answers" in self.dataset.files:
            key = {r["id"]: {"question_type": r["question_type"]} for r in rows}
            self.json("answers", {i: row | {"ground_truth": "A"} for i, row in key.items()})

    def _mmmu_pro(self) -> None:
        row: dict[str, Any] = {"id": "test_Art_1", "options": "['cat', 'dog']", "answer": "B"}
        row |= {"subject": "Art", "topic_difficulty": "Easy"}
        image = {"bytes": picture(4), "path": "1.png"}
        if self.dataset.config == "vision":
            row["image"] = image
        else:
            row |= {"question": "What is <image 1>?", "image_1": image, "image_2": None}
        self.parquet(self.places.file("rows") / "test-00000-of-00001.parquet", [row])

    def _mathvista(self) -> None:
        row = {
            "pid": "1",
            "query": "Hint: Answer with an integer.\nQuestion: How many?",
            "question": "How many?",
            "choices": None,
            "answer": "3",
            "question_type": "free_form",
            "answer_type": "integer",
            "precision": 1.0,
            "unit": None,
            "image": "images/1.jpg",
            "decoded_image": {"bytes": picture(5), "path": "1.jpg"},
            "metadata": {
                "task": "figure question answering",
                "skills": ["arithmetic reasoning"],
                "source": "x",
                "category": "general-vqa",
                "context": "bar chart",
                "grade": "daily life",
                "language": "english",
            },
        }
        self.parquet(self.places.file("rows") / f"{self.dataset.split}-00000.parquet", [row])

    def _mantis(self) -> None:
        images = [{"bytes": picture(n), "path": f"{n}.jpg"} for n in range(2)]
        rows = [
            {
                "id": f"{n}",
                "question": "<image> <image> Are both cats?",
                "question_type": kind,
                "options": options,
                "answer": answer,
                "images": images,
                "data_source": "x",
                "category": "c",
            }
            for n, (kind, options, answer) in enumerate(
                [("multi-choice", ["(A) Yes", "(B) No"], "A"), ("short-answer", [], "Yes")]
            )
        ]
        self.parquet(self.places.file("rows") / "test-00000-of-00001.parquet", rows)

    def _mirb(self) -> None:
        images = [self.image(f"images/{n}.jpg", n) for n in range(2)]
        row = {"questions": "Are both cats?", "answers": "Yes", "images": images}
        for task in ("visual_chain", "codeu"):
            path = self.places.file("questions") / f"{task}.json"
            self.write(path, json.dumps([row]).encode())

    def _mmiu(self) -> None:
        images = [self.image(f"2D-spatial/{n}.jpg", n) for n in range(2)]
        row = {
            "task": "point_tracking",
            "input": {
                "input_image_path": images,
                "question": "Where?",
                "context": "Select from:\nA: left\nB: right",
            },
            "output": {"output_text": "A"},
            "options": "A: left\nB: right",
        }
        self.lines("questions", [row])

    def _tiny(self) -> None:
        folder = self.places.file("questions")
        for name in ("Visual_Reasoning", "Object_Hallucination"):
            row = {"question": "Is it a cat?", "gt_answers": "yes", "image_path": "1.jpg"}
            self.write(folder / name / "dataset.json", json.dumps([row]).encode())
            self.write(folder / name / "1.jpg", picture(6))

    def _questions(self) -> None:
        image = self.image("1.jpg")
        row = {"question_id": 0, "image": image, "text": "What?", "category": "conv"}
        self.lines("questions", [row])

    def _mmvet_v2(self) -> None:
        row = {"question": f"What?<IMG>{self.image('v2_0.jpg')}", "answer": "a cat"}
        self.json("questions", {"v2_0": row})

    def _mmhal(self) -> None:
        row = {"question_type": "attribute", "question_topic": "x", "image_id": "1"}
        row |= {"image_src": "http://x/1.jpg", "image_content": ["cat"], "gt_answer": "red"}
        image = base64.b64encode(picture(7)).decode()
        self.lines("questions", [{**row, "question": "Which color?", "image": image}])

    def _drivelm(self) -> None:
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A car."}]
        row = {"id": "s_0", "image": self.image("1.jpg"), "conversations": turns}
        self.lines("questions", [{**row, "question_old": "What?"}])

    def _world(self) -> None:
        row = {
            "Question_id": "q/1",
            "Image": self.image("1.jpg"),
            "Text": "What?",
            "Answer choices": ["(A) cat", "(B) dog"],
            "Ground truth": "A",
            "Category": "c",
            "Task": "Perception",
            "Subtask": self.dataset.subtask,
        }
        self.json("questions", [row])

    def _mvbench(self) -> None:
        row = {"video": "clip", "question": "What?", "candidates": ["x", "y"], "answer": "y"}
        row |= {"start": 0.0, "end": 1.0}
        path = self.places.file("questions") / "episodic_reasoning.json"
        self.write(path, json.dumps([row]).encode())
        for n in range(1, 5):
            path = self.places.path(f"data/MVBench/video/tvqa/frames_fps3_hq/clip/{n:05d}.jpg")
            self.write(path, picture(n))
