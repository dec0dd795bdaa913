"""Exports: complete folders in both layouts, bit-identical round trips, refusals."""

import json
import logging
import os
import shutil
import stat

import numpy as np
import pytest
import tiny_run
import torch
from chat_folders import (
    ARCHITECTURES,
    IMAGE_TOKEN_ID,
    add_tokenizer,
    golden_folder,
    official_folder,
)
from dual_folders import dual_folder
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from internvl import export, train
from internvl.config import LoraConfig
from internvl.config.recipes import load_recipe
from internvl.data.chat import ChatEncoder
from internvl.data.images import open_rgb
from internvl.data.records import Message
from internvl.data.templates import TEMPLATES, jinja
from internvl.data.tiles import tile_images
from internvl.errors import ExportError, ModelFolderError
from internvl.export import servers
from internvl.inference import generate
from internvl.inference import load as loading
from internvl.inference.generate import Request
from internvl.models import weights as model_weights
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model
from internvl.models.vision import normalize_tiles


def with_tokenizer(folder, name="internlm2"):
    """Its placeholder is the tokenizer's, so that no id has to be given."""
    return add_tokenizer(folder, name)


def official(architecture, to):
    if architecture == "InternLM2ForCausalLM":
        return with_tokenizer(golden_folder("chat_internlm2", "v2.sel-1", to))
    return with_tokenizer(official_folder(architecture, to), "qwen2")


ALL = ("InternLM2ForCausalLM", *ARCHITECTURES)


def assert_same_tensors(a, b):
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("architecture", ALL)
def test_round_trips_are_bit_identical(architecture, tmp_path):
    start = official(architecture, tmp_path / "start")
    hf = export.run(start, tmp_path / "hf", "hf")
    back = export.run(hf, tmp_path / "back", "official")
    again = export.run(back, tmp_path / "again", "hf")
    assert_same_tensors(start, back)
    assert_same_tensors(hf, again)


def test_round_trip_of_tied_embeddings(tmp_path):
    start = official("Qwen3ForCausalLM", tmp_path / "start")
    config = json.loads((start / "config.json").read_text()) | {"tie_word_embeddings": True}
    (start / "config.json").write_text(json.dumps(config))
    tensors = load_file(start / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, start / "model.safetensors")
    hf = export.run(start, tmp_path / "hf", "hf")
    assert "language_model.lm_head.weight" not in load_file(hf / "model.safetensors")
    assert tied_says(hf) == (True, True)
    assert_same_tensors(start, export.run(hf, tmp_path / "back", "official"))


def tied_says(folder):
    """(of the model, of its language model, by which vLLM decides)."""
    config = json.loads((folder / "config.json").read_text())
    return config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]


def test_a_matrix_of_its_own_is_not_called_tied(tmp_path):
    hf = export.run(official("Qwen3ForCausalLM", tmp_path / "start"), tmp_path / "hf", "hf")
    config = json.loads((hf / "config.json").read_text())
    # As in a released folder of a tied model whose matrices were trained apart since.
    config["text_config"]["tie_word_embeddings"] = True
    (hf / "config.json").write_text(json.dumps(config))
    again = export.run(hf, tmp_path / "again", "hf")
    assert "language_model.lm_head.weight" in load_file(again / "model.safetensors")
    assert tied_says(again) == (False, False)


@pytest.mark.parametrize("architecture", ALL)
def test_configs_survive_the_round_trip(architecture, tmp_path):
    start = official(architecture, tmp_path / "start")
    export.run(start, tmp_path / "hf", "hf", verify=False)
    back = export.run(tmp_path / "hf", tmp_path / "back", "official", verify=False)
    before = json.loads((start / "config.json").read_text())
    after = json.loads((back / "config.json").read_text())
    for part in ("vision_config", "llm_config"):
        for key, value in before[part].items():
            if key not in ("use_flash_attn", "rope_scaling", "model_type"):
                assert after[part].get(key) == value, (part, key)
    scaling = before["llm_config"].get("rope_scaling")
    found = after["llm_config"]["rope_scaling"]
    assert found == scaling or (found is None and scaling is None)
    for key in ("template", "select_layer", "ps_version", "max_dynamic_patch", "use_thumbnail"):
        assert after[key] == before[key]


@torch.no_grad()
def test_plain_transformers_loads_the_hf_export(tmp_path):
    start = official("InternLM2ForCausalLM", tmp_path / "start")
    folder = export.run(start, tmp_path / "hf", "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["InternVLForConditionalGeneration"]
    plain = InternVLForConditionalGeneration.from_pretrained(folder)
    ours = loading.load(start, device="cpu").model
    assert torch.equal(export.probe(plain), export.probe(ours))
    assert plain.generation_config.eos_token_id == 521
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "language_model.model.layers.0.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118


def test_an_exported_folder_is_a_chat_again(tmp_path):
    start = official("InternLM2ForCausalLM", tmp_path / "start")
    before = loading.load(start, device="cpu")
    after = loading.load(export.run(start, tmp_path / "hf"), device="cpu")
    assert (after.template, after.tiles) == (before.template, before.tiles)
    assert after.system_message == before.system_message
    assert after.model.config.image_token_id == 526
    text = "<|im_start|>user\n 两只猫<|im_end|>  x"
    assert after.tokenizer(text).input_ids == before.tokenizer(text).input_ids
    assert len(after.tokenizer) == len(before.tokenizer)


def test_adapters_are_merged(tmp_path):
    start = official("InternLM2ForCausalLM", tmp_path / "start")
    chat = loading.load(start, device="cpu")
    lora.attach(chat.model, LoraConfig(rank=4, on=("language_model", "vision_tower")))
    chat.model.eval()
    for name, parameter in chat.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora.save_adapter(chat.model, tmp_path / "adapter", base=start)
    wanted = export.probe(chat.model)
    from_model = export.run(chat, tmp_path / "a", "official")
    from_folder = export.run(tmp_path / "adapter", tmp_path / "b", "official")
    assert_same_tensors(from_model, from_folder)
    found = export.probe(chat_model.load_model(from_model))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert lora.has_adapters(chat.model)


def test_the_umask_decides_who_reads_a_run_and_its_exports(tmp_path, monkeypatch):
    """Also where the file that is copied, or replaced, is private."""
    umask = os.umask(0o027)
    try:
        recipe = tiny_run.make(tmp_path / "p", steps=2, run=str(tmp_path / "run"))
        words = ["model.train=[]", "model.lora.rank=4", "checkpoint.best=val/loss"]
        words += ["evals.val.type=loss", f"evals.val.annotations={tmp_path}/p/train.jsonl"]
        words += [f"evals.val.images={tmp_path}/p", "evals.val.limit=4"]
        train.run(load_recipe(recipe, words))
        code = official("Qwen2ForCausalLM", tmp_path / "code")
        config = json.loads((code / "config.json").read_text()) | {"auto_map": {"AutoModel": "a.B"}}
        (code / "config.json").write_text(json.dumps(config))
        (code / "a.py").touch(0o600)
        monkeypatch.setattr(model_weights, "SHARD_BYTES", 2_000_000)
        export.run(tmp_path / "run", tmp_path / "hf")
        export.run(code, tmp_path / "official", "official", code_from=code)
    finally:
        os.umask(umask)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    written = [tmp_path / "hf", tmp_path / "official", tmp_path / "run"]
    written += [path for folder in written for path in folder.rglob("*")]
    names = {path.name for path in written}
    assert {"adapter_model.safetensors", ".metadata", "best", "a.py"} <= names
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in written}


def test_pixel_shuffle_v1_is_official_only(tmp_path):
    start = golden_folder("chat_internlm2", "v1.sel-4", tmp_path / "start")
    with_tokenizer(start)
    with pytest.raises(ExportError, match="pixel shuffle v1 .* format official"):
        export.run(start, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
    assert_same_tensors(start, export.run(start, tmp_path / "back", "official"))
    assert chat_model.load_model(tmp_path / "back").config.vision_feature_layer == -4


def test_shards_and_their_index(tmp_path, monkeypatch):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    monkeypatch.setattr(model_weights, "SHARD_BYTES", 400_000)
    folder = export.run(start, tmp_path / "hf", "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((folder / file).stat().st_size < 450_000 for file in files)
    assert index["metadata"]["total_size"] > 400_000 * 2
    (folder / files[1]).unlink()
    with pytest.raises(ModelFolderError, match="1 shards that are not there"):
        loading.load(folder, device="cpu")


def test_dtype_is_chosen(tmp_path):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    folder = export.run(start, tmp_path / "hf", "hf", dtype=torch.bfloat16)
    kinds = {t.dtype for t in load_file(folder / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_names_no_folder_of_this_machine(tmp_path):
    export.run(official("Qwen2ForCausalLM", tmp_path / "base"), tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    tree = json.loads(file.read_text()) | {"_name_or_path": "/home/ada/hf"}
    tree["text_config"] |= {"_name_or_path": "Qwen/Qwen2-0.5B"}
    file.write_text(json.dumps(tree))
    export.run(tmp_path / "hf", tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["_name_or_path"] == ""
    # What the hub shows stays.
    assert written["text_config"]["_name_or_path"] == "Qwen/Qwen2-0.5B"


def test_a_taken_target_is_refused(tmp_path):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export.run(start, tmp_path / "taken")
    assert [f.name for f in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    wrong = export.probe(chat_model.load_model(start)) + 1
    monkeypatch.setattr(export, "probe", lambda _model: wrong + torch.rand(1))
    with pytest.raises(ExportError, match="nothing was kept"):
        export.run(start, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["start"]


def test_code_is_copied_only_from_a_named_folder(tmp_path, caplog):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    with caplog.at_level(logging.WARNING):
        without = export.run(start, tmp_path / "without", "official", verify=False)
    assert "--code-from" in caplog.text
    assert "auto_map" not in json.loads((without / "config.json").read_text())
    release = tmp_path / "release"
    release.mkdir()
    (release / "modeling_internvl_chat.py").write_text("raise SystemError('never run')\n")
    auto_map = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    (release / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    folder = export.run(start, tmp_path / "with", "official", code_from=release)
    assert (folder / "modeling_internvl_chat.py").is_file()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map
    loading.load(folder, device="cpu")
    with pytest.raises(ExportError, match="no auto_map"):
        export.run(start, tmp_path / "other", "official", code_from=start, verify=False)


def test_official_tokenizer_files_are_copied_as_they_are(tmp_path):
    start = official("InternLM2ForCausalLM", tmp_path / "start")
    folder = export.run(start, tmp_path / "out", "official", verify=False)
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        assert (folder / name).read_bytes() == (start / name).read_bytes()


def test_tokenizer_names_that_the_processor_reads(tmp_path):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    folder = export.run(start, tmp_path / "hf", verify=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.start_image_token == "<img>"
    assert tokenizer.context_image_token_id == 565
    assert tokenizer.end_image_token_id == 564
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor == {"processor_class": "InternVLProcessor", "image_seq_length": 9}


def test_the_image_processor_cuts_as_we_do(tmp_path):
    start = official("Qwen2ForCausalLM", tmp_path / "start")
    folder = export.run(start, tmp_path / "hf", verify=False)
    pixels = np.random.default_rng(0).integers(0, 256, (130, 300, 3), dtype=np.uint8)
    picture = tmp_path / "image.png"
    Image.fromarray(pixels).save(picture)
    processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
    found = processor(Image.open(picture), return_tensors="pt").pixel_values
    chat = loading.load(folder, device="cpu")
    tiles = tile_images([open_rgb(picture)], chat.tiles, chat.tiles.max)
    wanted = normalize_tiles(torch.as_tensor(tiles.pixels), torch.float32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


class WithoutVideo(InternVLProcessor):
    """transformers' processor, whose video part cannot be made without torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # its own
def test_transformers_processor_makes_our_prompts(tmp_path):
    folder = export.run(official("InternLM2ForCausalLM", tmp_path / "start"), tmp_path / "hf")
    length = json.loads((folder / "processor_config.json").read_text())["image_seq_length"]
    processor = WithoutVideo(
        GotOcr2ImageProcessorPil.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
        video_processor=None,
        image_seq_length=length,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    assert_same_prompt(processor, loading.load(folder, device="cpu"))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_the_automatic_processor_makes_our_prompts(tmp_path):
    # PyPI's does not load beside a CPU build of torch, and then transformers does not either.
    pytest.importorskip("torchvision", reason="torchvision is no part of [dev]")
    folder = export.run(official("InternLM2ForCausalLM", tmp_path / "start"), tmp_path / "hf")
    assert_same_prompt(AutoProcessor.from_pretrained(folder), loading.load(folder, device="cpu"))


def assert_same_prompt(processor, chat):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 300, 3), dtype=np.uint8)
    picture, question = Image.fromarray(pixels), "Describe the image."
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    found = processor(images=[picture], text=[text], return_tensors="pt")
    request = Request([{"role": "user", "content": f"<image>\n{question}"}], [picture])
    wanted = generate.encode(request, chat.encoder, chat.tiles)
    assert found["input_ids"][0].tolist() == wanted.input_ids.tolist()
    assert found["pixel_values"].shape == wanted.tiles.shape


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_renders_what_the_encoder_does(name, tmp_path):
    folder = add_tokenizer(golden_folder("chat_internlm2", "v2.sel-1", tmp_path), "internlm2")
    tokenizer = loading.describe(folder).tokenizer
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = jinja(TEMPLATES[name], None)
    turns = [("user", "What is\nit? "), ("assistant", "A cat."), ("user", "Sure?")]
    messages = [Message(role, content) for role, content in turns]
    encoder = ChatEncoder(tokenizer, TEMPLATES[name], 9)
    for system in (None, Message("system", "Be brief.")):
        given = messages if system is None else [system, *messages]
        rendered = environment.from_string(text).render(
            messages=[{"role": m.role, "content": m.content} for m in given],
            add_generation_prompt=True,
        )
        assert tokenizer(rendered).input_ids == encoder.prompt(given, []).tolist()


def test_image_parts_become_placeholders():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = jinja(TEMPLATES["internvl2_5"], "S")
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rendered = environment.from_string(text).render(
        messages=[{"role": "user", "content": parts}], add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_without_a_tokenizer_the_weights_are_exported(tmp_path, caplog):
    start = golden_folder("chat_internlm2", "v2.sel-1", tmp_path / "start")
    chat = loading.load(start, image_token_id=IMAGE_TOKEN_ID, device="cpu")
    folder = export.run(chat, tmp_path / "hf")
    assert "no tokenizer files" in caplog.text
    assert loading.load(folder, device="cpu").model.config.image_token_id == IMAGE_TOKEN_ID
    shutil.rmtree(folder)


def test_commands_of_servers(tmp_path):
    """Which engine and layout each takes; and InternVL-14B, which only this package serves."""
    source = official("InternLM2ForCausalLM", tmp_path / "a model")
    hf = export.run(source, tmp_path / "hf", verify=False)
    ours, vllm, lmdeploy, transformers = servers.lines(servers.describe(hf, "hf"))
    assert ours == f"internvl serve {hf} --name hf"
    assert vllm.endswith("--limit-mm-per-prompt '{\"image\":4}'")
    assert "--backend pytorch" in lmdeploy
    assert transformers == f"transformers serve {hf} --port 8000"
    ours, vllm, lmdeploy, transformers = servers.lines(servers.describe(source, "official"))
    assert ours == f"internvl serve '{source}' --name 'a model'"
    assert vllm.endswith("--trust-remote-code")
    assert "--backend turbomind" in lmdeploy
    assert transformers == "# transformers: it takes --format hf"
    # More than the language model's own length stops vLLM.
    short = servers.describe(hf, "hf")
    for length, asked in ((4096, 4096), (32768, 8192)):
        short.config.text_config.max_position_embeddings = length
        assert f"--max-model-len {asked} " in servers.lines(short)[1]
        assert servers.lines(short)[2].endswith(f"--session-len {asked}")
    phi3 = official("Phi3ForCausalLM", tmp_path / "phi3")
    assert "--backend pytorch" in servers.lines(servers.describe(phi3, "official"))[2]
    dual = dual_folder(tmp_path / "dual")
    ours, *others = servers.lines(servers.describe(dual, "official"))
    assert ours.startswith("internvl serve")
    assert all("which only internvl serves" in line for line in others)
