"""Rate and latency of `internvl serve`, beside `chat.answer` on the same requests.

    python benchmarks/serve.py                      # 2,000 requests, 64 clients, on a GPU
    python benchmarks/serve.py --tiny               # the same path on a CPU, in a minute
    python benchmarks/serve.py --url http://localhost:8000/v1 --model NAME  # any other server

Every request shows one photo of seven tiles and asks for 30 tokens. `chat.answer`, the server and
the clients are processes of their own, one after the other on the GPU, with as many slots. Weights
are random (InternVL2-2B's shape). A client sends its next request when its last one is answered,
streams it, and notes when the first token came. `--export DIR` writes the model that is measured,
for another server.
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
import urllib.parse
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
    return chat


def answer(options: argparse.Namespace, results: Any) -> None:
    """Requests a second of `chat.answer`, the second time: the first one compiles."""
    from internvl.inference.requests import Request

    chat = model_of(options)
    requests = [Request(f"<image>\n{QUESTION}", [photo(n)]) for n in range(options.count)]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        chat.answer(requests, max_new_tokens=NEW, batch_size=options.clients)
        seconds.append(time.perf_counter() - started)
    results.put(options.count / seconds[-1])


def serve(options: argparse.Namespace, port_file: Path) -> None:
    """Runs the server until it is told to stop."""
    from internvl import log
    from internvl.serve import Limits, Options, server
    from internvl.serve.chat_engine import ChatEngine

    log.setup(30)
    limits = Limits(max_length=options.length, max_waiting=2 * options.clients)
    chosen = Options(port=0, port_file=port_file, name=MODEL, limits=limits, slots=options.clients)
    load = partial(_engine, options, chosen, ChatEngine)
    server.serve("chat", [load], chosen, [])


def _engine(options: argparse.Namespace, chosen: Any, engine: Any) -> Any:
    return engine(model_of(options), chosen)


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
        }
    ).encode()


async def one(address: tuple[str, int], path: str, data: bytes) -> tuple[float, float, int]:
    """Seconds to the first piece and to the end of an answer, and its number of pieces."""
    started, first, pieces = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection(*address)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode())
    while line := await reader.readline():
        if b'"content":' in line and b'"content":""' not in line:
            first = first or time.perf_counter() - started
            pieces += 1
    writer.close()
    return first, time.perf_counter() - started, pieces


async def clients(
    address: tuple[str, int], path: str, bodies: list[bytes], options: argparse.Namespace, done: Any
) -> list[tuple[float, float, int]]:
    left = iter(range(options.count))
    answers = []

    async def client() -> None:
        for index in left:
            answers.append(await one(address, path, bodies[index % len(bodies)]))
            done(len(answers))

    await asyncio.gather(*(client() for _ in range(options.clients)))
    return answers


def memory_of(pid: int) -> float:
    """Resident GiB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)


def measured(
    address: tuple[str, int], path: str, name: str, options: argparse.Namespace, pid: int | None
) -> dict[str, Any]:
    bodies = [body(n, name) for n in range(16)]
    memory: list[float] = []

    def done(count: int) -> None:
        if pid is not None and count % max(1, options.count // 8) == 0:
            memory.append(memory_of(pid))

    warm = argparse.Namespace(count=2 * options.clients, clients=options.clients)
    asyncio.run(clients(address, path, bodies, warm, lambda count: None))
    started = time.perf_counter()
    answers = asyncio.run(clients(address, path, bodies, options, done))
    seconds = time.perf_counter() - started
    first = sorted(answer[0] for answer in answers)
    return {
        "requests_per_s": round(len(answers) / seconds, 2),
        "first_token_p50_ms": round(1e3 * statistics.median(first)),
        "first_token_p95_ms": round(1e3 * first[int(0.95 * len(first))]),
        "total_p50_ms": round(1e3 * statistics.median(answer[1] for answer in answers)),
        "pieces": round(statistics.mean(answer[2] for answer in answers), 1),
        "host_gib": memory,
    }


def wait_until_healthy(address: tuple[str, int], process: Any) -> None:
    import http.client

    while process.is_alive():
        connection = http.client.HTTPConnection(*address)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise RuntimeError("the server has ended")


def run(options: argparse.Namespace) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=answer, args=(options, results))
    process.start()
    alone = results.get()
    process.join()
    port_file = Path(options.folder) / f"port_{os.getpid()}"
    process = spawn.Process(target=serve, args=(options, port_file))
    process.start()
    try:
        while not port_file.exists():
            if not process.is_alive():
                raise RuntimeError("the server has ended")
            time.sleep(0.1)
        address = ("127.0.0.1", int(port_file.read_text()))
        wait_until_healthy(address, process)
        served = measured(address, "/v1/chat/completions", MODEL, options, process.pid)
    finally:
        process.terminate()
        process.join(30)
        port_file.unlink(missing_ok=True)
    share = served["requests_per_s"] / alone
    return {"answer_per_s": round(alone, 2), "share_of_answer": round(share, 3), **served}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a slot")
    parser.add_argument("--url", help="measure this server instead, such as http://HOST:PORT/v1")
    parser.add_argument("--model", help="name to ask it for")
    parser.add_argument("--export", type=Path, help="write the model in transformers' layout there")
    parser.add_argument("--folder", default=".", help="where the port is written")
    parser.add_argument("--to", type=Path, default=None, help="file for the JSON")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.count, options.clients = min(options.count, 24), min(options.clients, 4)
    if options.export is not None:
        from internvl import export

        print(export.run(model_of(options), options.export, verify=False), file=sys.stderr)
        return
    if options.url is not None:
        parts = urllib.parse.urlsplit(options.url)
        address = (parts.hostname or "127.0.0.1", parts.port or 80)
        path = f"{parts.path.rstrip('/')}/chat/completions"
        figures = measured(address, path, options.model, options, None)
    else:
        figures = run(options)
    figures = {
        "requests": options.count,
        "clients": options.clients,
        **figures,
        "hardware": "CPU" if options.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(figures), flush=True)
    if options.to is not None:
        options.to.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
