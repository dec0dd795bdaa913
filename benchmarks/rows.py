"""Rows of a table, each measured in a process of its own, so that nothing of it stays."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock, Thread
from typing import IO, Any


def run(
    script: str,
    names: Sequence[str],
    options: Namespace,
    *,
    limit_s: float = math.inf,
    gpus: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """`python SCRIPT --one NAME` for every row until `options.budget_s` is spent.

    Prints each row's JSON, the last line that its process prints, and keeps all of them in the
    file `options.to`, if there is one.

    Args:
        limit_s: of a row; then it keeps what it has printed.
        gpus: indices of the GPUs that take rows side by side; by default one row has them all.
    """
    finished: list[dict[str, Any]] = []
    ends, lock = time.perf_counter() + options.budget_s, Lock()
    waiting = deque(names)

    def work(gpu: str | None) -> None:
        while waiting:
            name, left = waiting.popleft(), ends - time.perf_counter()
            if left < 10:
                figures = {"row": name, "failed": "no time left"}
            else:
                figures = _alone(script, name, options.tiny, min(left, limit_s), gpu)
            with lock:
                finished.append(figures)
                _write(finished, options.to)

    if len(gpus) < 2:
        work(gpus[0] if gpus else None)
        return finished
    threads = [Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return finished


def _write(finished: Sequence[dict[str, Any]], to: Path | None) -> None:
    print(json.dumps(finished[-1]), flush=True)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(finished, indent=1) + "\n", encoding="utf-8")


def _alone(script: str, name: str, tiny: bool, limit_s: float, gpu: str | None) -> dict[str, Any]:
    words = [sys.executable, "-W", "ignore", script, "--one", name]
    words += ["--tiny"] if tiny else []
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    started = time.perf_counter()
    with TemporaryFile() as output, TemporaryFile() as errors:
        # A session of its own, so that the compiler's processes end with it.
        process = subprocess.Popen(
            words, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        try:
            failed = "" if process.wait(limit_s) == 0 else "no message"
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines, text = _lines(output), "\n".join(_lines(errors))
    figures = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"row": name}
    if failed:
        print(text[-4000:], file=sys.stderr, flush=True)
        last = (text.strip().splitlines() or [""])[-1]
        if failed == "no message":
            figures["failed"] = (last or failed)[:400]
        else:
            figures["failed"] = failed + (f"; its last line: {last[:300]}" if last else "")
    return figures | {"wall_s": round(time.perf_counter() - started, 1)}


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").splitlines()


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
