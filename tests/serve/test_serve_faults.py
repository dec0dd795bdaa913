"""What goes wrong in a server, or is sent to it on purpose, and what stays undisturbed."""

import concurrent.futures
import contextlib
import http.client
import http.server
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import torch
from chat_folders import prompt_folder
from command_line import call
from dual_folders import dual_folder
from http_server import STARTS_S, asked, data_address, image_bytes, image_part, running
from PIL import Image

from internvl.data.messages import VIDEO_MARK
from internvl.errors import ModelFolderError, RunError, UserError
from internvl.inference.engine import Job
from internvl.inference.load import load
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings
from internvl.serve import encoding, media, prompts
from internvl.serve.apart import Apart, _Begin, _read, _work
from internvl.serve.chat_request import FIELDS
from internvl.serve.engines import JobQueue
from internvl.serve.errors import ApiError
from internvl.serve.messages import Medium
from internvl.serve.options import Limits

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prompt_folder("internlm2.internvl2_5", tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a.png").write_bytes(image_bytes())
    return folder


@pytest.fixture(scope="module")
def server(folder, photos, tmp_path_factory):
    words = ("--slots", 2, "--max-waiting", 3, "--api-key", "secret", "--allow-files", photos)
    words += ("--allow-hosts", "localhost")
    with running(folder, tmp_path_factory.mktemp("server"), *words) as server:
        yield server


KEY = {"Authorization": "Bearer secret"}


def answered(server, body, **headers):
    status, answer = server.post(body, **KEY, **headers)
    return status, answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]


def streamed_text(events):
    """The text of a stream's events, or of the last of them."""
    lines = [
        line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")
    ]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    return "".join(delta.get("content") or "" for delta in deltas)


def begun(server, body):
    """A connection whose streamed answer has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", CHAT, json.dumps(body | {"stream": True}), KEY)
    response = connection.getresponse()
    assert response.status == 200
    for _ in range(6):
        response.readline()
    return connection, response


@pytest.mark.slow
def test_a_client_that_goes_away_frees_its_slot(server):
    body = asked("Hi", max_tokens=400)
    whole = answered(server, asked("Hello", image_part(), max_tokens=20))
    connection, response = begun(server, body)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(answered, server, asked("Hello", image_part(), max_tokens=20))
        response.close()
        connection.close()
        assert other.result() == whole
    left = time.monotonic()
    server.wait_for(lambda: server.metric("internvl_running") == 0, 1)
    # Without a stream too.
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        plain.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        server.wait_for(lambda: server.metric("internvl_running") == 1)
    server.wait_for(lambda: server.metric("internvl_running") == 0, 1)
    assert time.monotonic() - left < 20


@pytest.mark.slow
def test_a_full_queue_refuses_and_the_others_are_answered(server):
    connection, response = begun(server, asked("Hi", max_tokens=400, n=5))
    full = "5 requests are answered or wait"
    with (
        openai.OpenAI(base_url=server.url, api_key="secret", max_retries=0) as client,
        pytest.raises(openai.RateLimitError, match=full) as refused,
    ):
        client.chat.completions.create(**asked("Hi"))
    assert refused.value.response.headers["retry-after"] == "2"
    assert (server.metric("internvl_running"), server.metric("internvl_waiting")) == (2, 3)
    # OpenAI's client asks again by itself.
    with openai.OpenAI(base_url=server.url, api_key="secret", max_retries=9) as patient:
        assert patient.chat.completions.create(**asked("Hi")).choices
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


@pytest.mark.slow
def test_keys(server):
    for key in ("wrong", "", "secret2", "sécret"):
        header = f"Bearer {key}".encode("latin-1")
        status, _, body = server.request("POST", CHAT, asked("Hi"), Authorization=header)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    with (
        openai.OpenAI(base_url=server.url, api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    assert server.request("GET", "/health")[0] == 200
    assert "secret" not in server.log.read_text()


def malformed():
    """50 bodies that are no chat completion."""
    good = json.dumps(asked("Hi", image_part())).encode()
    yield from (b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe\x00", b"{" * 100_000)
    yield from (b'{"a":' * 5000, b"[" * 200_000, b'{"n": NaN}', b'{"n": 1e999}', b"\x00" * 1000)
    yield b'{"model": "chat", "messages": [], "n": ' + b"9" * 5000 + b"}"
    for cut in range(10, len(good) - 10, len(good) // 12):
        yield good[:cut]
    deep = []
    for _ in range(500):
        deep = [deep]
    wrong = (None, 0, True, "", [], {}, [[]], [None], {"role": "user"}, deep, [{"role": 3}])
    for value in wrong:
        yield json.dumps(asked("Hi") | {"messages": value}).encode()
        parts = [{"role": "user", "content": value}]
        if value != "":
            yield json.dumps(asked("Hi") | {"messages": parts}).encode()
    for url in ("", "data:", "data:image/png;base64,????", "data:image/png;base64,", "http://"):
        yield json.dumps(asked("Hi", {"type": "image_url", "image_url": {"url": url}})).encode()


@pytest.mark.slow
def test_malformed_bodies_are_refused_one_by_one(server):
    bodies = list(malformed())
    assert len(bodies) >= 50
    whole = answered(server, asked("Hello"))
    for body in bodies:
        status, error = answered(server, body)
        assert (status, error["type"]) == (400, "invalid_request_error"), body[:80]
    assert answered(server, asked("Hello")) == whole
    assert "Traceback" not in server.log.read_text()


def png_of(width, height, data=b"\x00"):
    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_frames_of_too_many_pixels_are_not_decoded():
    """A small file can hold huge frames, of which a request may ask for any number."""
    file = io.BytesIO()
    frames = [Image.new("P", (8000, 4000), color) for color in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    medium = Medium(VIDEO_MARK, "data:", "messages[0].content[0].video_url", num_frames=10)
    few = SimpleNamespace(num_frames=None)
    with pytest.raises(
        ApiError, match=r"10 frames of 8000 x 4000 pixels; .* 300,000,000"
    ) as caught:
        encoding._videos([(medium, file.getvalue())], few)
    assert (caught.value.param, caught.value.code) == (medium.param, "video_too_large")
    with pytest.raises(ApiError, match=f"{re.escape(medium.param)}: ") as caught:
        encoding._videos([(medium, b"GIF89a")], few)
    assert str(caught.value).count("the video") <= 1


def test_an_image_that_cannot_be_decoded_is_named():
    """Beside a good one; and one above Pillow's limit is told the server's."""
    good, torn = image_bytes(), png_of(80, 80)
    names = [f"messages[0].content[{i}].image_url" for i in range(2)]
    encoding.raise_undecodable([(names[0], good)])
    with pytest.raises(ApiError, match=re.escape(names[1]) + ".*cannot be decoded") as caught:
        encoding.raise_undecodable([*zip(names, (good, torn), strict=True)])
    assert (caught.value.param, caught.value.code) == (names[1], "invalid_image")
    with pytest.raises(ApiError, match="more than 64,000,000 pixels") as caught:
        prompts.check_pixels(png_of(20_000, 20_000), names[0], Limits())
    assert caught.value.param == names[0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", 2**63, "from -9223372036854775808 to 9223372036854775807"),
        ("top_p", 0, "from 1e-08 to 1, not 0"),
        ("stop", ["a", 5], "stop[1] is an int (5), not a text"),
    ],
)
def test_fields_out_of_range(field, value, words):
    with pytest.raises(ApiError, match=re.escape(words)):
        FIELDS[field].read(field, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png_of(20_000, 20_000), "more than 64,000,000 pixels"),
        (png_of(9_000, 9_000), "9000 x 9000 pixels are more than 64,000,000"),
        (png_of(80, 80), "cannot be decoded"),
        (image_bytes()[:60], ""),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ""),
        (b"x" * (20 * 2**20 + 1), "more than 20,971,520 bytes"),
    ],
)
def test_bad_images_are_refused(server, content, words):
    body = asked("Hi", image_part(content))
    status, error = answered(server, body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]
    assert error["param"].startswith("messages[0].content[")
    assert error["param"].endswith("].image_url")


@pytest.mark.slow
def test_files_are_read_below_the_allowed_folder_alone(server, photos, tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(image_bytes())
    (photos / "link.png").symlink_to(outside)

    def ask(url):
        return answered(server, asked("Hi", {"type": "image_url", "image_url": {"url": url}}))

    assert ask(f"file://{photos}/a.png") == answered(server, asked("Hi", image_part()))
    for url in (
        f"file://{outside}",
        f"file://{photos}/link.png",
        f"file://{photos}/../{tmp_path.name}/secret.png",
        f"file://{photos}/%2e%2e/secret.png",
        f"file://{photos}",
        f"file://{photos}/none.png",
        "file:///dev/zero",
        "file://host/a.png",
        "file:///a%00b",
    ):
        status, error = ask(url)
        assert (status, "must be below a folder of --allow-files" in error["message"]) == (
            400,
            True,
        )
    for url in ("/etc/passwd", "s3://bucket/a.png", "ftp://host/a.png", "a.png"):
        assert "an address begins with data:" in ask(url)[1]["message"]


class Host(http.server.BaseHTTPRequestHandler):
    """A host of images that behaves as the path says."""

    def do_GET(self):
        path = self.path
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/to/"))
            self.end_headers()
            return
        if path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if path == "/drip":
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif path == "/slow":
            time.sleep(5)
        elif path == "/large":
            for _ in range(30):
                self.wfile.write(b"x" * 2**20)
        else:
            self.wfile.write(image_bytes())

    def handle(self):
        # The client goes away, as it should.
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def fetched(url, *, seconds=3, **limits):
    return media.fetch(url, "image", Limits(**limits), most=2**20, seconds=seconds)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/to/http://169.254.169.254/latest/meta-data", "169.254.169.254 is not a public address"),
        ("/to/http://[::1]:1/a.png", "::1 is not a public address"),
        ("/to/http://[::ffff:10.0.0.1]/a.png", "is not a public address"),
        ("/to/file:///etc/passwd", "it redirects to 'file:///etc/passwd'"),
        ("/to/" * 5, "more than 3 redirects"),
        ("/gone", "its host answers 404"),
        ("/large", "more than 1,048,576 bytes"),
    ],
)
def test_what_a_host_may_not_do(host, path, words):
    with pytest.raises(ApiError, match=words.replace("(", r"\(").replace("[", r"\[")):
        fetched(host + path, allow_hosts=("127.0.0.1",))


@pytest.mark.parametrize("path", ["/slow", "/drip"])
def test_a_slow_host_is_left_in_time(host, path):
    with pytest.raises(ApiError, match="it was not here in time"):
        fetched(host + path, seconds=0.5, allow_hosts=("127.0.0.1",))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost:1/a.png",
        "http://0.0.0.0/a.png",
        "http://10.1.2.3/a.png",
        "http://192.168.0.1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[fd00::1]/a.png",
        "http://2130706433/a.png",
        "http://0x7f.1/a.png",
        "https://127.0.0.1/a.png",
        "http://[64:ff9b::7f00:1]/a.png",
        "http://[64:ff9b::a9fe:a9fe]/a.png",
        "http://[64:ff9b:1::808:808]/a.png",
    ],
)
def test_addresses_that_are_not_public(url):
    with pytest.raises(ApiError, match="is not a public address; --allow-hosts"):
        fetched(url)


def test_an_image_is_fetched_from_an_allowed_host(host):
    assert fetched(f"{host}/a.png", allow_hosts=("127.0.0.1",)) == image_bytes()
    assert fetched(f"{host}/to//a.png", allow_hosts=("127.0.0.1",)) == image_bytes()
    with pytest.raises(ApiError, match="no plain host name"):
        fetched("http://user:word@127.0.0.1/a.png")


@pytest.mark.slow
def test_addresses_that_are_refused_disturb_nobody(server, host):
    allowed = host.replace("127.0.0.1", "localhost")

    def shown(url):
        return asked("What?", {"type": "image_url", "image_url": {"url": url}})

    long = asked("Hi", max_tokens=200)
    whole = answered(server, long)
    before = server.log.read_text().count(" tokens in, ")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(answered, server, long)
        for url in (f"{allowed}/to/http://169.254.169.254/latest/meta-data", f"{host}/a.png"):
            status, error = answered(server, shown(url))
            assert status == 400
            assert "is not a public address" in error["message"]
            assert error["code"] == "address_not_allowed"
        fetched_one = answered(server, shown(f"{allowed}/a.png"))
        assert other.result() == whole
    assert fetched_one == answered(server, asked("What?", image_part()))
    # A line of the log for each request that was answered.
    server.wait_for(lambda: server.log.read_text().count(" tokens in, ") == before + 3)


def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = call(capsys, "serve", folder, "--port", port)
    assert (code, f"127.0.0.1:{port} cannot be listened on" in error) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", 99999), "--port must be 0 (any free one) to 65535, not 99999"),
        (("--slots", 0), "--slots must be a whole number of at least 1, not 0"),
        (("--device", "cuda:99"), "device cuda:99: this machine has"),
    ],
)
def test_options_that_would_fail_after_the_loading(folder, capsys, words, message):
    code, _, error = call(capsys, "serve", folder, *words)
    assert (code > 0, message in error, "listening on" in error) == (True, True, False)


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return dual_folder(tmp_path_factory.mktemp("model") / "dual")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--adapter", "stamps={dual}"), ("--engine", "thread"), ("--readers", 0)],
)
def test_options_of_the_chat_engine_are_refused_for_internvl_14b(dual, capsys, option, value):
    words = (option, str(value).format(dual=dual))
    code, _, error = call(capsys, "serve", dual, *words)
    assert code > 0
    assert error.count("\n") == 1
    assert f"{option} is for chat models, and {dual} is an InternVL-14B" in error
    assert f"leave {option} out" in error


TWICE = """
import sys
from functools import partial
from pathlib import Path
from internvl import log
from internvl.inference.load import load
from internvl.serve import Options, server
from internvl.serve.apart import Apart
from internvl.serve.chat_engine import ChatEngine

def engine(folder, options):
    return ChatEngine(load(folder, device="cpu"), options)

if __name__ == "__main__":
    folder, port_file = sys.argv[2], Path(sys.argv[sys.argv.index("--port-file") + 1])
    options = Options(port=0, port_file=port_file, name="chat", slots=2)
    log.setup(20)
    here = partial(engine, folder, options)
    server.serve("chat", [here, partial(Apart, here)], options, [])
"""


@pytest.mark.slow
def test_two_engines_and_sigterm_in_the_middle(folder, tmp_path):
    """Copies of the model share the requests; answers under way end, and no other is begun.

    One copy is in the server's process, one in a process of its own.
    """
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    with running(folder, tmp_path, start=(script,)) as server:
        questions = [asked(f"Tell {n}") for n in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            served = [answer for _, answer in threads.map(server.post, questions)]
        chat = load(folder, device="cpu")
        expected = chat.answer([f"Tell {n}" for n in range(8)], max_new_tokens=8)
        assert [a["choices"][0]["message"]["content"] for a in served] == expected
        whole = server.request("POST", CHAT, asked("Hi", max_tokens=400, stream=True))[2]
        connection, response = begun(server, asked("Hi", max_tokens=400))
        server.process.terminate()
        server.wait_for(lambda: "SIGTERM" in server.log.read_text())
        status, error = server.post(asked("Hi"))
        assert (status, error["error"]["message"]) == (503, "the server is stopping")
        assert server.request("GET", "/health")[0] == 503
        rest = response.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        # As text: a slow machine sends several tokens in one event.
        assert streamed_text(rest)
        assert streamed_text(whole.decode()).endswith(streamed_text(rest))
        connection.close()
        assert server.process.wait(10) == 0


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_client_that_never_reads_is_cut_off_at_the_end(folder, tmp_path, signals):
    """After --drain, or at a second signal; without the traces of cancelled tasks."""
    words = ("--drain", "1" if signals == 1 else "60", "--slots", 2)
    with running(folder, tmp_path, *words) as server, socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", server.port))
        body = asked("Hi", max_tokens=400, min_tokens=399, temperature=3, stream=True, n=16)
        data = json.dumps(body | {"logprobs": True, "top_logprobs": 20}).encode()
        stuck.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n".encode())
        stuck.sendall(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        server.wait_for(lambda: server.metric("internvl_running") > 0)
        time.sleep(0.5)
        for _ in range(signals):
            server.process.terminate()
            time.sleep(0.3)
        assert server.process.wait(15) == 0
        written = server.log.read_text()
        assert "1 request had not ended" in written
        assert "Traceback" not in written


BROKEN = """
import sys
from internvl import cli
from internvl.inference.engine.decoder import Decoder

class Broken(Decoder):
    steps = 0
    def decode(self, longest):
        Broken.steps += 1
        if Broken.steps > 60:
            raise RuntimeError("the device is gone")
        return super().decode(longest)

sys.modules["internvl.inference.engine.scheduler"].Decoder = Broken
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_engine_that_dies_turns_health_red(folder, tmp_path):
    with running(folder, tmp_path, start=("-c", BROKEN)) as server:
        status, body = server.post(asked("Hi", max_tokens=10))
        assert status == 200
        with concurrent.futures.ThreadPoolExecutor() as threads:
            whole = threads.submit(server.post, asked("Hi", max_tokens=400))
            streamed = threads.submit(
                server.request, "POST", CHAT, asked("Hi", max_tokens=400, stream=True)
            )
            status, body = whole.result(30)
            assert (status, body["error"]["code"]) == (503, "unavailable")
            assert "the device is gone" in body["error"]["message"]
            events = streamed.result(30)[2].decode()
            assert '"error":{"message":"the engine died' in events
        for path in ("/health", CHAT):
            assert (
                server.request("GET" if path == "/health" else "POST", path, asked("x"))[0] == 503
            )
        assert server.metric("internvl_up") == 0
        assert server.request("GET", "/v1/models")[0] == 200
        assert server.stop() == 0


def children_of(pid):
    """Process id -> command line of the processes that a process has begun."""
    children = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                children[int(file.parent.name)] = (file.parent / "cmdline").read_text()
    return children


@pytest.mark.slow
def test_processes_of_the_engine_and_of_readers(folder, tmp_path):
    """Both can be killed: without readers threads go on, without its engine health turns red."""
    question = asked("What?", image_part())
    with running(folder, tmp_path, "--engine", "process", "--readers", 1) as server:
        server.wait_for(lambda: any("fork" in c for c in children_of(server.process.pid).values()))
        status, answer = server.post(question)
        assert status == 200
        connection, _ = begun(server, asked("Hi", max_tokens=400))
        connection.close()
        server.wait_for(lambda: server.metric("internvl_running") == 0, 5)
        children = children_of(server.process.pid)
        (forks,) = [pid for pid, command in children.items() if "forkserver" in command]
        server.wait_for(lambda: children_of(forks), STARTS_S)
        for reader in children_of(forks):
            os.kill(reader, signal.SIGKILL)
        again = server.post(question)
        assert again[0] == 200
        assert again[1]["choices"] == answer["choices"]
        (engine,) = [pid for pid, command in children.items() if "spawn_main" in command]
        connection, response = begun(server, asked("Hi", max_tokens=400))
        os.kill(engine, signal.SIGKILL)
        assert "its process has ended with exit code -9" in response.read().decode()
        connection.close()
        assert server.request("GET", "/health")[0] == 503
        assert server.stop() == 0


def test_a_job_is_sent_before_it_can_be_cancelled():
    """A cancellation that came first would be of a job that the process does not have."""
    apart, queue = object.__new__(Apart), JobQueue()
    apart._pipe, theirs = multiprocessing.Pipe()
    apart._writing, apart._jobs, apart._cancelled = threading.Lock(), {}, set()
    prompt = Prompt(np.arange(3), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ())
    with apart._writing:
        queue.put(Job("asked", prompt, Settings(), cancelled=True))
        sender = threading.Thread(target=apart._send_all, args=(queue,))
        sender.start()
        sender.join(0.1)
        assert not apart._jobs
    queue.close()
    sender.join()
    apart._take_in([], print)
    assert theirs.recv().key == 0
    assert os.read(theirs.fileno(), 12) == bytes(12)
    assert (theirs.recv(), theirs.recv()) == (None, 0)


def test_jobs_are_cancelled_after_the_last_one_too():
    """A drain that is over would wait for the whole of every answer."""
    ours, theirs = multiprocessing.Pipe()
    queue = JobQueue()
    reader = threading.Thread(target=_read, args=(theirs, queue, False))
    reader.start()
    ours.send(_Begin(7, np.arange(3), (), None, torch.uint8, Settings(), None, 0, 0.0))
    ours.send(None)
    ours.send(7)
    ours.close()
    reader.join()
    job = queue.take(wait=True)
    assert (job.key, job.cancelled, queue.take(wait=True)) == (7, True, None)


def test_an_engine_that_cannot_take_its_jobs_ends():
    """Else it would wait for jobs, and requests for it, with a green health."""
    ours, theirs = multiprocessing.Pipe()
    queue = JobQueue()
    ours.send("no job")
    with pytest.raises(AttributeError):
        _read(theirs, queue, False)
    assert queue.take(wait=True) is None


@pytest.mark.parametrize("closed", [True, False])
def test_an_end_that_nobody_asked_for_is_a_death(closed):
    apart, queue = object.__new__(Apart), JobQueue()
    apart._pipe, theirs = multiprocessing.Pipe()
    apart._writing, apart._jobs, apart._cancelled = threading.Lock(), {}, set()
    apart._process = SimpleNamespace(join=print, kill=list)
    if closed:
        queue.close()
    theirs.send(None)
    said = pytest.raises(RunError, match="its process takes no more jobs")
    with contextlib.nullcontext() if closed else said:
        apart.run(queue, print)
    assert queue.closed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelFolderError("out/x: no config.json"), "out/x: no config.json"),
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU's memory ran out"),
        (ImportError("No module named 'bitsandbytes'"), "a package is missing or broken"),
        (KeyError("a bug"), "its process has ended with exit code 1"),
    ],
)
def test_what_an_engine_died_of_is_said(error, said, capfd):
    """In the server's process; what is none of the expected, by its trace in the log."""

    def load():
        raise error

    apart = object.__new__(Apart)
    apart._pipe, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    apart._process = context.Process(target=_work, args=(load, theirs, 20))
    apart._process.start()
    theirs.close()
    with pytest.raises(RunError, match=said):
        apart._receive()
    apart._process.join()
    shown = "Traceback" in capfd.readouterr().err
    assert shown == (not isinstance(error, UserError))


def test_data_addresses():
    assert media.fetch(data_address(b"abc"), "x", Limits(), most=3, seconds=1) == b"abc"
    for url, words in (
        ("data:image/png,abc", "data:image/…;base64"),
        (data_address(b""), "it is empty"),
        (data_address(b"abcd"), "4 bytes, more than 3 bytes"),
        ("data:image/png;base64,a b", "not base64"),
    ):
        with pytest.raises(ApiError, match=words):
            media.fetch(url, "x", Limits(), most=3, seconds=1)
