"""What an objective does around steps, for those that do nothing there."""

from typing import Any

from internvl.objectives.run_start import RunStart


class Stateless:
    """Base of objectives that prepare, remember and log nothing of their own."""

    def begin_run(self, start: RunStart) -> None:
        """See `Objective.begin_run`."""

    def end_step(self, means: dict[str, float], applied: bool) -> dict[str, float]:
        """See `Objective.end_step`."""
        return {}

    def state(self) -> dict[str, Any]:
        """See `Objective.state`."""
        return {}

    def restore(self, state: Any) -> None:
        """See `Objective.restore`."""
