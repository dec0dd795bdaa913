"""Runs a small trained model through every key of the original, each to its score or file.

    internvl demo runs/demo
    python tests/every_key.py runs/demo/model

The files are those that the original's own runs were given (tests/golden/eval_prompts), and for the
other keys files drawn in their layout. A line a key: where its files are from, questions, metrics,
the files for a server, and seconds of the whole call, model and report included. A key that a model
of the other family measures is left out; give that model for it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_files import picture
from drawn_benchmarks import Drawn
from original_runs import keys, lay_out

from internvl import evaluate
from internvl.datasets import published, tasks
from internvl.errors import UserError

SWAPPED = {"rsvqa-lr": "rsvqa-hr-test2", "rsvqa-hr-test2": "rsvqa-lr"}
"""The original gives these two keys each other's data."""


def of_list() -> list[str]:
    """The original's 71 keys."""
    captions = [name for name in published.TASKS if name.startswith("caption-")]
    return captions + [*tasks.tasks()]


def files_of(key: str, folder: Path) -> str:
    """Lays a key's files out below `folder`; returns whose they are."""
    source = SWAPPED.get(key, key)
    if source in keys():
        lay_out(source, folder)
        return "original"
    if key == "caption-nocaps":
        draw_captions(folder / "data/nocaps")
        return "drawn"
    task = tasks.tasks()[key]
    # A key of several is the files of each.
    of_members = {files_of(name, folder) for name in task.keys}
    for dataset in task.sets.values():
        Drawn(dataset, folder / "data")
    return " and ".join(sorted(of_members)) or "drawn"


def draw_captions(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    tree: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for n in range(3):
        picture(folder / f"images/{n}.jpg", (60 + 20 * n, 50))
        tree["images"].append({"id": n, "file_name": f"{n}.jpg"})
        texts = [{"id": 2 * n + k, "image_id": n, "caption": f"A color, {k}."} for k in range(2)]
        tree["annotations"] += texts
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(tree), encoding="utf-8")


def measure(model: Path, key: str, **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = files_of(key, folder)
        before = Path.cwd()
        os.chdir(folder)
        started = time.perf_counter()
        try:
            result = evaluate.measure(model, key, root=Path("data"), to="out", **options)
        except UserError as error:
            return {"key": key, "files": source, "stops": str(error)[:300]}
        finally:
            os.chdir(before)
        seconds = time.perf_counter() - started
        written = sorted(p.name for p in (folder / "out/result").iterdir() if p.is_file())
        values = {n.partition("/")[2]: round(v, 4) for n, v in result.metrics.items()}
        return {
            "key": key,
            "files": source,
            "counts": result.counts,
            "metrics": dict(list(values.items())[:8]),
            "written": len(written),
            "seconds": round(seconds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("keys", nargs="*", help="by default all 71")
    options = parser.parse_args()
    model = options.model.resolve()
    for key in options.keys or of_list():
        sys.stdout.write(json.dumps(measure(model, key, device="cpu")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
