"""Settings of generation, checked by name, type and range. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from internvl.data.arguments import check_number, check_whole, nearest
from internvl.errors import UserError

_UNSUPPORTED = {
    "max_length": "use max_new_tokens",
    "min_length": "use min_new_tokens",
    "eos_token_id": "the template's end is used",
    "pad_token_id": "the tokenizer's is used",
    "do_sample": "set temperature",
    "use_cache": "it is always used",
    "stop_strings": "cut the answer instead",
    **dict.fromkeys(
        ("num_return_sequences", "return_dict_in_generate"), "an answer is one text; ask again"
    ),
    **dict.fromkeys(
        ("num_beam_groups", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
        "transformers would run code from the hub for it",
    ),
}
"""Keys of GenerationConfig that `extra` does not take, and the remedy for each."""
_LEAST_TEMPERATURE = 1e-5
"""Below it decoding is greedy, as in vLLM: logits divided by less overflow float32."""


@dataclass(frozen=True)
class Settings:
    """Generation settings; the default is greedy decoding.

    Raises:
        UserError: a value out of range, or a key of `extra` that would be ignored.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    num_beams: int = 1
    temperature: float | None = None
    """Sampling temperature; None or less than 1e-5 is greedy. Without `seed`, sampling draws from
    torch's global generator, so `torch.manual_seed` makes it reproducible."""
    top_p: float = 1.0
    """Nucleus sampling: the most likely tokens with this cumulative probability."""
    top_k: int = 50
    """Sampling: at most this many tokens; 0 for all. 50 is the default of transformers."""
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    """Sampling: only tokens at least this probable, relative to the likeliest one; 0 for all."""
    seed: int | None = None
    """Seed of an answer's own generator: its draws do not depend on other requests."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More arguments of transformers' GenerationConfig, such as length_penalty."""

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("num_beams", self.num_beams, 1)
        check_whole("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, above=0, most=1)
        check_number("repetition_penalty", self.repetition_penalty, above=0)
        if self.min_p != 0:
            check_number("min_p", self.min_p, above=0, most=1)
        # 0 is allowed: other libraries' greedy search is called with it.
        if self.temperature is not None and self.temperature != 0:
            check_number("temperature", self.temperature, above=0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens "
                f"({self.max_new_tokens})"
            )
        _check_extra(self.extra)

    @property
    def samples(self) -> bool:
        """True if tokens are drawn; False: the likeliest one is taken."""
        return self.temperature is not None and self.temperature >= _LEAST_TEMPERATURE

    @property
    def length_penalty(self) -> float:
        """A text of n tokens, its end included, scores its log-probability / n to this power."""
        penalty = self.extra.get("length_penalty")
        return 1.0 if penalty is None else penalty

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "Settings":
        """Builds settings from keyword arguments. Raises UserError for an unknown name."""
        # Checked here: the constructor's own TypeError could not name the nearest setting.
        names = [setting.name for setting in fields(cls)]
        for key in kwargs:
            if key in names:
                continue
            if key in _generation_keys() - _UNSUPPORTED.keys():
                raise UserError(f"{key} is a setting of transformers: write extra={{{key!r}: …}}")
            remedy = _UNSUPPORTED.get(key) or nearest(key, names)
            raise UserError(f"there is no setting {key!r}; {remedy}")
        return cls(**kwargs)

    @property
    def is_plain_search(self) -> bool:
        """True if nothing but `num_beams`, lengths and `length_penalty` differs from greedy."""
        more = self.extra.keys() - {"length_penalty"}
        return not (self.samples or more) and self.repetition_penalty == 1

    def generation_config(self, end_id: int, pad_id: int) -> Any:
        """Returns transformers' GenerationConfig; generation stops at token `end_id`."""
        # Here: settings are checked before transformers is imported.
        from transformers import GenerationConfig

        sample = self.samples
        sampling: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            # None for 0: as min_new_tokens below.
            "min_p": self.min_p or None,
        }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            # None for 0: transformers would add a processor of logits that changes nothing.
            min_new_tokens=self.min_new_tokens or None,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            do_sample=sample,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            use_cache=True,
            # Only when sampling: transformers warns of sampling settings in greedy decoding.
            **(sampling if sample else {}),
            **self.extra,
        )


def _generation_keys() -> set[str]:
    """Returns the arguments of GenerationConfig, which takes any other name silently."""
    from transformers import GenerationConfig

    return {key for key in GenerationConfig().to_dict() if not key.startswith("_")}


_INTEGERS = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size", "max_cache_len"), 1),
    **dict.fromkeys(("prefill_chunk_size", "assistant_early_exit", "num_assistant_tokens"), 1),
}
"""Integers of GenerationConfig and their minimum; transformers checks few of them."""
_FRACTIONS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_FLOATS = (
    *("length_penalty", "diversity_penalty", "encoder_repetition_penalty", "guidance_scale"),
    "max_time",
)
_BOOLEANS = (
    *("renormalize_logits", "remove_invalid_values", "token_healing", "low_memory", "is_assistant"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("disable_compile", "use_mtp"),
)


def _check_extra(extra: Any) -> None:
    # A list of pairs, say, would pass for keys below.
    if not isinstance(extra, Mapping):
        raise UserError(f"extra must be a dict of settings, not {type(extra).__name__}")
    # Most settings have no extra, and transformers is imported for its keys only.
    if not extra:
        return
    settings = {setting.name for setting in fields(Settings)}
    supported = _generation_keys() - _UNSUPPORTED.keys()
    for key in extra:
        if key in settings:
            raise UserError(f"extra: {key} is a setting of its own; write {key}=…")
        if key not in supported:
            remedy = _UNSUPPORTED.get(key) or nearest(str(key), sorted(supported))
            raise UserError(f"extra: {key!r} is not followed here; {remedy}")
        _check_value(key, extra[key])


def _check_value(key: str, value: Any) -> None:
    """Raises UserError if a value of `extra` has another type or range than documented."""
    if value is None:  # the default of transformers for every key
        return
    if key in _INTEGERS:
        check_whole(f"extra: {key}", value, _INTEGERS[key])
    elif key in _FLOATS:
        check_number(f"extra: {key}", value)
    elif key in _FRACTIONS:
        check_number(f"extra: {key}", value, most=1)
    elif key in _BOOLEANS and not isinstance(value, bool):
        raise UserError(f"extra: {key} must be True or False, not {value!r}")
