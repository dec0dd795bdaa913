"""Metrics of a run: its line on the terminal, metrics.jsonl, TensorBoard, Weights & Biases."""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl import log
from internvl.errors import UserError, explain
from internvl.log import StepLog, TensorBoard, speed

LOG_FILE = "train.log"
"""The file of a run folder with the lines of its training, appended by a resumed run."""
_LATEST = 20  # steps whose mean speed a line shows: single ones differ by their samples


class Readout:
    """Text about a step for people: its loss and learning rate, and the speed of the latest."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST)
        """(samples, seconds) of a step."""

    def line(self, step_metrics: Mapping[str, float]) -> str:
        """Returns the text for the step that follows the one of the last call."""
        self._latest.append((step_metrics["samples"], step_metrics["step_s"]))
        samples, seconds = (sum(values) for values in zip(*self._latest, strict=True))
        # A step that was passed over has none.
        loss = step_metrics.get("loss")
        words = [
            "no good sample" if loss is None else f"loss {loss:.4f}",
            f"lr {step_metrics['lr']:.2e}",
            speed(samples / seconds, "samples"),
            speed(len(self._latest) / seconds, "steps"),
        ]
        return ", ".join(words + (["update skipped"] if step_metrics.get("skipped") else []))


class WandB:
    """Logs scalars to Weights & Biases; with WANDB_MODE=offline they stay in the folder."""

    def __init__(self, folder: Path, project: str) -> None:
        """
        Args:
            folder: run folder; the run id is a hash of its path, so that a resumed run continues.

        Raises:
            UserError: wandb is not installed, or refuses to start (not logged in, say).
        """
        try:
            # Here and not above: it is an extra, which other runs do not need.
            import wandb
        except ImportError:
            raise UserError(
                f"wandb={project} needs Weights & Biases: pip install 'internvl[wandb]'"
            ) from None
        run_id = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
        try:
            self._run = wandb.init(
                project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder)
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases: {str(error).splitlines()[0]}; run `wandb login`, or set "
                "WANDB_MODE=offline to keep the metrics here"
            ) from None
        # Our own axis: a resumed run writes steps again, which its counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of one step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Sends buffered numbers and ends the run there."""
        self._run.finish()


class Metrics:
    """Writes the metrics of a run to metrics.jsonl and the boards; only rank 0 has these."""

    def __init__(self, boards: Sequence[TensorBoard | WandB], rows: StepLog | None = None) -> None:
        self.boards = boards
        self.rows = rows
        self._pending: deque[dict[str, float]] = deque()
        self._troubled: set[str] = set()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes a training step to the file and to the boards; what a full disk refuses waits."""
        if self.rows is not None:
            self._pending.append({"step": step, **numbers})
            try:
                self._write_pending(self.rows)
            except OSError as error:
                self._warn(error, "its lines wait in memory for space")
        self.show(step, numbers)

    def _write_pending(self, rows: StepLog) -> None:
        while self._pending:
            rows.append(self._pending[0])
            self._pending.popleft()
            self._troubled.clear()

    def _warn(self, error: OSError, remedy: str) -> None:
        # Once, not at every step; again when it has worked in between.
        sentence = explain(error)
        if sentence not in self._troubled:
            self._troubled.add(sentence)
            log.get_logger().warning("%s. The run goes on; %s", sentence, remedy)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers to the boards alone, such as an evaluation's, which has its own file."""
        for board in self.boards:
            try:
                board.scalars(step, numbers)
            except OSError as error:
                self._warn(error, "metrics.jsonl has these numbers too")

    def close(self) -> None:
        """Flushes the file and the boards.

        Raises:
            OSError: it could not be written (disk full, …); the error names the file.
        """
        if self.rows is not None:
            self._write_pending(self.rows)
        for board in self.boards:
            try:
                board.close()
            except OSError as error:
                self._warn(error, "metrics.jsonl has these numbers too")


def open_metrics(folder: Path, step: int, project: str | None) -> Metrics:
    """Opens the metrics of the run in `folder`, cut back to `step`.

    Args:
        project: of Weights & Biases, or None to do without.
    """
    rows = StepLog(folder, "metrics.jsonl")
    # Steps after the checkpoint that a run resumes from are taken, and written, again.
    rows.truncate_after(step)
    boards: list[TensorBoard | WandB] = [TensorBoard(folder / "tensorboard", purge_step=step + 1)]
    if project is not None:
        boards.append(WandB(folder, project))
    return Metrics(boards, rows)
