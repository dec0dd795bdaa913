"""Small models and data in the layout of the original's guides, and its command lines typed."""

import json
import os
import subprocess
from pathlib import Path

import pair_runs
from chat_folders import prompt_folder
from PIL import Image

COLORS = ("red", "green", "blue", "gray")
MODEL_CODE = "modeling_internvl_chat.py"


def type_lines(lines: str, folder: Path, **variables: str) -> str:
    """Types lines into a shell in `folder`, up to the first that fails; returns what they print."""
    package = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        ["bash", "-e"],
        input=lines,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


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
    train, test = "\n".join([header, *rows[:16]]), "\n".join([header, *rows[16:24]])
    for name in ("flickr30k_train_karpathy", "flickr30k_cn_train"):
        (flickr / f"{name}.txt").write_text(train + "\n")
    for name in ("flickr30k_test_karpathy", "flickr30k_cn_test", "flickr30k_val_karpathy"):
        (flickr / f"{name}.txt").write_text(test + "\n")
    captions = [row.partition(",") for row in rows[16:24]]
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
