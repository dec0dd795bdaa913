"""Damaged files for every reader: each is read, or one sentence names file, place and remedy.

    python tests/fuzz.py                    every reader, 200 inputs each
    python tests/fuzz.py READER             one of them
    python tests/fuzz.py READER SEED        one input again, kept in a folder, with the traceback

An input is made of its reader's name and a number alone (and of the shared test data, where those
are): one or two files of a small good input are damaged, or another damaged file takes their place.
"""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from data_files import SHARED
from fuzz_readers import READERS, Reader, remove_seeds, seed_copy, user_facing
from mutations import mutate_file

from internvl.data import images

MOST_CPU_S = 20.0
"""A reader that takes longer for one small input hangs."""
MOST_MEMORY = 32 << 30
"""Of addresses: what a damaged header asks for must not take the machine down."""
LONGEST = 3_000
"""Characters of a sentence that a person still reads; a recipe's has a line for each problem."""
_INTERNALS = re.compile(
    r"Traceback|pydantic|<class '|object at 0x|ValidationError|\bRust\b|panicked|input_value="
    r"|'\w+' object|\[type=|_core\.|\w+Invalid\b|SafetensorError|UnpicklingError|Caught \w+ in"
)
_REMEDY = re.compile(
    r"\b(add|another|ask|available|check|choose|convert|column \d+|copy|delete|did you mean|"
    r"download|empty|expected|export|fetch|flatter|folder|give|install|it has|keep|known|"
    r"lower|make|missing|must|name|names|need|needs|put|quote|raise|remove|replace|save|"
    r"set|shrink|should|start|supported|take|there is no|there already|train|turn|"
    r"unknown key|unpack|use|write)\b|run `"
)
"""Words of a remedy; where something is not there, or a line and column are named, it is plain."""


class TooSlow(BaseException):
    """The bound on CPU time; not an Exception, so that no reader can swallow it."""


@dataclass(frozen=True)
class Failure:
    """An input that was neither read nor refused with a sentence."""

    reader: str
    seed: int | None
    reason: str
    """In one line; the same for inputs that fail alike."""
    detail: str
    kept: Path | None = None
    """The input."""

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" {self.seed}"
        kept = "" if self.kept is None else f"\n  input: {self.kept}"
        again = f"python tests/fuzz.py {self.reader}{seed}"
        return f"{again}\n  {self.reason}{kept}\n  {self.detail}"


@contextmanager
def cpu_bound(seconds: float) -> Iterator[None]:
    """Raises TooSlow after so many seconds of CPU time; another job on the core costs nothing."""

    def stop(number: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def sentence_problem(error: BaseException, folder: Path) -> str | None:
    """What is wrong with an exception as something that a user reads, or None."""
    if not user_facing(error):
        return f"{type(error).__name__} is no user's"
    text = str(error)
    if not text.strip():
        return "an empty sentence"
    if len(text) > LONGEST:
        return "a very long sentence"
    internal = _INTERNALS.search(text)
    if internal:
        return f"library internals ({internal.group()})"
    names = {file.name for file in folder.rglob("*") if file.is_file()}
    if str(folder) not in text and not any(name in text for name in names):
        return "names no file"
    if not _REMEDY.search(text):
        return "says no remedy"
    return None


@contextmanager
def small_images() -> Iterator[None]:
    """Images of more than 4 million pixels are refused as those of 200 million are in use: headers
    that promise millions took more time than all other inputs together."""
    before = images.MAX_PIXELS
    images.MAX_PIXELS = 1 << 22
    try:
        yield
    finally:
        images.MAX_PIXELS = before


def read_case(reader: Reader, folder: Path) -> tuple[str, str] | None:
    """Reads a folder; (reason, detail) where the outcome is none that a user should get."""
    try:
        with cpu_bound(MOST_CPU_S), small_images():
            problems = list(reader.read(folder))
    except TooSlow:
        return f"hangs at {_place(sys.exc_info()[1])}", traceback.format_exc()
    except BaseException as error:  # some of torch's are no Exception
        problems = [error]
        where = f" at {_place(error)}"
    else:
        where = ""
    for problem in problems:
        wrong = sentence_problem(problem, folder)
        if wrong is not None:
            return f"{wrong}{where}", "".join(traceback.format_exception_only(problem)).strip()
    return None


def _place(error: BaseException | None) -> str:
    """The innermost line of the package that an exception came through."""
    frames = traceback.extract_tb(None if error is None else error.__traceback__)
    ours = [
        f for f in frames if f"{os.sep}internvl{os.sep}" in f.filename and ".venv" not in f.filename
    ]
    if not ours:
        return "the test"
    last = ours[-1]
    return f"{last.filename.rpartition(f'{os.sep}internvl{os.sep}')[2]}:{last.lineno} {last.name}"


@cache
def extra_files(patterns: tuple[str, ...]) -> tuple[Path, ...]:
    """The shared test data that a reader may be given instead."""
    return tuple(file for glob in patterns for file in sorted(SHARED.glob(glob)) if file.is_file())


def make_case(reader: Reader, seed: int, folder: Path) -> list[Path]:
    """Writes input `seed` of a reader; returns its damaged files, the others are links."""
    rng = random.Random(f"{reader.name} {seed}")
    good = seed_copy(reader.name)
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    chosen = [
        p for p in files if fnmatch(p.name, reader.damaged) or fnmatch(str(p), reader.damaged)
    ]
    victims = {rng.choice(chosen) for _ in range(rng.choice((1, 1, 1, 1, 2)))}
    for empty in (p.relative_to(good) for p in good.rglob("*") if p.is_dir()):
        (folder / empty).mkdir(parents=True, exist_ok=True)
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in victims:
            shutil.copyfile(good / file, target)
        else:
            target.symlink_to(good / file)
    damaged = []
    for file in sorted(victims):
        damaged.append(_damage(reader, folder / file, rng))
    return damaged


def _damage(reader: Reader, file: Path, rng: random.Random) -> Path:
    """Damages a file in place; returns it."""
    way = rng.random()
    others = extra_files(reader.extra)
    if others and way < 0.3:
        other = rng.choice(others)
        file.write_bytes(other.read_bytes())
        if way < 0.12:
            return file
    elif way > 0.97:
        file.unlink()
        if way > 0.985:
            file.mkdir()
        return file
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            mutate_file(file, rng)
        except RecursionError:  # what was done before has made it as deep
            break
    return file


def check_seed(reader: Reader) -> Failure | None:
    """The undamaged input must be read without a problem, or the rest shows nothing."""
    folder = seed_copy(reader.name)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        shutil.copytree(folder, work / "good")
        reason = "the undamaged input is refused"
        try:
            problems = list(reader.read(work / "good"))
        except Exception as error:
            return Failure(
                reader.name, None, f"{reason} at {_place(error)}", traceback.format_exc()
            )
        return Failure(reader.name, None, reason, str(problems[0])) if problems else None
    finally:
        shutil.rmtree(work)


def check(reader: Reader, seeds: Sequence[int], keep: Path | None = None) -> list[Failure]:
    """Failures of some inputs of a reader, the undamaged one first; they are kept in `keep`.

    They are read in a child process, a new one where a damaged file has killed it.
    """
    wrong = check_seed(reader)
    if wrong is not None:
        return [wrong]
    failures, left = [], list(seeds)
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{reader.name}-") as work:
        while left:
            log, status = Path(work) / "log.jsonl", _in_child(reader, left, Path(work))
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            failures += [(row["seed"], *row["found"]) for row in rows if row.get("found")]
            begun = [row["seed"] for row in rows if "found" not in row]
            if status:
                reason = f"the process is killed by {signal.Signals(os.WTERMSIG(status)).name}"
                failures.append((begun[-1], reason, "no exception: what it was called has crashed"))
            left = left[len(begun) :]
    return [Failure(reader.name, f[0], f[1], f[2], _keep(reader, f[0], keep)) for f in failures]


def _in_child(reader: Reader, seeds: Sequence[int], work: Path) -> int:
    """Reads inputs in a fork, which logs what it begins and finds; how the fork ended."""
    gc.collect()
    child = os.fork()
    if not child:
        # A decoder that the parent left as garbage waits for its threads, which are not here.
        gc.freeze()
        try:
            _read_all(reader, seeds, work)
        except BaseException:
            traceback.print_exc()
            os.kill(os.getpid(), signal.SIGABRT)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def _read_all(reader: Reader, seeds: Sequence[int], work: Path) -> None:
    # The caches of readers are by content, so that a later run would skip what it knows.
    os.environ["XDG_CACHE_HOME"] = f"{work}/cache"
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    folder = work / "case"
    with (work / "log.jsonl").open("w") as log:
        for seed in seeds:
            log.write(json.dumps({"seed": seed}) + "\n")
            log.flush()
            # A loop outside Python does not hear the timer of `cpu_bound`; this ends it.
            used = resource.getrusage(resource.RUSAGE_SELF)
            last = int(used.ru_utime + used.ru_stime + 2 * MOST_CPU_S) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (last, resource.RLIM_INFINITY))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make_case(reader, seed, folder)
            found = read_case(reader, folder)
            if found is not None:
                log.write(json.dumps({"seed": seed, "found": found}) + "\n")


def _keep(reader: Reader, seed: int, keep: Path | None) -> Path | None:
    """The input once more (a reader may have written into it), where it stays."""
    if keep is None:
        return None
    target = keep / f"{reader.name}-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    make_case(reader, seed, target)
    return target


def replay(name: str, seed: int) -> int:
    """One input again, kept, with the whole traceback."""
    folder = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in make_case(READERS[name], seed, folder):
        print("damaged:", file)
    found = read_case(READERS[name], folder)
    print("fine" if found is None else found[0])
    try:
        for problem in READERS[name].read(folder):
            print("listed:", problem)
    except Exception:
        traceback.print_exc()
    return int(found is not None)


def _cpu_s() -> float:
    return sum(os.times()[:4])


def main(words: Sequence[str]) -> int:
    """See the module's text."""
    if len(words) == 2 and words[1].isdigit():
        return replay(words[0], int(words[1]))
    many = int(os.environ.get("FUZZ_INPUTS", "200"))
    failures = []
    for reader in [READERS[words[0]]] if words else READERS.values():
        start, number = _cpu_s(), max(1, many // reader.cost)
        found = check(reader, range(number), Path(tempfile.gettempdir()) / "fuzz")
        each = (_cpu_s() - start) / number * 1000
        print(f"{reader.name}: {len(found)} of {number}, {each:.1f} ms each", flush=True)
        failures += {one.reason: one for one in reversed(found)}.values()
        for one in {one.reason: one for one in reversed(found)}.values():
            print(one, flush=True)
    remove_seeds()
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
