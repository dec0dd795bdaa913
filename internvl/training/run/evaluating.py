"""Evaluations during training, and the ends that they may call for."""

from internvl import dist, evals, log
from internvl.compute import compilation
from internvl.config import EvalConfig
from internvl.errors import RunError, UserError
from internvl.parallel import shard
from internvl.training import early_stopping, signals, tracking, watchdog
from internvl.training.run import saving
from internvl.training.run.state import TrainState


def validate_or_stop(state: TrainState, metrics: tracking.Metrics) -> str | None:
    """As `validate`, but if a signal ends an evaluation, saves this step and raises Interrupted."""
    try:
        return validate(state, metrics)
    except UserError as error:
        # By its text: of the ranks that raise, only those that were asked raise Interrupted.
        if str(error) != signals.IN_EVALUATION:
            raise
    if state.step:
        saving.tolerate(state, state.saver.wait)
        saving.save(state)
        state.saver.wait()
    raise saving.interrupted(state)


def validate(state: TrainState, metrics: tracking.Metrics) -> str | None:
    """Runs the due evaluations and keeps the best step; returns why the run should end, or None.

    Raises:
        RunError: an evaluation got worse than its guard allows; a checkpoint was written.
    """
    measured = evaluate(state)
    if dist.is_main():
        metrics.show(state.step, measured)
    # By rank 0, which wrote the files: all must stop at the same step, or the next step would hang.
    verdict = dist.on_main(lambda: _verdict(state))
    if verdict.best:
        saving.tolerate(state, lambda: saving.keep_best(state))
    for sentence in verdict.warnings:
        log.get_logger().warning("%s", sentence)
    if verdict.forgotten:
        saving.save(state)
        state.saver.wait()
        raise RunError(
            f"{'; '.join(verdict.forgotten)}. The checkpoint of this step is kept; train on such "
            "data too, lower optim.lr, or raise max_worsening and start the same command again"
        )
    return verdict.stop


def _verdict(state: TrainState) -> early_stopping.Verdict:
    history = early_stopping.history(state.folder / "evals", state.step)
    return early_stopping.judge(state.recipe, history, state.step)


def evaluate(state: TrainState) -> dict[str, float]:
    """Runs the evaluations that are due at this step; returns "evaluation/metric" -> value.

    All ranks compute; rank 0 writes evals/STEP.json and the answers.
    """
    due = {
        name: state.evaluators[name]
        for name, config in state.recipe.evals.items()
        if _is_due(state, config)
    }
    # A resumed run reaches this step again; evaluations in its file are not repeated.
    for name in evals.measured(state.folder / "evals", state.step):
        due.pop(name, None)
    if not due:
        return {}
    state.model.eval()
    watchdog.beat("evaluates")
    computing = compilation.evaluating(state.device, state.recipe.dtype)
    with computing, shard.evaluating(state.model, state.recipe.parallel):
        return evals.run_all(due, state.chat, state.folder / "evals", state.step)


def is_due(state: TrainState) -> bool:
    """Returns True if an evaluation of the recipe is due at this step."""
    return any(_is_due(state, config) for config in state.recipe.evals.values())


def _is_due(state: TrainState, config: EvalConfig) -> bool:
    # A guard needs the value before the first step, which later ones are compared with.
    if state.step == 0:
        return config.before or config.guard is not None
    return state.step == state.num_steps or state.is_due(config.every)
