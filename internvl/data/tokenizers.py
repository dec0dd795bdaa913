"""The tokenizer of a checkpoint, from its files alone: none of its Python code runs.

The releases were trained with slow tokenizers. Where today's fast ones would differ around special
tokens (the space that SentencePiece puts before a text), the slow one's rule is set here.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from internvl.config import UserError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""What a chat model adds to its language model's tokenizer, in this order."""

_SENTENCEPIECE = {"LlamaTokenizer", "InternLM2Tokenizer", "InternLM3Tokenizer"}
_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_NO_CHARACTER = re.compile("[\udc80-\udcff]")
"""What Python makes of bytes that are no UTF-8, one each."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model folder, or None where it has no tokenizer files.

    A `tokenizer.model` alone is Llama's, as InternVL-14B's is.

    Raises:
        UserError: tokenizer files of a kind that is not known, or files that do not belong
            together.
    """
    config = _read(folder / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if (folder / "tokenizer.model").is_file() and (kind in _SENTENCEPIECE or not config):
        return _load_sentencepiece(folder, config, kind or "LlamaTokenizer")
    if (folder / "tokenizer.json").is_file():
        # Names that a processor reads (`video_token` …) would become tokens without a row.
        named = isinstance(config.get("extra_special_tokens"), dict)
        extra: dict[str, Any] = {"extra_special_tokens": {}} if named else {}
        return PreTrainedTokenizerFast.from_pretrained(folder, **extra)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Qwen2Tokenizer.from_pretrained(folder)
    if not config:
        return None
    raise UserError(
        f"{folder}: tokenizer of class {kind!r} without tokenizer.json, vocab.json or a known "
        "tokenizer.model; copy the tokenizer files of the release there"
    )


def _load_sentencepiece(folder: Path, config: dict[str, Any], kind: str) -> PreTrainedTokenizerFast:
    """SentencePiece files through the Llama tokenizer, with the slow tokenizer's leading spaces.

    Slow tokenizers cut a text at its special tokens and hand each piece to SentencePiece, which
    puts a space before it if the model file says so (InternLM2's says no). Llama's with
    `legacy=False` (Phi-3) does so at the start of the text only.
    """
    tokenizer = LlamaTokenizer.from_pretrained(
        folder,
        add_bos_token=config.get("add_bos_token", True),
        add_eos_token=False,
        add_prefix_space=False,
    )
    added = _added_tokens(folder, config)
    if any(tokenizer.convert_tokens_to_ids(entry["content"]) != entry["id"] for entry in added):
        tokenizer = _with_ids(tokenizer, added)
    replace = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = replace
    if _adds_space(folder / "tokenizer.model"):
        steps.append(decoders.Strip(content=" ", left=1))
        if kind == "LlamaTokenizer" and config.get("legacy") is False:
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement=_SPACE, prepend_scheme="first", split=False
            )
        else:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    backend.decoder = decoders.Sequence(steps)
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that a release adds to its SentencePiece model, with the ids it gives them."""
    named = config.get("added_tokens_decoder")
    if named is None:
        known = _read(folder / "added_tokens.json")
        named = {number: {"content": token, "special": True} for token, number in known.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [plain | entry | {"id": int(number)} for number, entry in named.items()]


def _with_ids(
    tokenizer: PreTrainedTokenizerFast, added: Sequence[dict[str, Any]]
) -> PreTrainedTokenizerFast:
    """The tokenizer with exactly these ids for added tokens.

    InternLM2 gives `<|im_end|>` the id of a piece that its SentencePiece model keeps free; the fast
    tokenizer would append it instead, and so move all that follow.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {entry["content"]: entry["id"] for entry in added}
    replaced = set(tokens.values())
    vocabulary = backend["model"]["vocab"]
    size = len(vocabulary)
    kept = {token: number for token, number in vocabulary.items() if number not in replaced}
    kept |= {token: number for token, number in tokens.items() if number < size}
    backend["model"]["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    others = [
        entry
        for entry in backend["added_tokens"]
        if entry["content"] not in tokens and kept.get(entry["content"]) == entry["id"]
    ]
    backend["added_tokens"] = sorted([*others, *added], key=lambda entry: entry["id"])
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    own = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in own.items() if token in kept},
    )


def _adds_space(model: Path) -> bool:
    """Whether this SentencePiece model puts a space before a text.

    Read off the file: sentencepiece 0.2.2 refuses to run InternLM2's, for a piece with a null.
    """
    file: Any = sentencepiece_model_pb2
    return bool(file.ModelProto.FromString(model.read_bytes()).normalizer_spec.add_dummy_prefix)


def decode(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, skip_special_tokens: bool
) -> str:
    """The text of `ids`, as the original's slow tokenizers give it.

    SentencePiece writes U+FFFD for every byte that is part of no character; the fast decoder
    would for every byte of a run in which one is, and so lose the characters beside it.
    """
    if not _has_byte_pieces(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    added = tokenizer.added_tokens_decoder
    kept = [i for i in ids if not (skip_special_tokens and i in added and added[i].special)]
    raw = bytearray()
    for piece in tokenizer.convert_ids_to_tokens(kept):
        byte = _BYTE_PIECE.fullmatch(piece)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
    text = _NO_CHARACTER.sub("\ufffd", raw.decode(errors="surrogateescape"))
    strips = not tokenizer.backend_tokenizer.decoder.decode([_SPACE])
    return text.removeprefix(" ") if strips else text


def _has_byte_pieces(tokenizer: PreTrainedTokenizerFast) -> bool:
    found = tokenizer.convert_tokens_to_ids("<0x00>")
    return found is not None and found != tokenizer.unk_token_id


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer: any loader gets this pipeline, and a processor its token names."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = _read(file) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "InternVLProcessor",
        "extra_special_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    }
    for key in (
        "auto_map",
        "add_prefix_space",
        "legacy",
        "backend",
        "is_local",
        "local_files_only",
    ):
        config.pop(key, None)
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add what a chat model needs and the tokenizer lacks; the number of tokens added."""
    known = tokenizer.get_vocab()
    new = [token for token in SPECIAL_TOKENS if token not in known]
    return tokenizer.add_tokens(new, special_tokens=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, folder: Path) -> None:
    """Raises UserError where a token's id has no row in the model's embeddings."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer knows ids up to {largest}, the model has {rows} embedding "
            "rows; the tokenizer files are not of this model, take those of its release"
        )


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
