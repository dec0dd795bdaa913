"""The fields of a chat completion, as clients of OpenAI, vLLM and LMDeploy send them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl.inference.settings import Settings
from internvl.serve.errors import ApiError
from internvl.serve.fields import (
    Field,
    Refused,
    as_it_is,
    flag,
    number_from,
    read_fields,
    text,
    texts,
    whole_from,
)

MOST_LOGPROBS, MOST_CHOICES, MOST_STOPS, MOST_TILES = 20, 16, 16, 64
"""Most likely tokens that are listed, answers of a request, stop strings, and tiles of an image."""


def _top_k(name: str, value: Any) -> int:
    # vLLM's word for all tokens is -1.
    return 0 if value == -1 else int(whole_from(0)(name, value))


_STREAM_OPTIONS = {"include_usage": Field(flag, False)}
_STREAM_REFUSED = {
    "include_obfuscation": Refused((False,), "answers are not padded"),
    "continuous_usage_stats": Refused((False,), "the last event has the usage"),
}
_PROCESSOR = {
    "max_dynamic_patch": Field(whole_from(1, MOST_TILES)),
    "num_frames": Field(whole_from(1, 128)),
}


def _stream_options(name: str, value: Any) -> dict[str, Any]:
    return read_fields(value, _STREAM_OPTIONS, _STREAM_REFUSED, name)


def _processor(name: str, value: Any) -> dict[str, Any]:
    return read_fields(value, _PROCESSOR, {}, name)


FIELDS: dict[str, Field] = {
    "model": Field(text),
    # Read later: their errors name a message and a content part.
    "messages": Field(as_it_is),
    "temperature": Field(number_from(0, 100)),
    "top_p": Field(number_from(1e-8, 1), 1.0),
    # All tokens: OpenAI has no such field, so that its clients expect none to be left out.
    "top_k": Field(_top_k, 0),
    "min_p": Field(number_from(0, 1), 0.0),
    "max_tokens": Field(whole_from(1)),
    "max_completion_tokens": Field(whole_from(1)),
    "min_new_tokens": Field(whole_from(0)),
    # The same in vLLM.
    "min_tokens": Field(whole_from(0)),
    "stop": Field(texts(MOST_STOPS), ()),
    "seed": Field(whole_from(-(2**63), 2**63 - 1)),
    "repetition_penalty": Field(number_from(0.01, 100), 1.0),
    "n": Field(whole_from(1, MOST_CHOICES), 1),
    "logprobs": Field(flag, False),
    "top_logprobs": Field(whole_from(0, MOST_LOGPROBS)),
    "stream": Field(flag, False),
    "stream_options": Field(_stream_options),
    "skip_special_tokens": Field(flag, True),
    "mm_processor_kwargs": Field(_processor, {}),
    "user": Field(text, ""),
}
"""Fields that are followed; `user` goes to the log."""

_NO_TOOLS = "these models call no tools"
REFUSED: dict[str, Refused] = {
    # Of OpenAI.
    "presence_penalty": Refused((0, 0.0), "use repetition_penalty"),
    "frequency_penalty": Refused((0, 0.0), "use repetition_penalty"),
    "logit_bias": Refused(({},), "no token is made likelier"),
    "response_format": Refused(({"type": "text"},), "answers are free text; ask for JSON in words"),
    "tools": Refused(([],), _NO_TOOLS),
    "tool_choice": Refused(("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": Refused((True, False), _NO_TOOLS),
    "functions": Refused(([],), _NO_TOOLS),
    "function_call": Refused(("none", "auto"), _NO_TOOLS),
    "modalities": Refused((["text"],), "answers are text"),
    "audio": Refused((), "answers are text"),
    "prediction": Refused((), "answers are generated whole"),
    "reasoning_effort": Refused(("none",), "ask for steps in the system message"),
    "verbosity": Refused(("medium",), "ask for a length in words"),
    "web_search_options": Refused((), "nothing is searched"),
    "store": Refused((False,), "nothing is stored"),
    "metadata": Refused(({},), "nothing is stored"),
    "service_tier": Refused(("auto", "default"), "there is one tier"),
    "safety_identifier": Refused((), "put it under user, which is logged"),
    "prompt_cache_key": Refused((), "no prompt is cached"),
    "prompt_cache_retention": Refused((), "no prompt is cached"),
    "moderation": Refused((), "nothing is moderated"),
    # Of vLLM and LMDeploy.
    "best_of": Refused((1,), "ask for n answers and choose"),
    "use_beam_search": Refused((False,), "beam search is `internvl evaluate --num-beams`"),
    "length_penalty": Refused((1, 1.0), "it is beam search's"),
    "early_stopping": Refused((False,), "it is beam search's"),
    "ignore_eos": Refused((False,), "use min_new_tokens"),
    "include_stop_str_in_output": Refused((False,), "the stop string is cut off"),
    "stop_token_ids": Refused(([],), "write the text under stop"),
    "bad_words": Refused(([],), "no token is forbidden"),
    "prompt_logprobs": Refused((0, False), "logprobs are the answer's"),
    "spaces_between_special_tokens": Refused((True,), "text is decoded in one way"),
    "echo": Refused((False,), "the prompt is not repeated"),
    "add_generation_prompt": Refused((True,), "the answer is always opened"),
    "continue_final_message": Refused((False,), "the last message is from the user"),
    "add_special_tokens": Refused((False,), "the template has them all"),
    "chat_template": Refused((), "the model's template is used, as in training"),
    "chat_template_kwargs": Refused(({},), "templates have no settings"),
    "media_io_kwargs": Refused(({},), "use mm_processor_kwargs"),
    # Of transformers and other servers.
    "do_sample": Refused((), "set temperature"),
    "num_beams": Refused((1,), "beam search is `internvl evaluate --num-beams`"),
    "guided_json": Refused((), "answers are free text"),
    "guided_regex": Refused((), "answers are free text"),
    "guided_choice": Refused((), "answers are free text"),
    "session_id": Refused((-1,), "send the whole conversation"),
    "enable_thinking": Refused((), "ask for steps in the system message"),
    "return_token_ids": Refused((False,), "answers are text"),
    "priority": Refused((0,), "requests are begun in their order"),
}
"""Fields of other servers that would change the answer, and are not followed."""


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion's fields, checked; messages are read later."""

    model: str
    messages: Any
    max_tokens: int | None
    """None: the server's default, or what the prompt leaves."""
    sampling: Mapping[str, Any]
    """Fields of `Settings` besides the number of tokens."""
    stop: tuple[str, ...]
    seed: int | None
    n: int
    top_logprobs: int | None
    """None without logprobs."""
    stream: bool
    include_usage: bool
    skip_special_tokens: bool
    max_dynamic_patch: int | None
    num_frames: int | None
    user: str

    def settings(self, max_tokens: int) -> Settings:
        """Returns the settings of an answer of up to `max_tokens`."""
        return Settings(max_new_tokens=max_tokens, **self.sampling)


def parse(body: Any, temperature: float) -> ChatRequest:
    """Parses a chat completion's JSON object.

    Args:
        temperature: of a request that has none.

    Raises:
        ApiError: a field that is wrong, unknown or not followed, or two that contradict.
    """
    values = read_fields(body, FIELDS, REFUSED)
    for name in ("model", "messages"):
        if values[name] is None:
            raise ApiError(f"{name} is missing", param=name)
    # Without these two checks a field would be ignored.
    if values["stream_options"] is not None and not values["stream"]:
        raise ApiError("stream_options belong to stream: true", param="stream_options")
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise ApiError("top_logprobs belong to logprobs: true", param="top_logprobs")
    # OpenAI renamed the field; clients send either name.
    max_tokens = _same(values, "max_tokens", "max_completion_tokens")
    min_tokens = _same(values, "min_new_tokens", "min_tokens") or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise ApiError(
            f"min_new_tokens ({min_tokens}) is above max_tokens ({max_tokens})",
            param="min_new_tokens",
        )
    # 0 is a temperature too, so that only a missing one takes the default.
    asked = values["temperature"]
    return ChatRequest(
        model=values["model"],
        messages=values["messages"],
        max_tokens=max_tokens,
        sampling={
            "temperature": temperature if asked is None else asked,
            **{key: values[key] for key in ("top_p", "top_k", "min_p", "repetition_penalty")},
            "min_new_tokens": min_tokens,
        },
        # Without a number of its own only the chosen token is listed.
        top_logprobs=(values["top_logprobs"] or 0) if values["logprobs"] else None,
        include_usage=(values["stream_options"] or {}).get("include_usage", False),
        max_dynamic_patch=values["mm_processor_kwargs"].get("max_dynamic_patch"),
        num_frames=values["mm_processor_kwargs"].get("num_frames"),
        **{key: values[key] for key in ("stop", "seed", "n", "stream", "user")},
        skip_special_tokens=values["skip_special_tokens"],
    )


def _same(values: Mapping[str, Any], *names: str) -> Any:
    """Returns the value of fields that mean the same. Raises ApiError if they differ."""
    present = {name: values[name] for name in names if values[name] is not None}
    if len(set(present.values())) > 1:
        pairs = " and ".join(f"{name} = {value}" for name, value in present.items())
        raise ApiError(f"{pairs} mean the same; send one of them", param=names[0])
    return next(iter(present.values()), None)
