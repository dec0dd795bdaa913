"""`internvl serve` in a process of its own, and what tests send to it."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

STARTS_S = 180
"""Longest that a busy machine may take to load a small model."""


class Server:
    """A server, seen from outside."""

    def __init__(self, process, port, log):
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}/v1"

    def request(self, method, path, body=None, **headers):
        """(status, headers, body) of one request; the body is bytes, or JSON made of an object."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def post(self, body, path="/v1/chat/completions", **headers):
        """(status, JSON) of a POST."""
        status, _, content = self.request("POST", path, body, **headers)
        return status, json.loads(content)

    def metric(self, name):
        """Value of a metric without labels."""
        text = self.request("GET", "/metrics")[2].decode()
        return next(
            float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")
        )

    def wait_for(self, test, seconds=10):
        """Returns once `test()` is true."""
        until_s = time.monotonic() + seconds
        while not test():
            assert time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.02)

    def stop(self):
        """Exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(folder, work, *words, start=("-m", "internvl"), **environment):
    """A server of the model in `folder`, once it is healthy; `start` runs the command line."""
    work.mkdir(parents=True, exist_ok=True)
    port_file, log = work / "port", work / "log"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, *start, "serve", str(folder), "--device", "cpu"]
    command += ["--port", "0", "--port-file", str(port_file), *map(str, words)]
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "INTERNVL_API_KEY": ""} | environment
    with (
        log.open("w") as written,
        subprocess.Popen(command, cwd=work, env=env, stderr=written, stdout=written) as process,
    ):
        try:
            server = Server(process, _port(port_file, process, log), log)
            server.wait_for(lambda: server.request("GET", "/health")[0] == 200, STARTS_S)
            yield server
        finally:
            if process.poll() is None:
                process.kill()


def _port(file, process, log):
    until_s = time.monotonic() + STARTS_S
    while not file.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until_s, log.read_text()
        time.sleep(0.02)
    return int(file.read_text())


def image_bytes(width=120, height=80, color=(200, 40, 90), form="PNG"):
    """An encoded image of one color with a darker corner."""
    image = Image.new("RGB", (width, height), color)
    image.paste((10, 20, 30), (0, 0, width // 3, height // 2))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def data_address(content, mime="image/png"):
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_part(content=None, **fields):
    """A content part that shows an image."""
    address = data_address(content or image_bytes())
    return {"type": "image_url", "image_url": {"url": address, **fields}}


def asked(*content, **fields):
    """The body of a chat completion: one question of parts, or of one text."""
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    question = {"role": "user", "content": parts}
    return {"model": "chat", "messages": [question], "max_tokens": 8, **fields}


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
