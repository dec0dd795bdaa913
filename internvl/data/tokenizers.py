"""The tokenizer of a checkpoint, from its files alone: none of its Python code runs.

The releases were trained with slow tokenizers. Where today's fast ones would differ around special
tokens (the space that SentencePiece puts before a text), the slow one's rule is set here.
"""

import codecs
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast, Qwen2Tokenizer

from internvl.errors import ModelFolderError, UserError
from internvl.files import describe, first_line, read_object

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""What a chat model adds to its language model's tokenizer, in this order."""

_SENTENCEPIECE = {"LlamaTokenizer", "InternLM2Tokenizer", "InternLM3Tokenizer"}
_SPACE = "▁"
_END_MARK = "\ufdd0"
"""A code point that is no character and never will be."""
_CONTROL = {"<s>", "</s>"}
"""Pieces without text, where they are not special tokens."""
_ADDITIONAL = "additional_special_tokens"
_STRIPS = ("lstrip", "rstrip", "single_word")
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_NO_CHARACTER = re.compile("[\udc80-\udcff]")
"""What Python makes of bytes that are no UTF-8, one each."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model folder, or None where it has no tokenizer files.

    A `tokenizer.model` alone is Llama's, as InternVL-14B's is.

    Raises:
        ModelFolderError: tokenizer files of a kind that is not known, damaged ones, or files that
            do not belong together.
    """
    config = _read(folder / "tokenizer_config.json")
    check_files(folder, config)
    with _without_byte_order_marks(folder) as readable:
        return _load(folder, readable, config)


def _load(folder: Path, readable: Path, config: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of `folder`, whose files are read from `readable`."""
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if (folder / "tokenizer.model").is_file() and (kind in _SENTENCEPIECE or not config):
        with _reading(folder, "tokenizer.model"):
            return _load_sentencepiece(readable, config, kind or "LlamaTokenizer")
    if (folder / "tokenizer.json").is_file():
        # Names that a processor reads (`video_token` …) would become tokens without a row.
        named = isinstance(config.get("extra_special_tokens"), dict)
        extra: dict[str, Any] = {"extra_special_tokens": config.get(_ADDITIONAL) or []}
        with _reading(folder, "tokenizer.json"):
            whole = _END_MARK in _normalizer(folder)
            made = WholeTextTokenizer if whole else PreTrainedTokenizerFast
            return made.from_pretrained(readable, **(extra if named else {}))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        with _reading(folder, "vocab.json and merges.txt"):
            return Qwen2Tokenizer.from_pretrained(readable)
    if not config:
        return None
    raise ModelFolderError(
        f"{folder}: tokenizer of class {kind!r} without tokenizer.json, vocab.json or a known "
        "tokenizer.model; copy the tokenizer files of the release there"
    )


@contextmanager
def _without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """The folder, or a copy of its tokenizer files where one begins with a byte-order mark, which
    `transformers` does not read."""
    present = [folder / name for name in (*_OBJECTS, "tokenizer_config.json", "merges.txt")]
    present = [file for file in present if file.is_file()]
    if not any(_starts_with_mark(file) for file in present):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in present:
            (Path(copy) / file.name).write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
        if (folder / "tokenizer.model").is_file():
            shutil.copy(folder / "tokenizer.model", copy)
        yield Path(copy)


def _starts_with_mark(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(3) == codecs.BOM_UTF8


_OBJECTS = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", "vocab.json")


def check_files(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelFolderError where a tokenizer file is not what its name says, naming it."""
    for name in ("tokenizer.model", "merges.txt"):
        file = folder / name
        if file.is_file() and (meaning := describe(file)):
            raise ModelFolderError(f"{file}: {meaning}")
    trees = {name: _read(folder / name) for name in _OBJECTS}
    for name in ("added_tokens.json", "vocab.json"):
        for token, number in trees[name].items():
            if not _is_id(number):
                raise _wrong(folder / name, token, number, "the number of the token is expected")
    entries = config.get("added_tokens_decoder")
    if entries is not None and not isinstance(entries, dict):
        raise _wrong(folder / "tokenizer_config.json", "added_tokens_decoder", entries, _BY_NUMBER)
    for number, entry in (entries or {}).items():
        if not re.fullmatch(r"\d{1,9}", number) or not _is_token(entry):
            file = folder / "tokenizer_config.json"
            raise _wrong(file, f"added_tokens_decoder.{number}", entry, _BY_NUMBER)
    for name, tree in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", trees["special_tokens_map.json"]),
    ):
        _check_special(folder / name, tree)


_BY_NUMBER = "an object of numbers and their tokens (content, lstrip, rstrip …) is expected"


def _check_special(file: Path, tree: dict[str, Any]) -> None:
    for key in _NAMES:
        value = tree.get(key)
        if value is not None and not isinstance(value, str) and not _is_token(value):
            raise _wrong(file, key, value, "a token is expected")
    entries = tree.get(_ADDITIONAL)
    tokens = entries if isinstance(entries, list) else None
    valid = tokens is not None and all(isinstance(t, str) or _is_token(t) for t in tokens)
    if entries is not None and not valid:
        raise _wrong(file, _ADDITIONAL, entries, "a list of tokens is expected")


def _is_id(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 10**9


def _is_token(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        return False
    flags = (*_STRIPS, "normalized", "special")
    return all(isinstance(entry[flag], bool) for flag in flags if flag in entry)


def _wrong(file: Path, key: str, value: Any, expected: str) -> ModelFolderError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    return ModelFolderError(
        f"{file}: {key} is {shown}, {expected}; copy the file again from the release"
    )


@contextmanager
def _reading(folder: Path, names: str) -> Iterator[None]:
    """What the tokenizer libraries say of damaged files, as one sentence that names them.

    Raises:
        ModelFolderError: in place of any other exception.
    """
    try:
        yield
    except ModelFolderError:
        raise
    # Rust's parsers panic, with an exception that is no Exception; the libraries raise anything.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFolderError(
            f"{folder}: no tokenizer can be made of {names} there ({type(error).__name__}: "
            f"{first_line(error)}); copy the tokenizer files of the release there again"
        ) from error


class WholeTextTokenizer(PreTrainedTokenizerFast):
    """SentencePiece with `legacy: false` (Phi-3): one "▁" before a whole text, none before a piece.

    The slow tokenizer puts "▁" before a text, cuts it at the added tokens, and drops the "▁" again
    if a special token comes next. The backend's normalizer does all of that, so that an export does
    too, but for one case: to a normalizer a text that is one added token looks like the content of
    that token. Such a text gets an end mark here, which the normalizer removes.
    """

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        return super()._encode_plus(self._marked(text), text_pair, **kwargs)

    def _marked(self, text: Any) -> Any:
        if isinstance(text, list | tuple):
            return [self._marked(entry) for entry in text]
        if not isinstance(text, str) or text not in self.added_tokens_encoder:
            return text
        normalized = self.backend_tokenizer.normalizer.normalize_str(text + _END_MARK)
        # A special token takes no "▁", so that its text stays as it is.
        return text + _END_MARK if normalized == _SPACE + text else text


def _load_sentencepiece(folder: Path, config: dict[str, Any], kind: str) -> PreTrainedTokenizerFast:
    """SentencePiece files through the Llama tokenizer, with the slow tokenizer's leading spaces.

    Slow tokenizers cut a text at its added tokens and hand each piece to SentencePiece, which
    puts a space before it if the model file says so (InternLM2's says no). Llama's with
    `legacy=False` (Phi-3) does so at the start of the text only.
    """
    # Read off the file: sentencepiece 0.2.2 refuses to run InternLM2's, for a piece with a null.
    file: Any = sentencepiece_model_pb2
    model = file.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    if model.trainer_spec.model_type != file.TrainerSpec.BPE:
        raise ModelFolderError(
            f"{folder / 'tokenizer.model'}: a SentencePiece model of another type than BPE, which "
            "no InternVL has; copy the tokenizer.model of the release there"
        )
    spaced = bool(model.normalizer_spec.add_dummy_prefix)
    whole = spaced and kind == "LlamaTokenizer" and config.get("legacy") is False
    special = _special_tokens(folder, config)
    core = _core(folder, model, _added_tokens(folder, config, special), normalized=whole)
    known = core.get_vocab()
    named = {name: str(special[name][0]) for name in special if name != _ADDITIONAL}
    made = (WholeTextTokenizer if whole else PreTrainedTokenizerFast)(
        tokenizer_object=core,
        add_bos_token=bool(config.get("add_bos_token", True)),
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length"),
        extra_special_tokens=[str(t) for t in special[_ADDITIONAL] if str(t) in known],
        **{name: token for name, token in named.items() if token in known},
    )
    _set_spaces(made, spaced)
    return made


def _set_spaces(tokenizer: PreTrainedTokenizerFast, spaced: bool) -> None:
    """Where "▁" is put before a text or its pieces, and taken away from a decoded text."""
    backend = tokenizer.backend_tokenizer
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaced:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    backend.pre_tokenizer = None
    replace = normalizers.Replace(" ", _SPACE)
    if isinstance(tokenizer, WholeTextTokenizer):
        _mark_whole_texts(tokenizer)
    elif spaced:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    else:
        backend.normalizer = replace


def _mark_whole_texts(tokenizer: WholeTextTokenizer, new: Sequence[str] = ()) -> None:
    """The normalizer of `WholeTextTokenizer` for its added tokens, and for `new` ones to come.

    All of its added tokens are "normalized", so that it sees a text before it is cut. It leaves
    their own content alone, and the spaces to the pre-tokenizer: a token that strips white space
    would not know "▁" for it.
    """
    special = set(tokenizer.all_special_tokens)
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    others = [content for content in [*added, *new] if content not in special]
    dropping = []
    for content in sorted(special & set(added), key=len, reverse=True):
        # "<img>" drops the mark, but not where a longer token "<img>x" stands.
        longer = [o[len(content) :] for o in others if o.startswith(content) and o != content]
        unless = f"(?!{_any_of(longer)})" if longer else ""
        dropping.append((r"\s*" if added[content].lstrip else "") + re.escape(content) + unless)
    alone = rf"(?:{_any_of(others)})\z|" if others else ""
    behind = "|".join(rf"\A{_SPACE}{re.escape(content)}" for content in others) or r"\A\z"
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(_SPACE, " "),
            normalizers.Prepend(_SPACE),
            normalizers.Replace(Regex(rf"\A{_SPACE}(?={alone}{'|'.join(dropping) or '(?!)'})"), ""),
            normalizers.Replace(Regex(rf"(?<={behind}){_END_MARK}\z"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="never", split=False
    )


def _any_of(contents: Iterable[str]) -> str:
    return "|".join(re.escape(content) for content in contents)


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, list[AddedToken]]:
    """The special tokens by name ("bos_token" …), as the slow Llama tokenizer knows them.

    `special_tokens_map.json` counts where `tokenizer_config.json` lists no added tokens.
    """
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    if config.get("added_tokens_decoder") is None:
        values |= _read(folder / "special_tokens_map.json")
        values[_ADDITIONAL] = [*(config.get(_ADDITIONAL) or ()), *(values.get(_ADDITIONAL) or ())]
    named = {name: [values[name]] for name in _NAMES if values.get(name) is not None}
    named[_ADDITIONAL] = list(values.get(_ADDITIONAL) or ())
    return {name: [_token(value) for value in entries] for name, entries in named.items()}


def _token(value: str | dict[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return AddedToken(
        value["content"],
        special=True,
        normalized=False,
        **{key: bool(value.get(key)) for key in _STRIPS},
    )


def _added_tokens(
    folder: Path, config: dict[str, Any], special: dict[str, list[AddedToken]]
) -> list[dict[str, Any]]:
    """The tokens that a release adds to its SentencePiece model, with the ids it gives them; id
    None for special tokens that it lists without one."""
    named = config.get("added_tokens_decoder")
    if named is None:
        known = _read(folder / "added_tokens.json")
        named = {number: {"content": token, "special": True} for token, number in known.items()}
    plain = dict.fromkeys(_STRIPS, False)
    added = [plain | entry | {"id": int(number)} for number, entry in named.items()]
    listed = {entry["content"] for entry in added}
    for token in (token for tokens in special.values() for token in tokens):
        if token.content not in listed:
            flags = {key: getattr(token, key) for key in plain}
            added.append({"content": token.content, "special": True, "id": None, **flags})
            listed.add(token.content)
    return added


def _core(
    folder: Path, model: Any, added: Sequence[dict[str, Any]], *, normalized: bool
) -> Tokenizer:
    """SentencePiece's pieces and merges, and the added tokens with exactly their ids.

    InternLM2 gives `<|im_end|>` the id of a piece that its SentencePiece model keeps free; the fast
    tokenizer would append it instead, and so move all that follow.

    Args:
        normalized: whether added tokens are looked for in the normalized text. The slow tokenizers
            know no such thing, so that what the files say of it does not count.

    Raises:
        ModelFolderError: ids that no tokenizer gives, for some before them are left out.
    """
    tokens = {entry["content"]: entry["id"] for entry in added if entry["id"] is not None}
    replaced = set(tokens.values())
    pieces = {p.piece: n for n, p in enumerate(model.pieces) if n not in replaced}
    pieces |= {token: n for token, n in tokens.items() if n < len(model.pieces)}
    core = Tokenizer(
        models.BPE(vocab=pieces, merges=_merges(model, pieces), fuse_unk=True, byte_fallback=True)
    )
    defined = [p.piece for p in model.pieces if p.type == p.USER_DEFINED and p.piece in pieces]
    entries = [
        *({"content": p, "id": pieces[p], "special": False} for p in defined if p not in tokens),
        *added,
    ]
    last = len(model.pieces) + len(entries)
    for entry in sorted(entries, key=lambda e: last if e["id"] is None else e["id"]):
        flags = {key: entry[key] for key in (*_STRIPS, "special") if key in entry}
        core.add_tokens([AddedToken(entry["content"], normalized=normalized, **flags)])
        if entry["id"] is not None and core.token_to_id(entry["content"]) != entry["id"]:
            raise ModelFolderError(
                f"{folder}: the added token {entry['content']} has id {entry['id']}, but ids below "
                "it are missing; copy the tokenizer files of the release there again"
            )
    return core


def _merges(model: Any, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Merges in the order of SentencePiece's scores; `transformers` has that of the ids.

    They differ in Llama's vocabulary, where runs of spaces come first and score last. Of pairs with
    one score SentencePiece merges the leftmost, for which there is no fixed order: exact for runs
    (the longest left part first); of other pairs that with the mark of a word's start comes first.
    """
    scored = []
    for piece in model.pieces:
        text = piece.piece
        if piece.type != piece.NORMAL or text not in pieces:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                order = (piece.score, left.startswith(_SPACE), cut, len(right))
                scored.append((order, left, right))
    scored.sort(key=lambda entry: entry[0], reverse=True)
    return [(left, right) for _, left, right in scored]


def decode(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, skip_special_tokens: bool
) -> str:
    """The text of `ids`, as the original's slow tokenizers give it.

    SentencePiece writes U+FFFD for every byte that is part of no character; the fast decoder
    would for every byte of a run in which one is, and so lose the characters beside it. Ids without
    a token, which a model with more rows than its tokenizer may generate, have no text.
    """
    if not _has_byte_pieces(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    # The fast decoder leaves these out itself.
    ids = [i for i in ids if tokenizer.backend_tokenizer.id_to_token(i) is not None]
    if not tokenizer.backend_tokenizer.decoder.decode([_SPACE]):
        return _llama_text(tokenizer, ids, skip_special_tokens)
    added = tokenizer.added_tokens_decoder
    kept = [i for i in ids if not (skip_special_tokens and i in added and added[i].special)]
    return _joined(tokenizer.convert_ids_to_tokens(kept))


def _llama_text(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], skip_special_tokens: bool
) -> str:
    """What the slow Llama tokenizer decodes: texts between added tokens, joined by spaces.

    Only bos, eos, unk, pad and the additional special tokens are skipped, not every added token
    that is called special (Phi-3's `<|user|>` is not).
    """
    special = set(tokenizer.all_special_tokens)
    added = tokenizer.added_tokens_decoder
    extra = set(tokenizer.extra_special_tokens)
    texts: list[str] = []
    pending: list[str] = []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if skip_special_tokens and token in special:
            continue
        appended = token in extra and number >= tokenizer.vocab_size
        if number not in added or (token in special and not appended):
            pending.append(token)
            continue
        if pending and (text := _between(pending, special, tokenizer)):
            texts.append(text)
        pending = []
        texts.append(token)
    return " ".join([*texts, _between(pending, special, tokenizer)] if pending else texts)


def _between(tokens: Sequence[str], special: set[str], tokenizer: PreTrainedTokenizerFast) -> str:
    """Text of a run of tokens, special ones among them, without its leading space.

    Without `legacy: false` every run between special tokens loses one more, and a space comes
    before a special token.
    """
    legacy = not isinstance(tokenizer, WholeTextTokenizer)
    text, pieces = "", [tokens[0].removeprefix(_SPACE), *tokens[1:]]
    run: list[str] = []
    for number, piece in enumerate(pieces):
        if piece not in special:
            run += [] if piece in _CONTROL else [piece]
            continue
        if legacy and number and pieces[number - 1] not in special:
            text += " "
        text += _joined(run, strip=legacy) + piece
        run = []
    return text + _joined(run, strip=legacy)


def _joined(pieces: Sequence[str], *, strip: bool = False) -> str:
    """The text of SentencePiece pieces; `strip` takes one space off the first that has any text."""
    raw = bytearray()
    for piece in pieces:
        byte = _BYTE_PIECE.fullmatch(piece)
        if strip and piece:
            strip, piece = False, piece.removeprefix(_SPACE)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
    return _NO_CHARACTER.sub("\ufffd", raw.decode(errors="surrogateescape"))


def _has_byte_pieces(tokenizer: PreTrainedTokenizerFast) -> bool:
    found = tokenizer.convert_tokens_to_ids("<0x00>")
    return found is not None and found != tokenizer.unk_token_id


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer: any loader gets this pipeline, and a processor its token names."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = _read(file) | {
        # Beside the names below, which are the processor's: `decode` skips these.
        _ADDITIONAL: [str(token) for token in tokenizer.extra_special_tokens],
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
    whole = isinstance(tokenizer, WholeTextTokenizer)
    if whole:
        _mark_whole_texts(tokenizer, new)
    tokens = [AddedToken(token, special=True, normalized=whole) for token in new]
    return tokenizer.add_tokens(tokens, special_tokens=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, folder: Path) -> None:
    """Raises UserError where a token's id has no row in the model's embeddings."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer knows ids up to {largest}, the model has {rows} embedding "
            "rows; the tokenizer files are not of this model, take those of its release"
        )


def _normalizer(folder: Path) -> str:
    """The normalizer of `tokenizer.json`, as text."""
    normalizer = _read(folder / "tokenizer.json").get("normalizer")
    return json.dumps(normalizer, ensure_ascii=False)


def _read(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
