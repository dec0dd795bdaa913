"""Judges: models behind an OpenAI-compatible endpoint that rate free answers by a rubric."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl.config import JudgedEval
from internvl.errors import UserError
from internvl.files import cache_folder, read_yaml, write_text
from internvl.log import Progress, get_logger

_TRIES = 5
_TIMEOUT_S = 120
_AT_ONCE = 8
"""Requests that wait for the judge at a time."""
_MOST_SAID = 10_000  # bytes read of an error's body
_MOST_SAID_SHOWN = 200
_KEY_NAMES = ("INTERNVL_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables with the key of the endpoint."""


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """What a judge is asked, and how."""

    prompt: str
    """Names in braces are filled in."""
    model: str
    """The original's judge."""
    temperature: float
    system: str = ""
    max_tokens: int | None = None

    def filled(self, **fields: str) -> str:
        """Returns the prompt with the fields filled in."""
        # Values are not parsed again: braces of an answer stay.
        return self.prompt.format_map(fields)


@cache  # not when imported: few evaluations have a judge
def rubrics() -> Mapping[str, Rubric]:
    """Returns the rubrics by name."""
    rows = read_yaml(Path(__file__).with_name("rubrics.yaml"))
    return {name: Rubric(**row) for name, row in rows.items()}


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible endpoint; replies are kept by content, so that none is paid twice."""

    address: str
    """Base address, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model there; None: the rubric's."""
    folder: Path = field(default_factory=lambda: cache_folder() / "judge")
    """Where the replies are kept."""
    wait: Callable[[float], None] = field(default=time.sleep, repr=False)

    @classmethod
    def of(cls, config: JudgedEval) -> "Judge | None":
        """Returns the judge of an evaluation, None if it names none."""
        if config.judge is None:
            return None
        if not config.judge.startswith(("http://", "https://")):
            raise UserError(
                f"judge: {config.judge!r} is no address; write http://HOST:PORT/v1 of an "
                "OpenAI-compatible server"
            )
        return cls(config.judge.rstrip("/"), config.judge_model)

    def ask_all(self, rubric: Rubric, prompts: Sequence[str], unit: str = "replies") -> list[str]:
        """Asks several prompts, a few at a time; returns the replies in order.

        Raises:
            UserError: the endpoint cannot be reached, or refuses a request.
        """
        with Progress(unit, total=len(prompts)) as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
            replies = []
            for reply in pool.map(lambda prompt: self.ask(rubric, prompt), prompts):
                replies.append(reply)
                progress.update()
        return replies

    def ask(self, rubric: Rubric, prompt: str) -> str:
        """Returns the reply to a prompt, from the cache if it was asked before.

        Raises:
            UserError: see `ask_all`.
        """
        body = self._body(rubric, prompt)
        content = json.dumps([self.address, body], sort_keys=True)
        file = self.folder / f"{blake2b(content.encode(), digest_size=16).hexdigest()}.json"
        if file.is_file():
            verdict = _verdict(str(json.loads(file.read_text(encoding="utf-8"))["reply"]))
            if verdict:
                return verdict
        reply = self._post(body)
        verdict = _verdict(reply)
        # With its request: a hash alone would not say what was asked. A reply that was cut off
        # while the judge thought is asked for again by the next call.
        if verdict:
            write_text(file, json.dumps({"request": body, "reply": reply}, ensure_ascii=False))
        return verdict

    def _body(self, rubric: Rubric, prompt: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": rubric.system}] if rubric.system else []
        messages.append({"role": "user", "content": prompt})
        body: dict[str, Any] = {
            "model": self.model or rubric.model,
            "messages": messages,
            "temperature": rubric.temperature,
        }
        return body | ({"max_tokens": rubric.max_tokens} if rubric.max_tokens else {})

    def _post(self, body: Mapping[str, Any]) -> str:
        """Posts a request; tries again while the endpoint is busy or cannot be reached."""
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in _KEY_NAMES if os.environ.get(name)), None)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.address}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                    return _reply(json.load(answer), address)
            except urllib.error.HTTPError as error:
                reason = f"it answers {error.code} {error.reason}{_said(error)}"
                # Only these may pass: too many requests, and errors of the server itself.
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", None) or error or type(error).__name__)
            if attempt < _TRIES:
                get_logger().warning("judge %s: %s; trying again", address, reason)
                self.wait(2.0**attempt)
        raise UserError(
            f"the judge at {address} cannot be asked ({reason}); check --judge, --judge-model and "
            f"the key in {_KEY_NAMES[0]}; replies so far are kept, and the same command goes on"
        )


def _verdict(reply: str) -> str:
    """Returns a reply without the thoughts before it, empty if it holds nothing else."""
    # Numbers of the thoughts would be read as the rating. Some templates open them in the prompt.
    _, end, verdict = reply.rpartition("</think>")
    if not end:
        return "" if reply.lstrip().startswith("<think>") else reply
    return verdict.strip()


def _said(error: urllib.error.HTTPError) -> str:
    """Returns what a server says of an error, such as that it has no such model."""
    try:
        text = error.read(_MOST_SAID).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        tree = json.loads(text)
        text = str(tree["error"]["message"] if "error" in tree else tree["message"])
    except (ValueError, KeyError, TypeError):
        # A web page of a proxy says nothing in one line.
        text = "" if text.lstrip().startswith("<") else text
    line = " ".join(text.split())[:_MOST_SAID_SHOWN]
    return f": {line}" if line not in ("", "{}") else ""


def _reply(answer: Any, address: str) -> str:
    """Returns the text of a completion. Raises UserError if it has none."""
    try:
        return str(answer["choices"][0]["message"]["content"] or "").strip()
    except (KeyError, IndexError, TypeError):
        raise UserError(
            f"the judge at {address} does not answer in the form of OpenAI's chat completions; "
            f"it says {str(answer)[:200]}"
        ) from None
