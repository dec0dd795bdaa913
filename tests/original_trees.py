"""Small models and data in the layout of the original's guides, and its command lines typed."""

import ast
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pair_runs
import pytest
from chat_folders import prompt_folder
from command_line import call
from PIL import Image

from internvl.compat.shims import is_shim

COLORS = ("red", "green", "blue", "gray")
MODEL_CODE = "modeling_internvl_chat.py"


class Terminal:
    """Types lines of the guides in a folder of shims.

    A shim's own words are called in this process: to start each would import torch once more.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.cd(folder)

    def cd(self, folder: str | Path) -> None:
        """Changes the working folder."""
        self.monkeypatch.chdir(folder)

    def type(self, line: str, code: int = 0) -> str:
        """Runs a line; returns what it prints, which fails the test if it ends otherwise."""
        words = shlex.split(line)
        with pytest.MonkeyPatch.context() as patch:
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("=", 1))
            if words[0] in ("sh", "bash", "python", "python3"):
                del words[0]
            else:
                assert os.access(words[0], os.X_OK)
            ended, out, err = call(self.capsys, *_of_shim(Path(words[0])), *words[1:])
        assert ended == code, out + err
        return out + err


def _of_shim(path: Path) -> list[str]:
    """The words that a shim hands to the package."""
    assert is_shim(path)
    text = path.read_text()
    python = re.search(r"^command = (.*)$", text, re.MULTILINE)
    words = ast.literal_eval(python[1]) if python else shlex.split(text.splitlines()[-1])[2:]
    assert words[1:3] == ["-m", "internvl"]
    return [word for word in words[3:] if word != "$@"]


def chat_model(to: Path) -> Path:
    """A chat model as a release is laid out, with the original's code and `auto_map`."""
    folder = prompt_folder("internlm2.internlm2-chat", to)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": f"{Path(MODEL_CODE).stem}.InternVLChatModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MODEL_CODE).write_text("# the original's class\n")
    return folder


def coco(folder: Path, num_samples: int) -> None:
    """The caption data of `data/coco`: some images, training lines and a test set of two images."""
    notes = folder / "annotations"
    notes.mkdir(parents=True)
    for name in ("train2014", "val2014", "test2015"):
        (folder / name).mkdir()
    rows, listed, references = [], [], []
    for index, color in enumerate(COLORS):
        # The test list has no ids: they are in the names.
        test = f"val2014/COCO_val2014_{index:012d}.jpg"
        for name in (f"train2014/{index}.jpg", test):
            Image.new("RGB", (64, 64), color).save(folder / name)
        listed.append({"image": test, "caption": [f"a {color} square"]})
        references.append({"id": index, "image_id": index, "caption": f"a {color} square"})
    for index in range(num_samples):
        color = COLORS[index % len(COLORS)]
        turns = [
            {"from": "human", "value": "<image>\nProvide a one-sentence caption."},
            {"from": "gpt", "value": f"a {color} square"},
        ]
        image = f"train2014/{index % len(COLORS)}.jpg"
        rows.append(json.dumps({"id": index, "image": image, "conversations": turns}))
    (notes / "coco_karpathy_train_567k.jsonl").write_text("\n".join(rows) + "\n")
    (notes / "coco_karpathy_test.json").write_text(json.dumps(listed))
    tree = {"images": [{"id": i} for i in range(len(COLORS))], "annotations": references}
    (notes / "coco_karpathy_test_gt.json").write_text(json.dumps(tree))


def set_length(file: Path, length: int) -> None:
    """Writes how many samples each data set of a list in shell/data has."""
    tree = json.loads(file.read_text())
    for entry in tree.values():
        entry["length"] = length
    file.write_text(json.dumps(tree))


def pairs(root: Path) -> None:
    """Flickr30K, Flickr30K-CN, COCO and NoCaps as InternVL-14B's guide has them."""
    flickr, coco_folder, nocaps = (root / "data" / n for n in ("flickr30k", "coco", "nocaps"))
    pair_runs.draw(flickr / "Images")
    lines = (flickr / "Images/captions.txt").read_text()
    (flickr / "Images/captions.txt").unlink()
    header, *rows = lines.splitlines()
    train, test = "\n".join([header, *rows[:16]]), "\n".join([header, *rows[16:40]])
    for name in ("flickr30k_train_karpathy", "flickr30k_cn_train"):
        (flickr / f"{name}.txt").write_text(train + "\n")
    for name in ("flickr30k_test_karpathy", "flickr30k_cn_test", "flickr30k_val_karpathy"):
        (flickr / f"{name}.txt").write_text(test + "\n")
    captions = [row.partition(",") for row in rows[16:40]]
    names = list(dict.fromkeys(name for name, _, _ in captions))
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    notes = [
        {"id": i, "image_id": names.index(name), "caption": text}
        for i, (name, _, text) in enumerate(captions)
    ]
    tree = json.dumps({"images": images, "annotations": notes})
    (flickr / "flickr30k_test_karpathy.json").write_text(tree)
    (nocaps / "images").mkdir(parents=True)
    for name in names:
        content = (flickr / "Images" / name).read_bytes()
        (nocaps / "images" / name).write_bytes(content)
    (nocaps / "nocaps_val_4500_captions.json").write_text(tree)
    coco(coco_folder, 4)
    train_list = [
        {"image": f"train2014/{i % 4}.jpg", "caption": f"a {COLORS[i % 4]} square"}
        for i in range(8)
    ]
    (coco_folder / "annotations/coco_karpathy_train.json").write_text(json.dumps(train_list))


def playground(root: Path, sets: dict[str, dict[str, Any]]) -> None:
    """Two samples and an image for every data set of a list in shell/data."""
    for entry in sets.values():
        images, file = root / entry["root"], root / entry["annotation"]
        images.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(images / "one.jpg")
        turns = [
            {"from": "human", "value": "<image>\nWhich color?"},
            {"from": "gpt", "value": "red"},
        ]
        row = json.dumps({"id": 0, "image": "one.jpg", "conversations": turns})
        file.write_text(f"{row}\n{row}\n")
