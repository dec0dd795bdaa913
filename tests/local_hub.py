"""A hub on this machine: what huggingface_hub's client asks when it creates and fills a repository.

It answers as the hub does, keeps what is committed, and knows the accounts of three tokens.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import yaml

WRITES, READS = "hf_writes", "hf_reads"
_ROLES = {WRITES: "write", READS: "read"}
ACCOUNT = "ada"


class Hub:
    """Repositories by id, and every request that was answered."""

    def __init__(self):
        self.repositories = {}  # id -> {"private": bool, "files": {path: bytes}, "messages": []}
        self.requests = []
        self.large = {}  # sha256 -> content
        self.is_full = False  # commits are refused
        self.url = ""

    def add(self, repo_id, **files):
        """A repository that is there already."""
        contents = {name: text.encode() for name, text in files.items()}
        self.repositories[repo_id] = {"private": True, "files": contents, "messages": []}
        return self.repositories[repo_id]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server.hub
        hub.requests.append(f"{method} {path}")
        for pattern, answer in _ANSWERS:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                status, tree = answer(hub, self.headers, body, *match.groups())
                return self._send(status, tree)
        return self._send(404, {"error": f"no such address: {method} {path}"})

    def _send(self, status, tree):
        content = json.dumps(tree).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", tree.get("error", ""))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing: a test reads `requests`."""


def _role(headers):
    return _ROLES.get(headers.get("Authorization", "").removeprefix("Bearer "))


def _whoami(hub, headers, body):
    role = _role(headers)
    if role is None:
        return 401, {"error": "Invalid username or password."}
    token = {"role": role, "displayName": "of a test"}
    return 200, {"name": ACCOUNT, "orgs": [], "auth": {"accessToken": token}}


def _create(hub, headers, body):
    asked = json.loads(body)
    owner = asked["organization"] or ACCOUNT
    repo_id = f"{owner}/{asked['name']}"
    if _role(headers) != "write" or owner != ACCOUNT:
        return 403, {"error": f"You don't have the rights to create a model under {owner!r}"}
    if repo_id in hub.repositories:
        return 409, {"error": "You already created this model repo"}
    hub.add(repo_id)["private"] = asked.get("visibility") == "private"
    return 200, {"url": f"{hub.url}/{repo_id}"}


def _tree(hub, headers, body, repo_id):
    files = hub.repositories[repo_id]["files"]
    return 200, [
        {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
        for path, content in files.items()
    ]


def _validate(hub, headers, body):
    front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
    valid = front is not None and isinstance(yaml.safe_load(front[1]), dict)
    errors = [] if valid else [{"message": "no metadata"}]
    return (400 if errors else 200), {"errors": errors, "warnings": []}


def _preupload(hub, headers, body, repo_id):
    return 200, {
        "files": [
            {
                "path": file["path"],
                # As the hub's .gitattributes says.
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
    }


def _batch(hub, headers, body, repo_id):
    objects = [
        {**entry, "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}}
        for entry in json.loads(body)["objects"]
    ]
    return 200, {"transfer": "basic", "objects": objects}


def _put(hub, headers, body, digest):
    assert hashlib.sha256(body).hexdigest() == digest
    hub.large[digest] = body
    return 200, {}


def _commit(hub, headers, body, repo_id):
    if hub.is_full:
        return 403, {"error": "Private repository storage limit reached"}
    repository = hub.repositories[repo_id]
    files = repository["files"]
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            repository["messages"].append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.large[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    return 200, {"commitUrl": f"{hub.url}/{repo_id}/commit/1", "commitOid": "1" * 40}


_ID = r"([\w.-]+/[\w.-]+)"
_ANSWERS = (
    ("GET /api/whoami-v2", _whoami),
    ("POST /api/repos/create", _create),
    (rf"GET /api/models/{_ID}/tree/main", _tree),
    ("POST /api/validate-yaml", _validate),
    (rf"POST /api/models/{_ID}/preupload/main", _preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /lfs/(\w+)", _put),
    (rf"POST /api/models/{_ID}/commit/main", _commit),
)


@contextmanager
def running():
    """A hub that answers on a port of this machine."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub, server.daemon_threads = hub, True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
