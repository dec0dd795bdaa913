"""Rows of a table, each measured in a process of its own, so that nothing of it stays."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(script: str, names: Sequence[str], options: Namespace) -> None:
    """`python SCRIPT --one NAME` for every row until `options.budget_s` is spent.

    Prints each row's JSON, the last line that its process prints, and keeps all of them in the
    file `options.to`, if there is one.
    """
    started, found = time.perf_counter(), []
    for name in names:
        left = options.budget_s - (time.perf_counter() - started)
        if left < 10:
            found.append({"row": name, "failed": "no time left"})
        else:
            found.append(_alone(script, name, options.tiny, left))
        print(json.dumps(found[-1]), flush=True)
        if options.to is not None:
            options.to.parent.mkdir(parents=True, exist_ok=True)
            options.to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _alone(script: str, name: str, tiny: bool, limit_s: float) -> dict[str, Any]:
    words = [sys.executable, "-W", "ignore", script, "--one", name]
    words += ["--tiny"] if tiny else []
    started = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"row": name, "failed": f"not done after {limit_s:.0f} s"}
    wall = {"wall_s": round(time.perf_counter() - started, 1)}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]) | wall
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return {"row": name, "failed": last[:400]} | wall


def keep(figures: dict[str, Any], file: Path | None) -> None:
    """Prints a row's JSON, and writes it to a file if there is one."""
    print(json.dumps(figures), flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def kernels(profiled: Any) -> tuple[list[Any], float]:
    """Kernels of a profile of a GPU, longest first, and the seconds of all."""
    from torch.autograd import DeviceType

    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    return events, sum(event.self_device_time_total for event in events) / 1e6


def print_kernels(events: Sequence[Any], busy_s: float) -> None:
    """Prints a line for each kernel: share of the busy time, milliseconds, calls, name."""
    for event in events:
        ms = event.self_device_time_total / 1e3
        print(f"{ms / busy_s / 1e3:6.1%} {ms:9.2f} ms {event.count:6d} {event.key[:110]}")


def rounded(values: Any) -> Any:
    """Floats with five digits, at any depth of dicts and lists."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}") if isinstance(values, float) else values


def commit() -> str:
    """The short hash of what is measured."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return os.environ.get("COMMIT") or done.stdout.strip() or "unknown"
