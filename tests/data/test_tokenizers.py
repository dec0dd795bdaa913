"""Tokenizers from files alone: ids of the originals' slow tokenizers."""

import codecs
import json
import logging
import re
import shutil

import pytest
import sentencepiece
from chat_folders import GOLDEN, large_vocabulary, shared
from mutations import HTML_PAGE, LFS_POINTER
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from internvl.data.tokenizers import (
    SPECIAL_TOKENS,
    add_special_tokens,
    check_vocabulary,
    decode,
    load_tokenizer,
    save_tokenizer,
)
from internvl.errors import ModelFolderError

MASKS = GOLDEN / "label_masks"
PHI3 = GOLDEN / "tokenizer_phi3"
"""SentencePiece with `legacy: false`, and what the slow tokenizer makes of texts (slow.json)."""
MARKS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<img>", "<IMG_CONTEXT>", "</img>"]


def golden_ids(name: str) -> dict[str, list[int]]:
    return json.loads((MASKS / f"encode_{name}.json").read_text())["ids"]


def copy(name: str, to, without=()):
    shutil.copytree(MASKS / f"tokenizer_{name}", to)
    for file in without:
        (to / file).unlink()
    return to


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("internlm2", ()),
        ("internlm2", ("tokenizer.json",)),
        ("internlm2", ("tokenizer.json", "added_tokens.json", "special_tokens_map.json")),
        ("internlm2", ("tokenizer.model",)),
        ("qwen2", ()),
        ("qwen2", ("tokenizer.json",)),
        ("qwen2", ("vocab.json", "merges.txt")),
    ],
)
def test_golden_ids(name, without, tmp_path):
    tokenizer = load_tokenizer(copy(name, tmp_path / "folder", without))
    wanted = golden_ids(name)
    found = {text: tokenizer(text, verbose=False).input_ids for text in wanted}
    assert found == wanted


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    before = load_tokenizer(copy(name, tmp_path / "before"))
    (tmp_path / "after").mkdir()
    save_tokenizer(before, tmp_path / "after")
    after = load_tokenizer(tmp_path / "after")
    assert len(after) == len(before)
    for text, wanted in golden_ids(name).items():
        assert after(text, verbose=False).input_ids == wanted
        assert after.decode(wanted) == before.decode(wanted)


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory):
    """A SentencePiece model like Llama's, Yi's and Phi-3's: a space is put before a text."""
    folder = tmp_path_factory.mktemp("llama")
    texts = [re.sub(r"<[^ >]*>", "", text) for text in golden_ids("qwen2")]
    (folder / "corpus.txt").write_text("\n".join(texts * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def slow_ids(model: sentencepiece.SentencePieceProcessor, text: str, *, legacy: bool) -> list[int]:
    """Cut at added tokens, then SentencePiece; a mark before every piece, or one before the text.

    None of the added tokens is a special one here, so that the mark stays before them.
    """
    ids = [1]
    for piece in re.split(
        "(" + "|".join(map(re.escape, MARKS)) + ")", text if legacy else "▁" + text
    ):
        if piece in MARKS:
            ids.append(model.get_piece_size() + MARKS.index(piece))
        elif piece and legacy:
            ids += model.encode(piece)
        elif piece:  # the space is put before an anchor instead, which is then cut off
            ids += model.encode("<unk>" + piece)[len(model.encode("<unk>")) :]
    return ids


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_like_models_get_the_slow_tokenizers_spaces(legacy, llama_model, tmp_path):
    shutil.copy(llama_model, tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_model))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(model.get_piece_size() + i): {"content": mark, "special": True, **flags}
        for i, mark in enumerate(MARKS)
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": added,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    texts = [*golden_ids("qwen2"), "two  spaces", "<|user|>\nhi<|im_end|>\n<img> x</img>  y"]
    for text in texts:
        assert tokenizer(text, verbose=False).input_ids == slow_ids(model, text, legacy=legacy), (
            text
        )


@pytest.fixture(scope="module", params=["legacy_false", "legacy_true"])
def phi3(request, tmp_path_factory):
    """(folder like Phi-3's, {text: ids and texts of the slow tokenizer})."""
    folder = tmp_path_factory.mktemp("phi3") / "folder"
    shutil.copytree(PHI3, folder)
    rows = json.loads((folder / "slow.json").read_text())[request.param]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["legacy"] = request.param == "legacy_true"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, rows


def test_ids_and_texts_of_the_slow_llama_tokenizer(phi3, tmp_path):
    """207 texts: special tokens at any place, leading spaces, marks, emoji, one token alone."""
    folder, rows = phi3
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path)
    saved = load_tokenizer(tmp_path)
    for text, (ids, without_special, whole) in rows.items():
        for each in (tokenizer, saved):
            assert each(text, verbose=False).input_ids == ids, text
            assert decode(each, ids, skip_special_tokens=True) == without_special
            assert decode(each, ids, skip_special_tokens=False) == whole
    assert tokenizer(list(rows)[:20]).input_ids == [ids for ids, *_ in list(rows.values())[:20]]
    encoded = tokenizer("<|end|>", return_offsets_mapping=True, add_special_tokens=False)
    assert encoded.offset_mapping[-1] == (0, 7)


def test_other_programs_read_the_saved_tokenizer_alike(phi3, tmp_path):
    """But for texts that are one added token and nothing else."""
    folder, rows = phi3
    save_tokenizer(load_tokenizer(folder), tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    differing = [text for text, (ids, *_) in rows.items() if plain(text).input_ids != ids]
    alone = [token.content for token in plain.added_tokens_decoder.values()]
    assert set(differing) <= set(alone)


def test_tokens_added_later_are_cut_like_those_of_the_release(tmp_path):
    """As the original adds them to the slow tokenizer of a language model."""
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(PHI3 / file, tmp_path)
    config = json.loads((PHI3 / "tokenizer_config.json").read_text())
    entries = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {i: e for i, e in entries if int(i) < 525}
    config.pop("additional_special_tokens")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert add_special_tokens(tokenizer) == 9
    # "<img>" is now an added token that is none of the special ones: the mark stays before it.
    assert tokenizer("<img>Hi").input_ids == [1, 390, 525, 426, 394]
    assert tokenizer("<img>").input_ids == [1, 390, 525]
    assert tokenizer("Hi<img>Hi").input_ids == [1, 293, 394, 525, 426, 394]


def test_merges_follow_sentencepieces_scores(llama_model, tmp_path):
    """Llama's vocabulary has the runs of spaces first and scores them last."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(llama_model.read_bytes())
    for length in (2, 3, 4, 5):
        piece = proto.pieces.add()
        piece.piece, piece.score = "▁" * length, -1e9
    proto.pieces.insert(259, proto.pieces.pop(len(proto.pieces) - 4))  # a pair of spaces, early
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    for text in (*("a" + " " * n + "dog" for n in range(12)), "  dog", "\n    the   cat", "x  "):
        assert tokenizer(text).input_ids == [1, *model.encode(text)], text


def test_decoding_as_sentencepiece_does(llama_model, tmp_path):
    """Characters, broken characters between whole ones, and the space before a text."""
    shutil.copy(llama_model, tmp_path)
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False}
    added = {"1": {"content": "<s>", **flags}}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_model))
    raw = ["é☂ 7".encode(), b"\xe6\x97\x37\xe6\x97\xa5", b"a\xff\xffb", b"\xe6"]
    rows = [model.encode(text) for text in golden_ids("qwen2")]
    rows += [[model.piece_to_id(f"<0x{byte:02X}>") for byte in row] for row in raw]
    for ids in rows:
        found = decode(tokenizer, [1, *ids], skip_special_tokens=True)
        assert found == model.decode(ids)


@pytest.mark.parametrize("skip", [True, False])
def test_ids_beyond_the_tokenizer_have_no_text(skip, phi3, llama_model, tmp_path):
    """A model may have more rows than its tokenizer has tokens: the text is that of the others."""
    shutil.copy(llama_model, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    folders = [(GOLDEN / "label_masks" / f"tokenizer_{n}", None) for n in ("internlm2", "qwen2")]
    for folder, form in (*folders, (phi3[0], None), (tmp_path, "Llama"), (tmp_path, "InternLM2")):
        if form:
            config.write_text(json.dumps({"tokenizer_class": f"{form}Tokenizer"}))
        tokenizer = load_tokenizer(folder)
        ids = tokenizer("one <img> two").input_ids
        text = decode(tokenizer, ids, skip_special_tokens=skip)
        assert "two" in text
        beyond = len(tokenizer) + 1000
        mixed = [beyond, *(i for each in ids for i in (each, beyond + 7)), 10**6]
        assert decode(tokenizer, mixed, skip_special_tokens=skip) == text
        assert decode(tokenizer, [beyond], skip_special_tokens=skip) == ""


def free_pieces(folder):
    """An InternLM2-like folder: two free pieces of its model are end and start of a turn."""
    (folder / "corpus.txt").write_text("\n".join(golden_ids("internlm2")) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[UNUSED_0]", "[UNUSED_1]", "[UNUSED_2]"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {token: 480 + number for number, token in enumerate(SPECIAL_TOKENS)}
    ids |= {"<|im_end|>": model.piece_to_id("[UNUSED_1]")}
    ids |= {"<|im_start|>": model.piece_to_id("[UNUSED_2]")}
    return model, ids


@pytest.mark.parametrize("form", ["decoder", "added_tokens.json"])
def test_added_tokens_keep_the_ids_of_the_release(form, tmp_path):
    """Those of free pieces of the model included: InternLM2's end of turn is one."""
    model, ids = free_pieces(tmp_path)
    config = {"tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "pad_token": "</s>"}
    if form == "decoder":
        entries = {str(i): {"content": token, "special": True} for token, i in ids.items()}
        config["added_tokens_decoder"] = entries
    else:
        (tmp_path / form).write_text(json.dumps(ids))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert len(tokenizer) == 489
    text = "<|im_start|>user\n 两只猫<|im_end|><img>[UNUSED_0]"
    wanted = [1, ids["<|im_start|>"], *model.encode("user\n 两只猫"), ids["<|im_end|>"]]
    wanted += [ids["<img>"], model.piece_to_id("[UNUSED_0]")]
    assert tokenizer(text).input_ids == wanted
    assert decode(tokenizer, wanted, skip_special_tokens=False) == "<s>" + text
    assert decode(tokenizer, wanted, skip_special_tokens=True) == "user\n 两只猫[UNUSED_0]"
    (tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(text).input_ids == wanted


def test_internlm2s_own_vocabulary(tmp_path):
    """Its real model file, with the ids that the releases of InternVL2 give the added tokens."""
    shutil.copy(shared("data/tokenizers/internlm2_tokenizer.model"), tmp_path / "tokenizer.model")
    ids = {"<|im_end|>": 92542, "<|im_start|>": 92543}
    ids |= {token: 92544 + number for number, token in enumerate(SPECIAL_TOKENS)}
    entries = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    config = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": entries}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    check_vocabulary(tokenizer, 92553, tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("Hello  world", " 你好，世界 Ｅ——x", "é\U0001f600 …… \n  x"):
        assert tokenizer(text).input_ids == [1, *model.encode(text)]


def test_a_folder_without_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_tokenizer_that_is_not_known(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MambaTokenizer"}')
    with pytest.raises(ValueError, match="'MambaTokenizer'"):
        load_tokenizer(tmp_path)


def test_special_tokens_are_added_once_and_in_order(tmp_path):
    folder = copy("qwen2", tmp_path / "folder", ("added_tokens.json", "special_tokens_map.json"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        if name == "tokenizer.json":
            kept = [t for t in content["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
            content["added_tokens"] = kept
        else:
            for key in ("added_tokens_decoder", "additional_special_tokens"):
                content.pop(key)
        (folder / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    length = len(tokenizer)
    assert add_special_tokens(tokenizer) == 9
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(length, length + 9))
    assert add_special_tokens(tokenizer) == 0


def test_a_byte_order_mark_leaves_the_chat_template(tmp_path):
    folder = copy("qwen2", tmp_path / "folder")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = folder / "tokenizer_config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    assert load_tokenizer(folder).chat_template == "{{ messages }}"


def test_a_large_vocabulary_is_not_taken_for_mistrals(tmp_path, caplog, monkeypatch):
    """As of an official export, whose config.json names no version of transformers."""
    large_vocabulary(tmp_path, "Qwen2Tokenizer")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = load_tokenizer(tmp_path)
    assert not caplog.records
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert "mistral" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    tokenizer = load_tokenizer(copy("qwen2", tmp_path / "folder"))
    check_vocabulary(tokenizer, 572, tmp_path)
    with pytest.raises(ValueError, match="ids up to 571, the model has 500"):
        check_vocabulary(tokenizer, 500, tmp_path)


@pytest.mark.parametrize(
    ("base", "name", "content", "says"),
    [
        ("qwen2", "tokenizer.json", LFS_POINTER, "a Git LFS pointer.*`git lfs pull`"),
        ("qwen2", "tokenizer.json", b"", "empty .0 bytes"),
        ("qwen2", "tokenizer_config.json", HTML_PAGE, "a web page"),
        ("qwen2", "tokenizer_config.json", b'{"a": ', "not JSON"),
        ("qwen2", "tokenizer_config.json", b"[]", "expected an object, found list"),
        ("qwen2", "special_tokens_map.json", b'{"eos_token": 3}', "eos_token is 3, a token is"),
        ("qwen2", "special_tokens_map.json", LFS_POINTER, "a Git LFS pointer"),
        ("qwen2", "added_tokens.json", b'{"<img>": "7"}', "<img> is '7', the number of the token"),
        ("qwen2", "added_tokens.json", LFS_POINTER, "a Git LFS pointer"),
        ("qwen2", "vocab.json", b'{"a": null}', "a is None, the number of the token"),
        ("qwen2", "merges.txt", LFS_POINTER, "a Git LFS pointer"),
        (
            *("qwen2", "tokenizer_config.json"),
            b'{"added_tokens_decoder": [1]}',
            r"added_tokens_decoder is \[1\], an object of numbers",
        ),
        (
            *("qwen2", "tokenizer_config.json"),
            b'{"additional_special_tokens": "<img>"}',
            "additional_special_tokens is '<img>', a list of tokens",
        ),
        ("internlm2", "tokenizer.model", LFS_POINTER, "a Git LFS pointer"),
        ("internlm2", "tokenizer.model", bytes(500), "zero bytes"),
        ("internlm2", "tokenizer.model", b"no model, but text", "no tokenizer can be made"),
    ],
)
def test_files_that_are_not_what_their_name_says(base, name, content, says, tmp_path):
    """Those that hold another thing, and those that hold the wrong values."""
    folder = copy(
        base, tmp_path / "folder", ("tokenizer.json",) if name != "tokenizer.json" else ()
    )
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=says) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{}", b'{"model": {"type": "BPE"}}', b'{"model": 3}'])
def test_a_tokenizer_json_without_a_tokenizer(content, tmp_path):
    folder = copy("qwen2", tmp_path / "folder")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"{folder}: no tokenizer .* tokenizer.json there"):
        load_tokenizer(folder)


@pytest.mark.parametrize("without", [(), ("tokenizer.json",)])
@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_byte_order_marks_are_no_fault(name, without, tmp_path):
    folder = copy(name, tmp_path / "folder", without)
    for file in (*folder.glob("*.json"), *folder.glob("*.txt")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    tokenizer = load_tokenizer(folder)
    for text, ids in golden_ids(name).items():
        assert tokenizer(text, verbose=False).input_ids == ids


def test_an_added_token_whose_id_cannot_be_is_named(tmp_path):
    """Ids below it are missing: it would get another id, and so another row."""
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(PHI3 / file, tmp_path)
    config = json.loads((PHI3 / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["522"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=r"<\|end\|> has id 523, but ids below it"):
        load_tokenizer(tmp_path)
