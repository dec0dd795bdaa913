"""A model, adapter or run folder, measured: `evaluate.run(...)`."""

from collections.abc import Sequence
from pathlib import Path

from internvl import evals, handles
from internvl.config import EvalConfig, UserError, load_recipe
from internvl.handles import Chat


def run(
    model_or_run: str | Path, tasks: Sequence[str] = (), *, to: Path | None = None
) -> dict[str, float]:
    """Runs evaluations of a run's recipe (all, or those named in `tasks`) on its newest checkpoint.

    Returns metrics named "evaluation/metric"; they and the answers are also written to `to`, by
    default the run's evals folder.

    Raises:
        UserError: no run folder, or a task its recipe does not have.
    """
    folder = Path(model_or_run)
    if not handles.is_run(folder):
        raise UserError(
            f"{folder} is no run folder; to evaluate another model, give annotations and prompt: "
            "internvl evaluate MODEL caption-file --annotations FILE --images DIR --prompt TEXT"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    unknown = [task for task in tasks if task not in recipe.evals]
    if unknown:
        known = ", ".join(recipe.evals) or "none"
        raise UserError(f"the recipe of {folder} has no evaluation {unknown[0]!r}; known: {known}")
    chosen = {name: recipe.evals[name] for name in tasks or recipe.evals}
    return measure(handles.load(folder), chosen, to or folder / "evals" / "evaluate")


def measure(chat: Chat, configs: dict[str, EvalConfig], to: Path) -> dict[str, float]:
    """Runs evaluations on a loaded model; writes `to`/result.json and the answers beside it."""
    return evals.run_all(configs, chat.model, chat.encoder, chat.tiles, to)


def render(metrics: dict[str, float]) -> str:
    """A table of metrics, one line each."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:{width}}  {value:8.4f}" for name, value in metrics.items())
