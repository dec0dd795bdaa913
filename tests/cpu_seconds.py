"""CPU seconds of every test file, held against those in durations.json.

CPU seconds instead of wall time, because a busy machine stretches the latter. A slow machine
stretches both, so a run is its own measure: the median ratio of its files to the committed seconds
says how slow this machine is, and only a file well above that median is named. It is named and no
more: a run fails for wrong results alone.
"""

import json
import resource
import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

Seconds = dict[str, dict[str, float]]
"""Tier, file below tests/: CPU seconds."""

DURATIONS = Path(__file__).with_name("durations.json")
# Two runs on one machine differ by a fifth in the larger files.
TOLERANCE = 1.5
# The first test of a process to need torch's compiler or transformers imports it for all others.
ALLOWANCE_S = 5.0
# A new file's, until its own are committed.
DEFAULT_S = 5.0
# With fewer files, a slow machine and a slow file look the same.
FEWEST_FILES = 10


_charged = 0.0


def charge(seconds: float) -> None:
    """Adds what a process took that is no child of this one."""
    global _charged
    _charged += seconds


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process, its children that ended, and what was charged."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return _charged + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tier_of(item: pytest.Item) -> str:
    """Returns the tier of a test, the first level of durations.json."""
    if item.get_closest_marker("scripts"):
        return "scripts"
    if item.get_closest_marker("slow") or item.get_closest_marker("slow_fuzz"):
        return "slow"
    return "fast"


def excesses(measured: Seconds, committed: Seconds) -> list[str]:
    """Returns a line for each file that took more than its budget."""
    ratios = [
        seconds / committed[tier][path]
        for tier, files in measured.items()
        for path, seconds in files.items()
        if committed.get(tier, {}).get(path, 0) >= 1  # below, noise rules
    ]
    if len(ratios) < FEWEST_FILES:
        return []
    slowness = statistics.median(ratios)
    lines = []
    for tier, files in measured.items():
        for path, seconds in sorted(files.items()):
            usual = committed.get(tier, {}).get(path, DEFAULT_S)
            budget = slowness * (TOLERANCE * usual + ALLOWANCE_S)
            if seconds > budget:
                lines.append(f"{path} ({tier}): {seconds:.0f} s, budget {budget:.0f} s")
    return lines


class CpuSeconds:
    """A plugin that charges each test's CPU seconds to its file; the first process adds them up.

    Session fixtures are charged to no file: the file that comes first changes from run to run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.measured: dict[str, dict[str, float]] = {}
        self.shared = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        start = cpu_seconds()
        result = yield
        if fixturedef.scope == "session":
            self.shared += cpu_seconds() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        start, shared = cpu_seconds(), self.shared
        result = yield
        seconds = cpu_seconds() - start - (self.shared - shared)
        path = item.path.relative_to(DURATIONS.parent).as_posix()
        self.add({tier_of(item): {path: seconds}})
        return result

    def add(self, measured: Seconds) -> None:
        """Adds seconds to those of the same files."""
        for tier, files in measured.items():
            totals = self.measured.setdefault(tier, {})
            for path, seconds in files.items():
                totals[path] = totals.get(path, 0.0) + seconds

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):  # a process of pytest-xdist
            self.config.workeroutput["cpu_seconds"] = self.measured

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.add(getattr(node, "workeroutput", {}).get("cpu_seconds", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        committed = json.loads(DURATIONS.read_text(encoding="utf-8"))
        for tier, files in sorted(self.measured.items()):
            usual = sum(committed.get(tier, {}).get(path, 0.0) for path in files)
            terminalreporter.write_line(
                f"{tier} tier: {sum(files.values()):.0f} CPU seconds in {len(files)} files; "
                f"tests/durations.json has {usual:.0f} for them"
            )
        for line in excesses(self.measured, committed):
            terminalreporter.write_line(f"over its budget of CPU seconds: {line}", red=True)
        if self.config.getoption("write_durations"):
            write(self.measured, committed)


def write(measured: Seconds, committed: Seconds) -> None:
    """Replaces the seconds of the files that ran, and drops files that are gone."""
    for tier, files in measured.items():
        committed.setdefault(tier, {}).update(files)
    current = {
        tier: {
            path: round(files[path], 1)
            for path in sorted(files)
            if (DURATIONS.parent / path).exists()
        }
        for tier, files in sorted(committed.items())
    }
    DURATIONS.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
