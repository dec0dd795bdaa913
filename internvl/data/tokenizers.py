"""Loads the tokenizer of a checkpoint from its files, without running its Python code.

The releases were trained with slow tokenizers. If today's fast ones differ around special tokens
(the space that SentencePiece puts before a text), the slow one's rule is set here.
"""

import codecs
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast, Qwen2Tokenizer

from internvl.errors import ModelFolderError, UserError
from internvl.files import FolderReader, describe_head, first_line, read_object

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""Tokens that a chat model adds to its language model's tokenizer, in this order."""

_SENTENCEPIECE = {"LlamaTokenizer", "InternLM2Tokenizer", "InternLM3Tokenizer"}
_SPACE = "▁"
_END_MARK = "\ufdd0"
"""A code point that is no character and never will be."""
_CONTROL = {"<s>", "</s>"}
"""Pieces that decode to no text, unless they are special tokens."""
_ADDITIONAL = "additional_special_tokens"
_STRIPS = ("lstrip", "rstrip", "single_word")
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's byte fallback: a piece for every byte of characters outside its vocabulary."""
_NO_CHARACTER = re.compile("[\udc80-\udcff]")
"""Lone surrogates, one for each byte that is no UTF-8 (`errors="surrogateescape"`)."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """Loads the tokenizer of a model folder; None if it has no tokenizer files.

    A `tokenizer.model` alone is Llama's, as InternVL-14B's is.

    Raises:
        ModelFolderError: tokenizer files that are unknown, damaged, or of different tokenizers.
    """
    # Not kept: the parsed vocabulary takes tens of MB, and is of no use once the tokenizer exists.
    reader = FolderReader(folder)
    check_files(reader)
    return _load(reader)


def _load(reader: FolderReader) -> PreTrainedTokenizerFast | None:
    folder, config = reader.folder, reader.object(_CONFIG)
    class_name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    # Before tokenizer.json, a conversion of it that may have the fast tokenizer's spaces.
    if (folder / _SENTENCEPIECE_FILE).is_file() and (class_name in _SENTENCEPIECE or not config):
        with _as_folder_error(folder, _SENTENCEPIECE_FILE):
            return _load_sentencepiece(reader, class_name or "LlamaTokenizer")
    if (folder / "tokenizer.json").is_file():
        # Names that a processor reads (`video_token` …) would become tokens without a row.
        named = isinstance(config.get("extra_special_tokens"), dict)
        extra: dict[str, Any] = {"extra_special_tokens": config.get(_ADDITIONAL) or []}
        with _as_folder_error(folder, "tokenizer.json"):
            # An export of a WholeTextTokenizer, known by its normalizer: the class is not saved.
            normalizer = reader.object("tokenizer.json").get("normalizer")
            whole = _END_MARK in json.dumps(normalizer, ensure_ascii=False)
            tokenizer_class = WholeTextTokenizer if whole else PreTrainedTokenizerFast
            with _without_byte_order_marks(reader) as readable:
                kwargs = _NOT_MISTRAL | (extra if named else {})
                return tokenizer_class.from_pretrained(readable, **kwargs)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        with (
            _as_folder_error(folder, "vocab.json and merges.txt"),
            _without_byte_order_marks(reader) as readable,
        ):
            return Qwen2Tokenizer.from_pretrained(readable, **_NOT_MISTRAL)
    if not config:
        return None
    raise ModelFolderError(
        f"{folder}: tokenizer of class {class_name!r} without tokenizer.json, vocab.json or a "
        "known tokenizer.model; copy the tokenizer files of the release there"
    )


@contextmanager
def _without_byte_order_marks(reader: FolderReader) -> Iterator[Path]:
    """Yields the folder, or a copy of its tokenizer files without their byte-order marks."""
    # `transformers` does not read files that begin with one, and takes no contents but a folder.
    names = (*_OBJECTS, _CONFIG, "merges.txt")
    contents = [reader.content(name) or b"" for name in names]
    if not any(content.startswith(codecs.BOM_UTF8) for content in contents):
        yield reader.folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in (*names, _SENTENCEPIECE_FILE, "chat_template.jinja"):
            content = reader.content(name)
            if content is not None:
                (Path(copy) / name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
        yield Path(copy)


_NOT_MISTRAL: dict[str, Any] = {"fix_mistral_regex": False}
"""Stops transformers from taking a vocabulary above 100,000 tokens for Mistral's, with a warning of
wrong tokens, if config.json names no version of transformers, as that of an official export."""
_CONFIG, _SENTENCEPIECE_FILE = "tokenizer_config.json", "tokenizer.model"
_OBJECTS = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", "vocab.json")


def check_files(reader: FolderReader) -> None:
    """Raises ModelFolderError that names the first tokenizer file with wrong content."""
    # Checked first: the libraries' own errors name neither the file nor the key.
    folder, config = reader.folder, reader.object(_CONFIG)
    for name in (_SENTENCEPIECE_FILE, "merges.txt"):
        content = reader.content(name)
        if content is not None and (meaning := describe_head(content[:1024])):
            raise ModelFolderError(f"{folder / name}: {meaning}")
    trees = {name: reader.object(name) for name in _OBJECTS}
    for name in ("added_tokens.json", "vocab.json"):
        for token, token_id in trees[name].items():
            if not _is_id(token_id):
                raise _wrong(folder / name, token, token_id, "the number of the token is expected")
    entries = config.get("added_tokens_decoder")
    if entries is not None and not isinstance(entries, dict):
        raise _wrong(folder / "tokenizer_config.json", "added_tokens_decoder", entries, _BY_NUMBER)
    for token_id, entry in (entries or {}).items():
        # Nine digits fit the 32 bits of an id in `tokenizers`.
        if not re.fullmatch(r"\d{1,9}", token_id) or not _is_token(entry):
            file = folder / "tokenizer_config.json"
            raise _wrong(file, f"added_tokens_decoder.{token_id}", entry, _BY_NUMBER)
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


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


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
def _as_folder_error(folder: Path, names: str) -> Iterator[None]:
    """Turns any exception of the tokenizer libraries into one that names the files.

    Raises:
        ModelFolderError: in place of the exception.
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
    if a special token comes next. The backend's normalizer does the same, so exports do too.
    """

    # One case is left to this class: to a normalizer, a text that is one added token looks like
    # the content of that token. Such a text gets an end mark here, which the normalizer removes.

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


def _load_sentencepiece(reader: FolderReader, class_name: str) -> PreTrainedTokenizerFast:
    """Loads SentencePiece files as a fast tokenizer with the slow tokenizer's leading spaces."""
    # Read off the file: sentencepiece 0.2.2 refuses to run InternLM2's, for a piece with a null.
    file: Any = sentencepiece_model_pb2
    folder, config = reader.folder, reader.object(_CONFIG)
    model = file.ModelProto.FromString(reader.content(_SENTENCEPIECE_FILE))
    if model.trainer_spec.model_type != file.TrainerSpec.BPE:
        raise ModelFolderError(
            f"{folder / 'tokenizer.model'}: a SentencePiece model of another type than BPE, which "
            "no InternVL has; copy the tokenizer.model of the release there"
        )
    # Slow tokenizers cut a text at its added tokens and hand each piece to SentencePiece, which
    # puts a space before it if the model file says so (InternLM2's says no). Llama's with
    # `legacy=False` (Phi-3) does so at the start of the text only.
    spaced = bool(model.normalizer_spec.add_dummy_prefix)
    whole = spaced and class_name == "LlamaTokenizer" and config.get("legacy") is False
    special = _special_tokens(reader)
    core = _core(folder, model, _added_tokens(reader, special), normalized=whole)
    vocab = core.get_vocab()
    named = {name: str(special[name][0]) for name in special if name != _ADDITIONAL}
    # Tokens outside the vocabulary are left out: the constructor would append them as new ids.
    tokenizer = (WholeTextTokenizer if whole else PreTrainedTokenizerFast)(
        tokenizer_object=core,
        add_bos_token=bool(config.get("add_bos_token", True)),
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length"),
        extra_special_tokens=[str(t) for t in special[_ADDITIONAL] if str(t) in vocab],
        **{name: token for name, token in named.items() if token in vocab},
    )
    _set_spaces(tokenizer, spaced)
    return tokenizer


def _set_spaces(tokenizer: PreTrainedTokenizerFast, spaced: bool) -> None:
    """Sets where "▁" is put before a text or its pieces, and removed from a decoded text."""
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
    """Sets the normalizer of a WholeTextTokenizer for its added tokens and for `new` ones."""
    # All of its added tokens are "normalized", so that the normalizer sees a text before it is
    # cut. It leaves their own content alone, and the spaces to the pre-tokenizer: a token that
    # strips white space would not know "▁" for it.
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


def _special_tokens(reader: FolderReader) -> dict[str, list[AddedToken]]:
    """Returns special tokens by name ("bos_token" …), with the slow Llama tokenizer's defaults."""
    config = reader.object(_CONFIG)
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    # `transformers` reads special_tokens_map.json only if the config lists no added tokens.
    if config.get("added_tokens_decoder") is None:
        values |= reader.object("special_tokens_map.json")
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
    reader: FolderReader, special: dict[str, list[AddedToken]]
) -> list[dict[str, Any]]:
    """Lists the tokens that a release adds to its SentencePiece model, with their ids; id None for
    special tokens without one."""
    by_id = reader.object(_CONFIG).get("added_tokens_decoder")
    if by_id is None:
        ids_by_token = reader.object("added_tokens.json")
        by_id = {i: {"content": token, "special": True} for token, i in ids_by_token.items()}
    plain = dict.fromkeys(_STRIPS, False)
    added = [plain | entry | {"id": int(token_id)} for token_id, entry in by_id.items()]
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
    """Builds SentencePiece's pieces and merges, and the added tokens with exactly their ids.

    Args:
        normalized: True matches added tokens in the normalized text. The flag in the files is
            ignored: the slow tokenizers do not know it.

    Raises:
        ModelFolderError: added ids with a gap before them.
    """
    # InternLM2 gives `<|im_end|>` the id of a piece that its SentencePiece model keeps free; the
    # fast tokenizer would append it instead, and so move all that follow.
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
    """Lists BPE merges in the order of SentencePiece's scores."""
    # Not in the order of ids, as `transformers` has it: in Llama's vocabulary runs of spaces come
    # first and score last. Of pairs with one score SentencePiece merges the leftmost, for which
    # there is no fixed order: exact for runs (the longest left half first); of other pairs that
    # with the mark of a word's start comes first.
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
    """Decodes `ids` to text as the original's slow tokenizers do.

    Ids without a token have no text; a model with more rows than its tokenizer may generate them.
    """
    # SentencePiece writes U+FFFD for every byte that is part of no character; the fast decoder
    # would for every byte of a run in which one is, and so lose the characters beside it.
    if not _has_byte_pieces(tokenizer):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    # The fast decoder leaves these out itself.
    ids = [i for i in ids if tokenizer.backend_tokenizer.id_to_token(i) is not None]
    if not tokenizer.backend_tokenizer.decoder.decode([_SPACE]):
        return _llama_text(tokenizer, ids, skip_special_tokens)
    added = tokenizer.added_tokens_decoder
    ids = [i for i in ids if not (skip_special_tokens and i in added and added[i].special)]
    return _joined(tokenizer.convert_ids_to_tokens(ids))


def _llama_text(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], skip_special_tokens: bool
) -> str:
    """Decodes as the slow Llama tokenizer: texts between added tokens, joined by spaces."""
    # Only bos, eos, unk, pad and the additional special tokens are skipped, not every added token
    # that is called special (Phi-3's `<|user|>` is not).
    special = set(tokenizer.all_special_tokens)
    added = tokenizer.added_tokens_decoder
    extra = set(tokenizer.extra_special_tokens)
    texts: list[str] = []
    pending: list[str] = []
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if skip_special_tokens and token in special:
            continue
        appended = token in extra and token_id >= tokenizer.vocab_size
        if token_id not in added or (token in special and not appended):
            pending.append(token)
            continue
        if pending and (text := _run_text(pending, special, tokenizer)):
            texts.append(text)
        pending = []
        texts.append(token)
    return " ".join([*texts, _run_text(pending, special, tokenizer)] if pending else texts)


def _run_text(tokens: Sequence[str], special: set[str], tokenizer: PreTrainedTokenizerFast) -> str:
    """Decodes a run of tokens, special ones included, without its leading space."""
    # Without `legacy: false` every run between special tokens loses one more space, and a space
    # comes before a special token.
    legacy = not isinstance(tokenizer, WholeTextTokenizer)
    text, pieces = "", [tokens[0].removeprefix(_SPACE), *tokens[1:]]
    run: list[str] = []
    for index, piece in enumerate(pieces):
        if piece not in special:
            run += [] if piece in _CONTROL else [piece]
            continue
        if legacy and index and pieces[index - 1] not in special:
            text += " "
        text += _joined(run, strip=legacy) + piece
        run = []
    return text + _joined(run, strip=legacy)


def _joined(pieces: Sequence[str], *, strip: bool = False) -> str:
    """Joins SentencePiece pieces to text; `strip` removes the first one's leading space."""
    # As bytes: a character outside the vocabulary is several byte pieces.
    raw = bytearray()
    for piece in pieces:
        byte = _BYTE_PIECE.fullmatch(piece)
        if strip and piece:
            strip, piece = False, piece.removeprefix(_SPACE)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
    return _NO_CHARACTER.sub("\ufffd", raw.decode(errors="surrogateescape"))


def _has_byte_pieces(tokenizer: PreTrainedTokenizerFast) -> bool:
    token_id = tokenizer.convert_tokens_to_ids("<0x00>")
    return token_id is not None and token_id != tokenizer.unk_token_id


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer files of an export, with the token names that a processor needs."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = read_object(file) | {
        # In addition to the processor's names below: `decode` skips these.
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
    # Keys that would run remote code, change spaces, or tell how this tokenizer was loaded.
    for key in (
        "auto_map",
        "add_prefix_space",
        "legacy",
        "backend",
        "is_local",
        "local_files_only",
        *_NOT_MISTRAL,
    ):
        config.pop(key, None)
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Adds the SPECIAL_TOKENS that the tokenizer does not have; returns how many it added."""
    vocab = tokenizer.get_vocab()
    new = [token for token in SPECIAL_TOKENS if token not in vocab]
    whole = isinstance(tokenizer, WholeTextTokenizer)
    if whole:
        _mark_whole_texts(tokenizer, new)
    tokens = [AddedToken(token, special=True, normalized=whole) for token in new]
    return tokenizer.add_tokens(tokens, special_tokens=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, folder: Path) -> None:
    """Raises UserError if a token's id has no row in the model's embeddings."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer knows ids up to {largest}, the model has {rows} embedding "
            "rows; the tokenizer files are not of this model, take those of its release"
        )
