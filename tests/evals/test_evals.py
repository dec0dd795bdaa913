"""Several evaluations of one model, as a run and the verb call them."""

import json
from pathlib import Path

from internvl import evals
from internvl.config import eval_config


def spec(data: Path, **more):
    return eval_config(
        type="retrieval", annotations=data / "test.txt", images=data, batch_size=4, **more
    )


def test_several_evaluations_of_a_handle(dual, data: Path, tmp_path: Path) -> None:
    """As `train` calls them: any mixture, into STEP.json."""
    configs = {"val": spec(data), "quick": spec(data, limit=4, modes=("c",), recall_k=(1,))}
    found = evals.run_all(evals.build(configs), dual, tmp_path / "evals", 7)
    assert json.loads((tmp_path / "evals/000007.json").read_text()) == found
    assert evals.measured(tmp_path / "evals", 7) == {"val", "quick"}
    assert "quick/c_image_retrieval_recall@1" in found
    assert (
        len((tmp_path / "evals/000007/quick.jsonl").read_text().splitlines()) == 4 + 1 + 2 + 3 + 1
    )
