"""Adapter folders: every setting of PEFT equals PEFT's logits or is refused by name."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import peft_folders
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft_folders import LANGUAGE, QKV, changed_config, difference, loaded, logits, of_peft, renamed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from internvl import export
from internvl.errors import ModelFolderError, UserError
from internvl.inference.opened import open_model
from internvl.models.adapters import fused_lora, lora, merging

EXACT = 1e-5
MONTECLORA = {"num_samples": 2, "buffer_size": 4}
BDLORA = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    "nblocks": 2,
}

HONOURED: dict[str, list[dict[str, Any]]] = {
    "r": [{"r": 3}],
    "target_modules": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": LANGUAGE.replace(r"\d+", "1")},
        {"target_modules": r"model\.vision_tower\..*\.(q_proj|fc1)"},
        {"target_modules": ["linear_1", "projection"]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    ],
    "exclude_modules": [
        {"target_modules": QKV, "exclude_modules": r".*vision_tower.*"},
        {"target_modules": "all-linear", "exclude_modules": ["linear_2"]},
    ],
    "lora_alpha": [{"lora_alpha": 7}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "use_rslora": [{"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 8}}],
    "modules_to_save": [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["multi_modal_projector", "embed_tokens"]},
        {"modules_to_save": ["norm", "self_attn"], "target_modules": ["up_proj"]},
    ],
    "init_lora_weights": [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 5}},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
    ],
    "layers_to_transform": [
        {"target_modules": QKV, "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": QKV, "layers_to_transform": 0},
    ],
    "layers_pattern": [
        {"target_modules": QKV, "layers_to_transform": [0, 3], "layers_pattern": ["layer"]}
    ],
    "rank_pattern": [
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.(up|gate)_proj": 2}},
        {"rank_pattern": {"model.language_model.layers.0.self_attn.v_proj": 6}},
    ],
    "alpha_pattern": [
        {"alpha_pattern": {"q_proj": 64}},
        {"alpha_pattern": {"down_proj": 64, r"^model.language_model.layers.0.mlp.up_proj": 1}},
    ],
    "trainable_token_indices": [
        {"trainable_token_indices": [3, 17, 120]},
        {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [44]}},
    ],
    "use_dora": [
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["embed_tokens", "projection", "q_proj"]},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 8}},
    ],
    "velora_config": [{"velora_config": {"num_groups": 4}}],
    "monteclora_config": [{"monteclora_config": MONTECLORA}],
    "lora_bias": [
        {"lora_bias": True, "target_modules": ["q_proj", "fc1"]},
        {"lora_bias": True, "use_rslora": True},
    ],
    "target_parameters": [
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["layers.1.mlp.up_proj.weight", "o_proj.weight"],
            "rank_pattern": {"o_proj.weight": 2},
            "alpha_pattern": {"up_proj.weight": 3},
        },
    ],
    "use_bdlora": [{"use_bdlora": BDLORA}],
    "kasa_config": [{"kasa_config": {}}],
}
"""Field -> settings with which `load` computes what PEFT computes."""

TIED: list[dict[str, Any]] = [
    {},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"trainable_token_indices": [3, 17, 120]},
    {"trainable_token_indices": {"lm_head": [3, 17, 120]}},
    {"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [3, 17]}},
    {"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [44]}},
    {"use_dora": True, "target_modules": ["embed_tokens"]},
]
"""As HONOURED, where the output matrix is the embeddings'."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "peft_type": ({"peft_type": "LOHA"}, "peft_type = 'LOHA'; only LoRA adapters are read here"),
    "task_type": ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' has a head of its own"),
    "megatron_config": ({"megatron_config": {"a": 1}}, "megatron_config = .* Megatron-LM; set it"),
    "alora_invocation_tokens": (
        {"alora_invocation_tokens": [5, 9]},
        r"alora_invocation_tokens = \[5, 9\] switches the adapter on",
    ),
    "use_qalora": ({"use_qalora": True}, "use_qalora = True is for a base quantized by GPTQ"),
    "layer_replication": (
        {"layer_replication": [[0, 2], [1, 2]]},
        "layer_replication = .* repeats layers of its base",
    ),
    "arrow_config": ({"arrow_config": {"top_k": 2}}, "arrow_config = .* routes each token"),
}
"""Field -> what the configuration says, and the sentence."""

SAME = {
    "auto_mapping": "the class that the base was loaded with",
    "peft_version": "who wrote the folder",
    "base_model_name_or_path": "where the base is: test_the_base_that_is_named",
    "revision": "of a base on the hub: test_the_base_that_is_named",
    "inference_mode": "whether the adapter trains",
    "lora_dropout": "nothing is dropped in evaluation",
    "megatron_core": "read with megatron_config alone",
    "loftq_config": "read with init_lora_weights = loftq alone",
    "eva_config": "read when an adapter is made",
    "corda_config": "read when an adapter is made",
    "lora_ga_config": "read when an adapter is made",
    "qalora_group_size": "read with use_qalora alone",
    "runtime_config": "where PEFT computes; it is not saved",
    "ensure_weight_tying": "which weights are saved twice: TIED",
}
"""Field -> why no value of it changes what an adapter computes, or the test of it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return peft_folders.hf_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return peft_folders.hf_folder(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def ordinary(base, tmp_path_factory) -> Path:
    """An adapter on the language model's layers; copy it before changing it."""
    return peft_folders.write(base, tmp_path_factory.mktemp("ordinary") / "adapter")


@pytest.fixture
def copied(ordinary, tmp_path) -> Path:
    return Path(shutil.copytree(ordinary, tmp_path / "adapter"))


def test_every_field_of_peft_is_in_a_table():
    """A field that a new PEFT brings turns this red: honour it or refuse it, then name it here."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == {*HONOURED, *REFUSED, *SAME}
    assert len(fields) == len(HONOURED) + len(REFUSED) + len(SAME)


CASES = [settings for several in HONOURED.values() for settings in several]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.slow
def test_logits_are_those_of_peft(settings, base, tmp_path):
    folder = peft_folders.write(base, tmp_path / "adapter", **settings)
    adapted, model = peft_folders.with_peft(base, folder), loaded(folder)
    expected = logits(adapted)
    assert difference(logits(model), expected) <= EXACT
    assert difference(expected, logits(peft_folders.plain(base))) > 0.01  # it does something
    check_merged(adapted, model, expected)


@pytest.mark.parametrize("settings", TIED, ids=str)
def test_logits_of_tied_matrices_are_those_of_peft(settings, tied, tmp_path):
    folder = peft_folders.write(tied, tmp_path / "adapter", **settings)
    expected = of_peft(tied, folder)
    model = loaded(folder)
    assert difference(logits(model), expected) <= EXACT
    lazily = dict(merging.MergedState(model))
    merging.merge(model)
    assert difference(logits(model), expected) <= 5e-5
    assert all(torch.equal(value, lazily[name]) for name, value in model.state_dict().items())


def check_merged(adapted: Any, model: Any, expected: torch.Tensor) -> None:
    """Merging gives the weights of PEFT's own, or says why nothing can be merged."""
    try:
        with peft_folders.quiet():
            wanted = adapted.merge_and_unload().state_dict()
    except RuntimeError as error:
        assert "the base layer has no bias" in str(error)  # noqa: PT017 (PEFT's own limit)
        with pytest.raises(UserError, match="the layer itself has none, so that nothing can take"):
            merging.merge(model)
        return
    lazily = {name: value.clone() for name, value in merging.MergedState(model).items()}
    merging.merge(model)
    merged = model.state_dict()
    assert merged.keys() == wanted.keys() == lazily.keys()
    for name, value in merged.items():
        assert difference(value, wanted[name]) <= EXACT, name
        assert torch.equal(value, lazily[name]), name
    assert difference(logits(model), expected) <= 5e-5
    assert not lora.has_adapters(model)


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_are_refused_by_name(field, copied):
    keys, sentence = REFUSED[field]
    changed_config(copied, **keys)
    with pytest.raises(ModelFolderError, match=sentence) as refusal:
        loaded(copied)
    assert str(copied / "adapter_config.json") in str(refusal.value)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"init_lora_weights": "corda"}, "corda' changed the base by statistics"),
        ({"init_lora_weights": "loftq"}, "peft .* cannot use it"),
        ({"use_hadamard": True}, "use_hadamard = True is not known to peft"),
        ({"target_modules": None}, "names no target_modules"),
        ({"target_modules": "("}, "peft .* cannot use it"),
        ({"target_modules": ["k_proj"]}, "is for a layer that adapter_config.json does not name"),
        ({"target_modules": [*QKV, "nothing"]}, "does not name"),
        ({"r": "4"}, "adapter_config.json: r is '4', a whole number from 1 is expected; correct"),
        ({"r": None}, "adapter_config.json: r is None, a whole number from 1 is expected"),
        ({"r": 0}, "r is 0, a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None, a number is expected"),
        ({"lora_dropout": "0"}, "lora_dropout is '0', a number from 0 to 1"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern is .* an object of layers and whole"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .* an object of layers and numbers or null"),
        ({"target_modules": [1]}, r"target_modules is \[1\], a name or a list of names or null"),
        ({"modules_to_save": {}}, "modules_to_save is {}, a name or a list of names"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1', a number of a layer"),
        ({"use_rslora": "false"}, "use_rslora is 'false', true or false or null is expected"),
        ({"r": 8}, r"lora_A.weight is \(4, 64\), and \(8, 64\) is needed .* not of one adapter"),
        ({"bias": "some"}, "bias = 'some'; it is none, all or lora_only"),
        ({"bias": "lora_only"}, "self_attn.q_proj.bias is missing"),
        ({"use_dora": True}, "lora_magnitude_vector is missing, and its layer has adapters"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing, which"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta is missing, which"),
        ({"peft_type": None}, "peft_type = None; only LoRA"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'; only LoRA adapters .*merge_and_unload"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(keys, sentence, copied):
    with pytest.raises(ModelFolderError, match=sentence):
        loaded(changed_config(copied, **keys))


def test_keys_that_peft_does_not_know_have_no_effect_and_are_named(copied, base, caplog):
    expected = of_peft(base, copied)
    changed_config(copied, lora_dtype="float32", new_size=16, use_new=False)
    assert difference(logits(loaded(copied)), expected) <= EXACT
    assert "new_size is not known to peft" in caplog.text
    assert "lora_dtype" not in caplog.text


def test_an_initialisation_that_is_drawn_anew_is_refused(base, tmp_path):
    """Two loadings through PEFT itself differ."""
    folder = peft_folders.write(base, tmp_path / "adapter", init_lora_weights="pissa_niter_1")
    with pytest.raises(ModelFolderError, match="takes another part out of the base each time"):
        loaded(folder)


def test_values_of_an_adapter_of_experts(tmp_path):
    base = peft_folders.experts_folder(tmp_path)
    settings = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
    }
    folder = peft_folders.write(base, tmp_path / "adapter", **settings)
    adapted, model = peft_folders.with_peft(base, folder), loaded(folder)
    expected = logits(adapted)
    assert difference(logits(model), expected) <= EXACT
    check_merged(adapted, model, expected)


EARLIER = ("base_model.model.model.language_model.", "base_model.model.language_model.model.")
ALONE = ("base_model.model.model.language_model.", "base_model.model.model.")
HEADLESS = ("base_model.model.model.language_model.", "base_model.model.")
IN_CONFIG = ("model.language_model.", "language_model.model.")


def replaced(old: str, new: str) -> Any:
    return lambda name: name.replace(old, new)


def of_state_dict(adapter: str) -> Any:
    """The names of `model.state_dict()`."""
    return lambda name: name.replace(".weight", f".{adapter}.weight")


RENAMES = {
    "transformers before 4.52": replaced(*EARLIER),
    "the language model alone": replaced(*ALONE),
    "the language model without its head": replaced(*HEADLESS),
    "state_dict": of_state_dict("default"),
    "state_dict of an adapter with a name": of_state_dict("sft_2"),
    "no prefix": replaced("base_model.model.", ""),
    "no prefix, before 4.52": lambda n: replaced(*EARLIER)(n).replace("base_model.model.", ""),
    "compiled": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled blocks": lambda n: n.replace(".self_attn", "._orig_mod.self_attn"),
    "distributed": lambda n: f"module.{n}",
    "wrapped inside": replaced(EARLIER[0], "language_model.base_model.model.model."),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_names_of_other_versions_are_read_as_the_models_own(rename, base, copied):
    expected = of_peft(base, copied)
    assert difference(logits(loaded(renamed(copied, rename))), expected) <= EXACT


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (EARLIER, {"target_modules": ["q_proj", "v_proj"]}),
        (ALONE, {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 64}}),
        (ALONE, {"target_modules": ["q_proj"], "use_dora": True}),
        (ALONE, {"target_modules": "all-linear"}),
        (ALONE, {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
        (ALONE, {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}),
        (ALONE, {"target_modules": ["q_proj"], "bias": "lora_only"}),
        (ALONE, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4]}}),
        (ALONE, {"target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"o_proj": 2}}),
        (ALONE, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    ],
    ids=str,
)
def test_settings_under_other_names(names, settings, base, tmp_path):
    """PEFT's own rules choose layers, ranks and alphas by the names the file was written with."""
    only = {"exclude_modules": r".*(vision_tower|multi_modal_projector).*"}
    folder = peft_folders.write(base, tmp_path / "adapter", **settings, **only)
    expected = of_peft(base, folder)
    changed_config(renamed(folder, replaced(*names)), exclude_modules=None)
    assert difference(logits(loaded(folder)), expected) <= EXACT


def test_patterns_by_full_names_of_an_earlier_version(base, tmp_path):
    name = "model.language_model.layers.0.self_attn.q_proj"
    regex = LANGUAGE.replace("model\\.language_model", "language_model\\.model")
    given = {"rank_pattern": {name: 8}, "alpha_pattern": {name: 3}}
    folder = peft_folders.write(base, tmp_path / "adapter", **given)
    expected = of_peft(base, folder)
    renamed(folder, replaced(*EARLIER))
    assert difference(logits(loaded(folder)), expected) <= EXACT  # names of today in the settings
    theirs = {key: {name.replace(*IN_CONFIG): n for n in v.values()} for key, v in given.items()}
    changed_config(folder, target_modules=regex, **theirs)
    assert difference(logits(loaded(folder)), expected) <= EXACT


def to_official(folder: Path, to: Path) -> Path:
    """An adapter of q, k and v that share one A, under the official names of InternLM2."""
    shutil.copytree(folder, to)
    file = to / "adapter_model.safetensors"
    stored = load_file(file)
    state: dict[str, torch.Tensor] = {}
    for layer in range(sum(name.endswith("q_proj.lora_A.weight") for name in stored)):
        ours = f"base_model.model.model.language_model.layers.{layer}"
        theirs = f"base_model.model.language_model.model.layers.{layer}"
        b = [stored[f"{ours}.self_attn.{x}_proj.lora_B.weight"] for x in "qkv"]
        heads = [part.unflatten(0, (2, n, -1)) for part, n in zip(b, (2, 1, 1), strict=True)]
        wqkv = torch.cat(heads, 1).flatten(0, 2)
        state[f"{theirs}.attention.wqkv.lora_B.weight"] = wqkv
        a = stored[f"{ours}.self_attn.q_proj.lora_A.weight"]
        state[f"{theirs}.attention.wqkv.lora_A.weight"] = a
        for half in ("lora_A", "lora_B"):
            state[f"{theirs}.feed_forward.w1.{half}.weight"] = stored[
                f"{ours}.mlp.gate_proj.{half}.weight"
            ]
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return to


@pytest.mark.parametrize("alone", [False, True])
def test_fused_layers_of_official_names_come_apart(alone, tmp_path):
    base = peft_folders.hf_folder(tmp_path, name="internlm2")
    target = LANGUAGE.replace("|o_proj", "").replace("|up_proj|down_proj", "")
    alpha = {"alpha_pattern": {"gate_proj": 40}}
    folder = peft_folders.write(base, tmp_path / "ours", target_modules=target, **alpha)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name in list(state):
        if name.endswith(("k_proj.lora_A.weight", "v_proj.lora_A.weight")):
            q = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            state[name] = state[q].clone()
    save_file(state, file)
    expected = of_peft(base, folder)
    official = to_official(folder, tmp_path / "official_names")
    changed_config(official, target_modules=["wqkv", "w1"], alpha_pattern={"w1": 40})
    if alone:
        renamed(official, replaced("base_model.model.language_model.", "base_model.model."))
    model = loaded(official)
    assert difference(logits(model), expected) <= EXACT
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"] is attention.v_proj.lora_A["default"]
    changed_config(official, init_lora_weights="pissa")
    with pytest.raises(ModelFolderError, match="init_lora_weights cannot be taken apart; merge it"):
        loaded(official)


def swapped(old: str, new: str) -> Any:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def without(word: str) -> Any:
    return lambda state: {name: tensor for name, tensor in state.items() if word not in name}


def narrower(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t[:, :-1].clone() if "q_proj.lora_A" in n else t for n, t in state.items()}


def with_more(*names: str) -> Any:
    return lambda state: state | {name: torch.zeros(4, 64) for name in names}


UP = "layers.1.mlp.up_proj"
LAYER = "model.language_model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (swapped("layers.1.", "layers.9."), "layers.9.*of another model"),
        (swapped("q_proj", "query"), "does not have .8 of 56"),
        (without(f"{UP}.lora_B"), "up_proj.lora_B.weight is missing, and its layer"),
        (without(UP), "no tensors for model.language_model.layers.1.mlp.up_proj"),
        (narrower, r"q_proj.lora_A.weight is \(4, 63\), and \(4, 64\) is needed"),
        (with_more("lm_head.lora_A.weight"), "is for a layer that adapter_config.json does not"),
        (with_more(*(f"{LAYER}.lora_A.{x}.weight" for x in "ab")), "holds 2 adapters .a, b."),
        (with_more("something"), "something is for a layer"),
        (lambda _: {}, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit(change, sentence, copied):
    file = copied / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ModelFolderError, match=sentence) as refusal:
        loaded(copied)
    assert str(file) in str(refusal.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize(
    "content", [POINTER, "", "[1]", "half"], ids=["pointer", "", "list", "half"]
)
def test_damaged_files_are_named(name, content, copied):
    file = copied / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content.encode())
    with pytest.raises(ModelFolderError) as refusal:
        loaded(copied)
    assert str(file) in str(refusal.value)


def test_missing_files_are_named(copied):
    (copied / "adapter_model.safetensors").rename(copied / "weights")
    with pytest.raises(ModelFolderError, match=r"adapter_model.safetensors: missing; copy the"):
        loaded(copied)
    (copied / "weights").rename(copied / "adapter_model.safetensors")
    (copied / "adapter_config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"adapter_config.json: missing beside adapter_mod"):
        loaded(copied)


def test_a_file_of_pickled_tensors(base, copied):
    expected = of_peft(base, copied)
    file = copied / "adapter_model.safetensors"
    torch.save(load_file(file), copied / "adapter_model.bin")
    file.unlink()
    assert difference(logits(loaded(copied)), expected) <= EXACT
    torch.save({"state": {"a": 1}}, copied / "adapter_model.bin")
    with pytest.raises(ModelFolderError, match="adapter_model.bin: not a plain dict of tensors"):
        loaded(copied)


def test_the_base_that_is_named(base, copied, tmp_path):
    for key, value, sentence in (
        ("base_model_name_or_path", None, "names no base_model_name_or_path; set it"),
        ("base_model_name_or_path", str(tmp_path / "no"), "its base model is not there .*set base"),
        ("base_model_name_or_path", str(copied), "is this folder, which has no model"),
    ):
        with pytest.raises(ModelFolderError, match=sentence):
            loaded(changed_config(copied, **{key: value}))
    changed_config(copied, base_model_name_or_path="someone/model", revision="v2")
    with pytest.raises(ModelFolderError, match="revision = 'v2' of the base is not fetched here"):
        loaded(copied)
    changed_config(copied, base_model_name_or_path=str(base))  # a folder has no revisions
    assert lora.has_adapters(loaded(copied))


@pytest.mark.parametrize("named", ["below", "./below", "../beside", "parent/beside", "beside"])
def test_a_relative_base_is_that_beside_the_adapter(named, base, copied, tmp_path, monkeypatch):
    """Both can be moved together: the working directory counts only where nothing is there."""
    expected = of_peft(base, copied)
    folder = tmp_path / "parent" / "adapter"
    shutil.copytree(copied, folder)
    for place in (folder / "below", tmp_path / "parent" / "beside"):
        place.symlink_to(base)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "config.json").write_text("{}")  # of the working directory
    monkeypatch.chdir(tmp_path)
    changed_config(folder, base_model_name_or_path=named)
    assert difference(logits(loaded(folder)), expected) <= EXACT


@pytest.mark.parametrize("named", [".", "..", "empty"])
def test_a_relative_base_without_a_model_is_named(named, base, copied, tmp_path, monkeypatch):
    (tmp_path / "here" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    file = changed_config(copied, base_model_name_or_path=named) / "adapter_config.json"
    with pytest.raises(ModelFolderError) as caught:
        loaded(copied)
    says = str(caught.value)
    assert says.startswith(f"{file}: ")
    assert "base_model_name_or_path" in says
    if named != "empty":  # which may be a hub's name
        place = (tmp_path / "here" / named).resolve()
        assert f"= {named!r} is {place} here, where no model is (no config.json)" in says
    if named == ".":
        monkeypatch.chdir(base)  # as peft takes it
        assert difference(logits(loaded(copied)), of_peft(base, copied)) <= EXACT


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.1.self_attn.v_proj.lora_B", "lm_head"])
def test_values_that_are_no_numbers_are_named(name, value, base, tmp_path):
    folder = peft_folders.write(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    stored = next(each for each in tensors if name in each)
    tensors[stored].view(-1)[3] = value
    save_file(tensors, file)
    with pytest.raises(ModelFolderError, match="holds NaN or infinity") as caught:
        loaded(folder)
    assert str(caught.value).startswith(f"{file}: {stored} ")


def test_a_warning_for_every_layer_is_one_line(base, tmp_path, caplog):
    keys = {"lora_bias": True, "target_modules": ["gate_proj", "up_proj"]}
    folder = peft_folders.write(base, tmp_path / "adapter", **keys)
    loaded(folder)
    assert len(caplog.messages) == 1
    line = caplog.messages[0]
    assert line.startswith(f"{folder / 'adapter_config.json'}: `lora_bias=True` was passed")
    assert line.endswith(" (8 times)")  # two layers each of four blocks


def test_bases_in_a_circle(copied, tmp_path):
    other = Path(shutil.copytree(copied, tmp_path / "other"))
    changed_config(copied, base_model_name_or_path=str(other))
    changed_config(other, base_model_name_or_path=str(copied))
    with pytest.raises(ModelFolderError, match="leads back to"):
        loaded(copied)


@pytest.mark.parametrize("named", ["here", "elsewhere"])
def test_an_adapter_beside_weights_is_attached_as_in_transformers(named, base, ordinary, tmp_path):
    """Whatever base it names: transformers takes the weights beside it."""
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ordinary / name, both)
    changed_config(both, base_model_name_or_path=str(both if named == "here" else "some/where"))
    theirs = AutoModelForImageTextToText.from_pretrained(both, dtype=torch.float32).eval()
    assert difference(logits(loaded(both)), logits(theirs)) <= EXACT
    assert export.has_adapters(both)
    merged = export.run(both, tmp_path / "merged")
    assert difference(logits(loaded(merged)), logits(theirs)) <= 5e-5
    assert not export.has_adapters(merged)


def test_a_config_beside_an_adapter_is_no_model(base, copied):
    shutil.copy(base / "config.json", copied)
    assert difference(logits(loaded(copied)), of_peft(base, copied)) <= EXACT


def test_adapters_on_adapters(base, ordinary, tmp_path):
    """The lower one is merged: what PEFT computes on the merged model."""
    with peft_folders.quiet():
        merged = PeftModel.from_pretrained(peft_folders.plain(base), ordinary).merge_and_unload()
    upper = peft_folders.write(base, tmp_path / "upper", use_dora=True, target_modules=QKV)
    expected = logits(PeftModel.from_pretrained(merged, upper).eval())
    changed_config(upper, base_model_name_or_path=str(ordinary))
    assert difference(logits(loaded(upper)), expected) <= 5e-5
    written = export.run(upper, tmp_path / "merged")
    assert difference(logits(loaded(written)), expected) <= 1e-4
    assert open_model(upper).folder == base


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"], "bias": "all"},
        {"target_modules": ["lm_head", "o_proj"], "alpha_pattern": {"lm_head": 64}},
        {"trainable_token_indices": [3, 9]},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.slow
def test_exports_of_tied_models_hold_both_matrices(layout, settings, tied, tmp_path):
    folder = peft_folders.write(tied, tmp_path / "adapter", **settings)
    written = export.run(folder, tmp_path / "merged", layout)
    expected = of_peft(tied, folder)
    assert difference(logits(loaded(written)), expected) <= 5e-5
    if layout == "hf":
        theirs = AutoModelForImageTextToText.from_pretrained(written, dtype=torch.float32)
        assert difference(logits(theirs.eval()), expected) <= 5e-5


def test_merging_notices_a_scale_that_is_not_the_settings(copied):
    model = loaded(copied)
    layer = model.model.language_model.layers[1].mlp.up_proj
    layer.scaling["default"] *= 2
    with pytest.raises(RuntimeError, match="up_proj: merging changed its output"):
        merging.merge(model)


def test_joined_products_take_plain_layers_of_one_scale_alone(base, tmp_path):
    settings = {"alpha_pattern": {"k_proj": 64}, "target_modules": QKV, "lora_dropout": 0.0}
    folder = peft_folders.write(base, tmp_path / "a", **settings)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name in state:
        if "lora_A" in name and "language_model" in name:
            first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            state[name] = state[first].clone()
    save_file(state, file)
    model = loaded(folder)
    expected = of_peft(base, folder)
    assert fused_lora.fuse(model) > 0
    assert difference(logits(model), expected) <= EXACT
    for number, more in enumerate(({"use_dora": True}, {"lora_bias": True})):
        folder = peft_folders.write(base, tmp_path / f"b{number}", target_modules=QKV, **more)
        assert fused_lora.fuse(loaded(folder)) == 0
    trained = loaded(peft_folders.write(base, tmp_path / "c", target_modules=QKV))
    for name, parameter in trained.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.requires_grad_(True)
    bases = [layer.get_base_layer() for _, layer in merging.adapted_layers(trained)]
    assert fused_lora.fuse(trained) == sum(base.bias is None for base in bases)
