"""An evaluation shared out over ranks: dealing, errors, and results of any number of ranks."""

import json
from pathlib import Path

import pytest
import yaml
from photos import COLORS, photo
from ranks import run_ranks

from internvl import evals
from internvl.config import eval_config
from internvl.evals.sharing import deal

MEASURE = """
import sys
from pathlib import Path

import yaml

from internvl import dist, evals
from internvl.config import eval_config
from internvl.inference import load as loading

dist.init_from_env("cpu")
specs = yaml.safe_load({specs!r})
evaluators = evals.build({{name: eval_config(**keys) for name, keys in specs.items()}})
handle = loading.load(Path({model!r}), device="cpu", dtype="float32")
print(evals.run_all(evaluators, handle, Path({folder!r}), 3, Path({folder!r}) / "features"))
"""


def indices(costs, ranks, **options):
    return [
        [turn.index if turn.counts else None for turn in share]
        for share in deal(costs, ranks, **options)
    ]


def test_batches_are_dealt_by_their_cost() -> None:
    assert indices([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    # Longest first: 9 | 5 + 4, and the last one where least is.
    assert indices([4, 9, 5, 1], 2) == [[1, 3], [2, 0]]
    assert indices([3], 3) == [[0], [], []]
    assert indices([], 2) == [[], []]


def test_in_step_every_rank_has_as_many_batches() -> None:
    assert indices([4, 9, 5, 1, 2], 2, in_step=True) == [[1, 0, 3], [2, 4, None]]
    assert indices([7], 3, in_step=True) == [[0], [None], [None]]
    assert indices([], 3, in_step=True) == [[], [], []]


@pytest.fixture
def specs(data: Path) -> dict:
    """An evaluation of every type that InternVL-14B has, in many batches."""
    tree = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(10)],
        "annotations": [
            {"image_id": n, "id": n, "caption": f"{color} x"} for n, color in enumerate(COLORS)
        ],
    }
    (data / "captions.json").write_text(json.dumps(tree))
    for n in range(6):
        for k in range(1 + n % 2):
            photo(data / f"classes/n{n}/{k}.jpg", 10 * n + k, (50 + 60 * k, 90))
    captions = {"annotations": str(data / "captions.json"), "images": str(data)}
    short = {"metrics": "exact", "max_new_tokens": 4, "num_beams": 2, "batch_size": 3}
    pairs = {"annotations": str(data / "test.txt"), "images": str(data)}
    return {
        "texts": {"type": "caption", **captions, **short},
        "pairs": {"type": "retrieval", **pairs, "batch_size": 1, "rerank": 2, "recall_k": [1, 5]},
        "classes": {"type": "classify", "annotations": str(data / "classes"), "batch_size": 1},
    }


def written(folder: Path) -> dict[str, str]:
    files = [folder / "000003.json", *(folder / "000003").glob("*.jsonl")]
    return {file.name: file.read_text() for file in files}


def test_results_do_not_depend_on_the_number_of_ranks(
    model: Path, dual, specs: dict, tmp_path: Path
) -> None:
    evaluators = evals.build({name: eval_config(**keys) for name, keys in specs.items()})
    alone = evals.run_all(evaluators, dual, tmp_path / "alone", 3, tmp_path / "alone/features")
    keys = {"specs": yaml.safe_dump(specs, sort_keys=False), "model": str(model)}
    outputs = run_ranks(MEASURE.format(**keys, folder=str(tmp_path / "together")))
    assert outputs == [f"{alone}\n"] * 2
    assert written(tmp_path / "together") == written(tmp_path / "alone")
    # Both ranks have answered.
    answers = [*(tmp_path / "together/features").glob("captions-*/*.jsonl")]
    assert sorted(file.name[:4] for file in answers) == ["0000", "0001"]
    assert sum(len(file.read_text().splitlines()) for file in answers) == 10


FAIL = """
from internvl import dist
from internvl.errors import OtherRankFailed, UserError
from internvl.evals.sharing import Work

dist.init_from_env("cpu")

def compute(batch):
    if batch == 1:
        raise UserError("batch 1 is bad")
    return batch

try:
    Work("batches", lambda batch: batch, compute).run([0, 1, 2, 3], sizes=[1] * 4)
except OtherRankFailed as error:
    print("other:", error)
except UserError as error:
    print("own:", error)
try:
    dist.on_main(lambda: Work.missing if dist.rank() else int("4"))
    dist.on_main(lambda: exec("raise UserError('main alone')", globals()))
except UserError as error:
    print(type(error).__name__, error)
"""


def test_an_error_of_one_rank_ends_all_of_them() -> None:
    assert run_ranks(FAIL) == [
        "other: batch 1 is bad\nUserError main alone\n",
        "own: batch 1 is bad\nOtherRankFailed main alone\n",
    ]


COUNT = """
from internvl import dist
from internvl.evals import sharing

dist.init_from_env("cpu")


class Shown(sharing.Progress):
    def close(self):
        print(self.done, "of", self.total, self.unit)
        super().close()


sharing.Progress = Shown
work = sharing.Work("images", lambda batch: batch, lambda batch: [2 * n for n in batch])
batches = [[1, 2], [3], [4, 5, 6], [7]]
print(work.run(batches, sizes=[*map(len, batches)], done={3: [14]}))
print(sharing.spread("abcde", lambda letters: [f"{x} by {dist.rank()}" for x in letters]))
"""


def test_progress_counts_the_items_of_all_ranks() -> None:
    letters = ["a by 0", "b by 1", "c by 0", "d by 1", "e by 0"]
    results = [[2, 4], [6], [8, 10, 12], [14]]
    assert run_ranks(COUNT) == [f"7 of 7 images\n{results}\n{letters}\n", f"[]\n{letters}\n"]
