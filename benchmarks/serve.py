"""Rate and latency of `internvl serve`, beside `chat.answer` on the same requests.

    python benchmarks/serve.py --peer               # the three rows, on a GPU; up to 9 minutes
    python benchmarks/serve.py --peer --tiny        # the same path on a CPU, in two minutes
    python benchmarks/serve.py --url http://localhost:8000/v1 --model NAME  # any other server

Every request shows one photo of seven tiles and asks for 30 tokens; weights are random
(InternVL2-2B's shape), and each token that they may choose is a word, so that all answers have 30.
A client sends its next request when its last one is answered, streams it, and notes when the first
word came. Rows, one after the other on the GPU, each in its own process:

    answer        `chat.answer` with as many slots as there are clients, on 1,000 requests
    serve         `internvl serve`, 2,000 requests of 64 clients
    transformers  with --peer: `transformers serve`, as many requests as it answers in half a minute

Each row is written to `--to` as soon as it is there; one that fails, takes too long, or has answers
of fewer tokens says so (`failed`), and the others go on; what came too late prints its stacks.
`--export DIR` writes the model that is measured, for another server.
"""

import argparse
import asyncio
import base64
import contextlib
import faulthandler
import http.client
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workloads
from rows import commit

MODEL, NEW, SIDE = "InternVL2-2B", 30, (1350, 900)
QUESTION = "w1 " * 40
COUNT, CLIENTS = 2000, 64


def photo(index: int) -> bytes:
    """One of sixteen photos as a JPEG file."""
    file = io.BytesIO()
    workloads.picture(SIDE, index % 16).save(file, "JPEG", quality=90)
    return file.getvalue()


def model_of(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    device = torch.device("cpu" if options.tiny else "cuda")
    chat = workloads.random_chat(MODEL, device, rank=None, tiny=options.tiny)
    chat.model.eval().requires_grad_(False)
    # A word for every token: most others would have no text, and a client could not see them.
    head = chat.model.get_output_embeddings().weight
    special = chat.tokenizer.all_special_ids
    tokenizer = workloads._tokenizer(len(head), len(head) - len(special))
    # The others, which may end an answer, never come: of so many random logits one is above zero.
    head[special] = 0
    return replace(chat, tokenizer=tokenizer)


def answer(options: argparse.Namespace, to_parent: Any) -> None:
    """Sends seconds and tokens of `chat.answer`'s texts, after a warm-up of the same shapes."""
    from internvl.inference.engine import one_engine
    from internvl.inference.requests import Request

    faulthandler.register(signal.SIGUSR1)
    chat = model_of(options)
    count = options.count // 2
    requests = [Request(f"<image>\n{QUESTION}", [photo(n)]) for n in range(count)]
    # Compiled as for the server, however few requests there are.
    with one_engine(chat.model, COUNT):
        chat.answer(requests[: 2 * options.clients], **settings_of(options))
        to_parent.send("warm")
        to_parent.recv()
        started = time.perf_counter()
        texts = chat.answer(requests, **settings_of(options))
        to_parent.send((time.perf_counter() - started, [len(text.split()) for text in texts]))


def settings_of(options: argparse.Namespace) -> dict[str, int]:
    return {"max_new_tokens": NEW, "batch_size": options.clients}


def serve(options: argparse.Namespace, port_file: Path, apart: bool) -> None:
    """Runs the server until it is told to stop."""
    from internvl import log
    from internvl.serve import Limits, Options, server
    from internvl.serve.apart import Apart

    faulthandler.register(signal.SIGUSR1)
    log.setup(30)
    limits = Limits(max_length=options.length, max_waiting=2 * options.clients)
    chosen = Options(port=0, port_file=port_file, name=MODEL, limits=limits, slots=options.clients)
    load: Any = partial(_engine, options, chosen)
    server.serve("chat", [partial(Apart, load) if apart else load], chosen, [])


def _engine(options: argparse.Namespace, chosen: Any) -> Any:
    from internvl.serve.chat_engine import ChatEngine

    return ChatEngine(model_of(options), chosen)


def body(index: int, name: str) -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(photo(index)).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return json.dumps(
        {
            "model": name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": NEW,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


@dataclass(frozen=True)
class Answer:
    """What a client saw of an answer."""

    first_s: float | None
    """Seconds to the first text; None if none came."""
    total_s: float
    pieces: int
    tokens: int | None
    """As the server counts them; None if it does not say."""


async def one(address: tuple[str, int], path: str, data: bytes) -> Answer:
    started = time.perf_counter()
    first, pieces, tokens = None, 0, None
    reader, writer = await asyncio.open_connection(*address)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode())
    async for event in events(reader):
        if "error" in event:
            raise RuntimeError(json.dumps(event))
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        # The first has a role and no text, and one with the usage may have no choice.
        if any(choice["delta"].get("content") for choice in event.get("choices", [])):
            first = first or time.perf_counter() - started
            pieces += 1
    writer.close()
    return Answer(first, time.perf_counter() - started, pieces, tokens)


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events of a response, whose body may come in chunks."""
    is_chunked, rest = False, b""
    while (line := await reader.readline()).strip():
        is_chunked |= line.lower().split() == [b"transfer-encoding:", b"chunked"]
    while True:
        if is_chunked:
            size = int(await reader.readline() or b"0", 16)
            # Each is followed by an empty line.
            data = (await reader.readexactly(size + 2))[:-2] if size else b""
        else:
            data = await reader.read(2**16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def shortfall(tokens: Sequence[int | None]) -> dict[str, str]:
    """What a row says of answers that have fewer tokens than asked; nothing if none has."""
    short = sum(count is not None and count < NEW for count in tokens)
    if not short:
        return {}
    return {"failed": f"{short} of {len(tokens)} answers have fewer than {NEW} tokens"}


async def clients(
    address: tuple[str, int],
    path: str,
    bodies: list[bytes],
    count: int,
    number: int,
    done: Any = None,
    limit_s: float = 600.0,
) -> list[Answer]:
    """Answers of `count` requests of so many clients, or of those that `limit_s` is enough for."""
    left = iter(range(count))
    answers: list[Answer] = []

    async def client() -> None:
        for index in left:
            answers.append(await one(address, path, bodies[index % len(bodies)]))
            if done is not None:
                done(len(answers))

    tasks = [asyncio.ensure_future(client()) for _ in range(number)]
    finished, pending = await asyncio.wait(
        tasks, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION
    )
    for task in pending:
        task.cancel()
    for task in finished:
        task.result()
    return answers


def memory_of(pid: int) -> float:
    """GiB that a process and those that it began hold, shared pages counted once."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            # After the name, which may have spaces: state, then the parent.
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    family, size = {pid}, 0.0
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        with contextlib.suppress(OSError):
            size += _held(Path(f"/proc/{member}"))
    return round(size / 2**30, 3)


def _held(folder: Path) -> float:
    try:
        return 1024 * int(folder.joinpath("smaps_rollup").read_text().split("Pss:")[1].split()[0])
    except (FileNotFoundError, IndexError):  # not every kernel has it
        return int(folder.joinpath("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_memory() -> float | None:
    """GiB of the first GPU in use, whoever uses them."""
    # nvidia-smi counts all GPUs of the machine, torch those that this process may see.
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used"]
    words += ["--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
        return round(float(done.stdout.split()[0]) / 1024, 3)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def measured(
    address: tuple[str, int],
    path: str,
    name: str,
    options: argparse.Namespace,
    pid: int | None = None,
    limit_s: float = 600.0,
) -> dict[str, Any]:
    bodies = [body(n, name) for n in range(16)]
    memory: dict[int, list[float | None]] = {}
    began = [0.0]
    looks: list[threading.Thread] = []

    def look(count: int) -> None:
        memory[count] = [memory_of(pid or 0), gpu_memory()]

    def done(count: int) -> None:
        began.append(time.perf_counter())
        if pid is not None and count % max(1, options.count // 8) == 0:
            # Beside the clients, who would wait for it.
            looks.append(threading.Thread(target=look, args=[count]))
            looks[-1].start()

    ends = time.perf_counter() + limit_s
    # What is built at first use, for rows of every length.
    warm = 3 * options.clients if pid is not None else 2
    asyncio.run(clients(address, path, bodies, warm, min(warm, options.clients), None, limit_s))
    began[0] = time.perf_counter()
    left_s = max(1.0, ends - began[0])
    answers = asyncio.run(
        clients(address, path, bodies, options.count, options.clients, done, left_s)
    )
    for thread in looks:
        thread.join()
    if not answers:
        raise RuntimeError(f"no answer in {limit_s:.0f} s")
    # Until the last answer: some may have been begun when the time was up.
    seconds = began[-1] - began[0]
    first = sorted(answer.first_s for answer in answers if answer.first_s is not None)
    tokens = [answer.tokens for answer in answers]
    told = [count for count in tokens if count is not None]
    figures = {
        "requests": len(answers),
        "clients": options.clients,
        "requests_per_s": round(len(answers) / seconds, 2),
        "first_token_p50_ms": round(1e3 * statistics.median(first)) if first else None,
        "first_token_p95_ms": round(1e3 * first[int(0.95 * len(first))]) if first else None,
        "total_p50_ms": round(1e3 * statistics.median(answer.total_s for answer in answers)),
        "pieces": round(statistics.mean(answer.pieces for answer in answers), 1),
        "tokens": round(statistics.mean(told), 1) if told else "the server does not say",
        "host_and_gpu_gib_after": memory,
    }
    if len(first) < len(answers):
        figures["failed"] = f"{len(answers) - len(first)} of {len(answers)} answers had no text"
    return figures | shortfall(tokens)


def wait_until_healthy(address: tuple[str, int], is_alive: Any, until_s: float) -> None:
    while is_alive():
        connection = http.client.HTTPConnection(*address, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.perf_counter() > until_s:
            raise RuntimeError("the server was not ready in time")
        time.sleep(0.2)
    raise RuntimeError("the server has ended")


class Peer:
    """`transformers serve` on the exported model, which its process writes first."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.address = folder / MODEL, ("127.0.0.1", port)
        self.log = folder / "transformers.log"
        device = "cpu" if options.tiny else "cuda"
        write = [sys.executable, "-W", "ignore", __file__, "--export", str(self.folder)]
        write += ["--tiny"] if options.tiny else []
        # What its command calls; the command itself needs packages of its other subcommands.
        code = f"import subprocess, sys; subprocess.run({write}, check=True); "
        code += "from transformers.cli.serve import Serve; Serve(sys.argv[1], "
        code += f"host='127.0.0.1', port={port}, dtype='bfloat16', device='{device}')"
        words = [sys.executable, "-W", "ignore", "-c", code, str(self.folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, text=True)

    def wait(self, until_s: float) -> None:
        wait_until_healthy(self.address, lambda: self.process.poll() is None, until_s)

    def settle(self) -> None:
        """Waits until it is ready or has failed: loading beside would cost a row its time."""
        with contextlib.suppress(RuntimeError):
            self.wait(time.perf_counter() + 30)

    def measure(self, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
        self.wait(time.perf_counter() + 20)
        path = "/v1/chat/completions"
        return measured(self.address, path, str(self.folder), options, None, limit_s)

    def close(self) -> str:
        """Ends it; returns the end of its log."""
        self.process.kill()
        self.process.wait()
        return self.log.read_text()[-600:]


class Rows:
    """The rows of the table, each kept as soon as it is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.all: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds left for all rows."""
        return self.options.budget_s - (time.perf_counter() - self.started)

    def left_before_peer(self) -> float:
        """Seconds left for the rows before the other server's, or for all."""
        return self.left() - (self.options.peer_s + 10 if self.options.peer else 5)

    def keep(self, row: str, figures: dict[str, Any], started: float) -> None:
        tiny = self.options.tiny
        figures = {
            "row": row,
            **figures,
            "hardware": "CPU" if tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
            "wall_s": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(figures), flush=True)
        self.all.append(figures)
        if self.options.to is not None:
            self.options.to.parent.mkdir(parents=True, exist_ok=True)
            self.options.to.write_text(json.dumps(self.all, indent=1) + "\n")


def receive(pipe: Any, process: Any, until_s: float) -> Any:
    """The next message of a process."""
    limit_s = max(0.0, until_s - time.perf_counter())
    try:
        if pipe.poll(limit_s):
            return pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"it has ended with {process.exitcode}") from None
    raise RuntimeError(f"nothing came in {limit_s:.0f} s")


def show_stacks(process: Any) -> None:
    """Has a process that came too late print where its threads are."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)


def run(options: argparse.Namespace) -> None:
    rows = Rows(options)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    # Now, so that it has loaded when its row comes, whatever becomes of the others.
    peer = Peer(folder, options) if options.peer else None
    try:
        alone = run_answer(rows, options, peer)
        run_serve(rows, folder, options, alone, peer)
        if peer is not None:
            run_peer(rows, options, alone, peer)
    finally:
        if peer is not None:
            peer.close()
        shutil.rmtree(folder, ignore_errors=True)


def run_answer(rows: Rows, options: argparse.Namespace, peer: Peer | None) -> float | None:
    """The row of `chat.answer`; its requests a second."""
    started = time.perf_counter()
    until_s = started + 0.5 * options.budget_s
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=answer, args=(options, theirs))
    process.start()
    theirs.close()
    figures: dict[str, Any] = {}
    rate = None
    try:
        receive(ours, process, until_s)
        figures["ready_s"] = round(time.perf_counter() - started, 1)
        if peer is not None:
            peer.settle()
        ours.send("go")
        seconds, tokens = receive(ours, process, until_s)
        rate = len(tokens) / seconds
        figures |= {"requests": len(tokens), "requests_per_s": round(rate, 2)}
        figures |= {"tokens": round(statistics.mean(tokens), 1)} | shortfall(tokens)
    except RuntimeError as error:
        figures["failed"] = str(error)
        show_stacks(process)
    finally:
        process.join(20)
        process.kill()
    rows.keep("answer", figures, started)
    return rate


def run_serve(
    rows: Rows,
    folder: Path,
    options: argparse.Namespace,
    alone: float | None,
    peer: Peer | None,
) -> None:
    """The row of `internvl serve`; by a thread if an engine in a process of its own fails."""
    spawn = multiprocessing.get_context("spawn")
    for apart in (True, False):
        started = time.perf_counter()
        port_file = folder / f"port_{apart}"
        process = spawn.Process(target=serve, args=(options, port_file, apart))
        process.start()
        figures: dict[str, Any] = {"engine": "process" if apart else "thread"}
        try:
            until_s = started + min(0.4 * options.budget_s, rows.left_before_peer())
            while not port_file.exists():
                if not process.is_alive() or time.perf_counter() > until_s:
                    raise RuntimeError("the server has no port")
                time.sleep(0.1)
            address = ("127.0.0.1", int(port_file.read_text()))
            wait_until_healthy(address, process.is_alive, until_s)
            figures["ready_s"] = round(time.perf_counter() - started, 1)
            if peer is not None:
                peer.settle()
            path, limit_s = "/v1/chat/completions", max(30.0, rows.left_before_peer())
            figures |= measured(address, path, MODEL, options, process.pid, limit_s)
            if alone is not None:
                figures["share_of_answer"] = round(figures["requests_per_s"] / alone, 3)
        except (RuntimeError, OSError) as error:
            figures["failed"] = str(error)[:900]
            show_stacks(process)
        finally:
            process.terminate()
            process.join(10)
            process.kill()
        rows.keep("serve", figures, started)
        # Not again if there is no time to.
        if "requests" in figures or rows.left_before_peer() < 60:
            return


def run_peer(rows: Rows, options: argparse.Namespace, alone: float | None, peer: Peer) -> None:
    """The row of the other server."""
    started = time.perf_counter()
    try:
        figures = peer.measure(options, max(10.0, min(options.peer_s, rows.left() - 5)))
        if alone is not None:
            figures["share_of_answer"] = round(figures["requests_per_s"] / alone, 3)
    except (RuntimeError, OSError) as error:
        figures = {"failed": f"{error}; {peer.close()}"[:900]}
    rows.keep("transformers", figures, started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a slot")
    parser.add_argument("--peer", action="store_true", help="measure `transformers serve` too")
    parser.add_argument("--peer-s", type=float, default=30, help="seconds for it")
    parser.add_argument("--budget-s", type=float, default=540, help="seconds for all rows")
    parser.add_argument("--url", help="measure this server instead, such as http://HOST:PORT/v1")
    parser.add_argument("--model", help="name to ask it for")
    parser.add_argument("--export", type=Path, help="write the model in transformers' layout there")
    parser.add_argument("--folder", default=None, help="where the model for the peer is written")
    parser.add_argument("--to", type=Path, default=None, help="file for the rows' JSON")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.count, options.clients = min(options.count, 24), min(options.clients, 4)
    if options.export is not None:
        from internvl import export

        print(export.run(model_of(options), options.export, verify=False), file=sys.stderr)
    elif options.url is not None:
        parts = urllib.parse.urlsplit(options.url)
        address = (parts.hostname or "127.0.0.1", parts.port or 80)
        path = f"{parts.path.rstrip('/')}/chat/completions"
        started = time.perf_counter()
        Rows(options).keep("url", measured(address, path, options.model, options), started)
    else:
        run(options)


if __name__ == "__main__":
    main()
