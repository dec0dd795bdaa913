"""tests/ mirrors the package: who changes a module knows which file tests it.

`internvl/ROOM/x.py` is tested in `tests/ROOM/test_x.py`, the room's own functions (its `__init__`)
in `tests/ROOM/test_ROOM.py`. A long file may be cut by topic: `test_x_topic.py` is one of x's.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "internvl", ROOT / "tests"

ONE_DOOR = {
    "cli": "a verb is its words and what they print",
    "check": "a report is what `check.run` returns",
    "config": "a recipe is read whole: its sections' rules are seen in its problems",
    "config/objective": "sections of a recipe, as the rest of config",
    "data/captions": "forms of one file: every test reads each of them",
    "demo": "a demo's parts only run one after the other",
    "datasets/labelled": "a reader is seen in the set it reads",
    "evals/benchmark": "an entry is seen in its questions, files and scores together",
    "evals/scoring": "one table holds every function to the original's results",
    "export": "layouts are what an export writes",
    "evals/pairing": "questions, forms and rules are seen in the pairs that they make",
    "plan": "a plan is one table",
    "report": "a style is seen on a page alone",
    "serve": "a server is what its clients are answered",
    "zoo": "tables of facts: what reads them is tested",
}
"""Rooms whose modules are tested through the room's door, in the room's own test file."""

ELSEWHERE = {
    "check/rank_rows.py": ("check/test_rehearse.py", "what a rehearsal runs"),
    "data/transfer.py": ("data/test_loader.py", "what workers hand over"),
    "datasets/checklist.py": ("datasets/test_prepare.py", "prepare lists what is missing"),
    "datasets/mmpr.py": ("datasets/test_prepare.py", "a data set to prepare"),
    "datasets/tasks.py": ("evals/benchmark/test_benchmark.py", "entries are what they ask"),
    "evals/asking.py": ("evals/benchmark/test_benchmark.py", "how every question is asked"),
    "evals/call/folders.py": ("test_evaluate.py", "where results are written"),
    "evals/call/lines.py": ("evals/test_retrieval.py", "lines as the originals write them"),
    "evals/call/measured.py": ("evals/test_retrieval.py", "tables beside published values"),
    "evals/call/page.py": ("test_evaluate.py", "what a call leaves"),
    "evals/call/opening.py": ("test_evaluate.py", "how a model is measured"),
    "evals/held_out.py": ("test_evaluate.py", "samples of a loss or of pairs"),
    "evals/loss.py": ("test_evaluate.py", "a loss needs a run to be measured of"),
    "evals/scores.py": ("data/captions/test_captions.py", "scores of captions of every form"),
    "inference/engine/attention.py": ("inference/engine/test_decoder.py", "of its two passes"),
    "inference/engine/cache.py": ("inference/engine/test_decoder.py", "what its passes write"),
    "inference/families.py": ("inference/test_load.py", "what `load` chooses from"),
    "inference/handle.py": ("inference/test_load.py", "what both families answer to"),
    "inference/settings.py": ("inference/test_generate.py", "settings of an answer"),
    "launch/options.py": ("launch/test_slurm.py", "options of a job, seen in its file"),
    "models/adapters/dropout.py": ("models/adapters/test_lora.py", "dropout of an adapter"),
    "models/adapters/layers.py": ("models/adapters/test_folder.py", "a folder's settings resolved"),
    "models/adapters/merging.py": ("models/adapters/test_folder.py", "against PEFT's own logits"),
    "models/adapters/names.py": ("models/adapters/test_folder.py", "names in a folder's file"),
    "models/attention/decoding_triton.py": (
        "models/attention/test_decoding.py",
        "kernels beside their twin, on a GPU",
    ),
    "models/kernels/float8_triton.py": (
        "models/kernels/test_float8_mlp.py",
        "the kernel beside its twin, on a GPU",
    ),
    "models/adapters/settings.py": ("models/adapters/test_folder.py", "a folder's settings read"),
    "models/attention/flash4.py": ("models/attention/test_packed.py", "one of the packed kernels"),
    "models/attention/per_document.py": ("models/attention/test_packed.py", "likewise"),
    "models/configs.py": ("export/test_export.py", "both forms, there and back"),
    "models/dual/qllama.py": ("models/dual/test_model.py", "against the original's states"),
    "models/modules.py": ("models/kernels/test_last_mlp.py", "how kernels replace layers"),
    "models/tensors.py": ("models/test_hub.py", "tensors of a folder's files"),
    "models/trainable.py": ("models/adapters/test_lora.py", "what trains beside adapters"),
    "models/units.py": ("parallel/test_shard.py", "what shards gather one by one"),
    "objectives/packed.py": ("objectives/test_sft.py", "rows of either objective"),
    "objectives/packed_loss.py": ("test_train.py", "what a step of training sums"),
    "objectives/passes.py": ("objectives/test_retrieval.py", "gradient caching in two passes"),
    "objectives/reference.py": ("objectives/test_mpo.py", "what rewards are relative to"),
    "objectives/run_start.py": ("objectives/test_mpo.py", "what a reference is made of"),
    "objectives/stateless.py": ("objectives/test_sft.py", "an objective that keeps nothing"),
    "parallel/lockstep.py": ("test_train_ranks.py", "evaluations of a model in shards"),
    "training/run/building.py": ("test_train.py", "every run is built"),
    "training/run/evaluating.py": ("training/test_early_stopping.py", "what an evaluation decides"),
    "training/run/reading.py": ("test_train_rows.py", "the samples of each step"),
    "training/run/reporting.py": ("cli/test_train.py", "what a run prints and logs"),
    "training/run/saving.py": ("training/test_checkpoint.py", "what is saved, and gone on from"),
    "training/run/state.py": ("test_train.py", "what a step changes"),
    "report/results/items.py": ("report/results/test_results.py", "rows of every evaluator"),
    "report/results/listing.py": (
        "report/results/test_compare.py",
        "a comparison as text and JSON",
    ),
    "report/results/statistics.py": ("report/results/test_compare.py", "what intervals are of"),
    "report/results/thumbnails.py": ("report/results/test_pages.py", "images of a page"),
    "search/approximation.py": ("search/test_ranking.py", "builds what is ranked by"),
    "search/encoder.py": ("search/test_searcher.py", "what is found by its features"),
    "training/saved_steps.py": ("training/test_checkpoint.py", "what `save` leaves there"),
    "plan/activations.py": ("plan/test_memory.py", "what a chat model saves, counted by autograd"),
    "plan/chat_activations.py": ("plan/test_memory.py", "likewise"),
}
"""Module -> the file that tests it, and why there."""

NO_MODULE = {
    "test_benchmarks.py": "benchmarks/",
    "test_cpu_seconds.py": "tests/cpu_seconds.py",
    "test_docs.py": "docs/",
    "test_docs_commands.py": "the command lines in docs/ and README.md",
    "test_docs_languages.py": "the guides of docs/ in each language",
    "test_docs_messages.py": "the page of docs/ that explains error messages",
    "test_docs_quick_start.py": "the lines of code in docs/ for those who know the original",
    "test_docs_runs.py": "the guides, line by line",
    "test_docs_site.py": "docs/build.py and the pages that it writes",
    "test_fuzz.py": "every reader of files",
    "test_house.py": "rules of the house",
    "test_integrations.py": "integrations/",
    "test_layers.py": "who may import whom",
    "test_mirror.py": "this table",
    "test_repository.py": "workflows, container file, citation, forms, the notebook",
    "test_startup.py": "what each verb imports",
    "test_wheel.py": "the built package",
}
"""Test file -> what it tests instead of a module."""

MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))


def own_file(module: str) -> str:
    """The test file that mirrors a module."""
    path = Path(module)
    return (path.parent / f"test_{path.name}").as_posix()


def door(room: str) -> str:
    """The test file of a room; a room inside one of ONE_DOOR goes through the outer one."""
    outer = next((o for o in ONE_DOOR if room.startswith(f"{o}/")), room)
    return f"{outer}/test_{Path(outer).name}.py"


def is_tested(module: str) -> bool:
    room = Path(module).parent.as_posix()
    elsewhere = ELSEWHERE[module][0] if module in ELSEWHERE else ""
    return not {own_file(module), elsewhere, door(room) if room in ONE_DOOR else ""}.isdisjoint(
        FILES
    )


def has_module(file: str) -> bool:
    """Whether a test file is named after a module beside it, its topic following, or its room."""
    room, name = Path(file).parent, Path(file).stem.removeprefix("test_")
    modules = [Path(module).stem for module in MODULES if Path(module).parent == room]
    return any(name == module or name.startswith(f"{module}_") for module in [*modules, room.name])


def test_every_module_has_a_file_of_tests() -> None:
    missing = [f"tests/{own_file(module)}" for module in MODULES if not is_tested(module)]
    assert missing == [], "make these, or say in test_mirror.py where their modules are tested"


def test_every_file_of_tests_has_a_module() -> None:
    strays = [file for file in FILES if not has_module(file) and file not in NO_MODULE]
    assert strays == [], "name these after the module that they test"


def test_no_exception_is_stale() -> None:
    rooms = {Path(module).parent.as_posix() for module in MODULES if own_file(module) not in FILES}
    assert set(ONE_DOOR) - rooms == set()
    assert set(NO_MODULE) - set(FILES) == set()
    assert [file for file in NO_MODULE if has_module(file)] == []
    assert [m for m in ELSEWHERE if m not in MODULES or own_file(m) in FILES] == []
