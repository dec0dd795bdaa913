"""A released model at full size, from its official folder to answers, adapters and exports.

    python benchmarks/loading.py --tokenizer internlm2_tokenizer.model --photo photo.jpg \\
        --models InternVL2-2B InternVL2-8B --to /tmp/loading --out benchmarks/results/loading.json

Writes each model in the official layout with random bfloat16 weights, in shards of 2 GB, then in
fresh processes: load (time, peak memory of the host), answer about the photo, attach LoRA, merge,
export to both formats; reload the hf export with plain transformers and compare logits; load in 8
and 4 bits, train one QLoRA step, spread with a device map. Exports are removed as it goes: twice a
model's size of disk is enough. `--tiny` shrinks everything, for a look on a CPU.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl.models.vision import count_parameters

SHARD_BYTES = 2 * 10**9
QUESTION = "<image>\nDescribe the image."
STEPS = ("chat", "adapt", "plain", "round_trip", "quantized")
TINY = {
    "vision_config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2},
    "llm_config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
}
Numbers = dict[str, Any]


def official_config(name: str, *, tiny: bool) -> dict[str, Any]:
    """`config.json` of a released InternVL2 with an InternLM2 language model."""
    from internvl import zoo

    config = zoo.official_config(zoo.find(name))
    config["llm_config"] = config["llm_config"] | {
        "max_position_embeddings": 32768,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    if tiny:
        small = {"intermediate_size": 128, "num_key_value_heads": 2}
        for part, sizes in TINY.items():
            config[part] = config[part] | sizes | small
    return config


def write_checkpoint(folder: Path, config: dict[str, Any], tokenizer: Path, device: str) -> Numbers:
    """The official folder of `config` with random weights; its size and time."""
    from safetensors.torch import save_file

    from internvl.models import configs, keys
    from internvl.models.chat import model as chat_model

    started = time.perf_counter()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, tokenizer)
    shape = configs.from_official(config, image_token_id=92546)
    names = keys.ours_to_official(shape, chat_model.empty_model(shape).state_dict())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = [0]
    for name, tensor in names:
        if shards[-1] and sizes[-1] + 2 * tensor.numel() > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tuple(tensor.shape)
        sizes[-1] += 2 * tensor.numel()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: random_weight(n, s, device) for n, s in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {
        "model_gib": sum(sizes) / 2**30,
        "largest_shard_gib": max(sizes) / 2**30,
        "shards": len(shards),
        "write_s": time.perf_counter() - started,
    }


def random_weight(name: str, shape: tuple[int, ...], device: str) -> Any:
    """bfloat16 on the CPU: norms and scales as a new model has them, the rest N(0, 0.02)."""
    import torch

    if name.endswith((".ls1", ".ls2")):
        return torch.full(shape, 0.1, dtype=torch.bfloat16)
    if "norm" in name or name == "mlp1.0.weight":
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    return (torch.randn(shape, device=device) * 0.02).to("cpu", torch.bfloat16)


def write_tokenizer(folder: Path, model: Path) -> None:
    """InternLM2's tokenizer with the tokens of the InternVL2 releases."""
    from internvl.data.tokenizers import SPECIAL_TOKENS

    ids = {"<s>": 1, "</s>": 2, "<|im_end|>": 92542, "<|im_start|>": 92543}
    ids |= {token: 92544 + number for number, token in enumerate(SPECIAL_TOKENS)}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def timed(into: Numbers, key: str) -> Iterator[None]:
    """`into[key]`: seconds of the block, the GPU's work included."""
    import torch

    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    into[key] = time.perf_counter() - started


def resident_gib(line: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{line}:")[2].split()[0]) / 2**20


@contextmanager
def host_peak(into: Numbers) -> Iterator[None]:
    """How far this process's resident memory, mapped files included, rises in the block."""
    before = resident_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    yield
    into["host_before_gib"] = before
    into["host_rise_gib"] = resident_gib("VmHWM") - before


def load(folder: Path, into: Numbers, **options: Any) -> Any:
    """The chat model in bfloat16, with what loading it took."""
    import torch

    import internvl

    with host_peak(into), timed(into, "load_s"):
        model = internvl.load(folder, dtype="bfloat16", **options)
    if torch.cuda.is_available():
        into["gpu_gib"] = torch.cuda.memory_allocated() / 2**30
    return model


def answer(model: Any, photo: Path, into: Numbers, tokens: int) -> str:
    """The answer to one question about the photo, and its time."""
    from internvl.inference.generate import Request

    request = Request([{"role": "user", "content": QUESTION}], [photo])
    with timed(into, f"answer_{tokens}_tokens_s"):
        return model.answer([request], max_new_tokens=tokens, min_new_tokens=tokens)[0]


def chat(args: argparse.Namespace, folder: Path) -> Numbers:
    """Load and answer, whole and streamed."""
    from internvl.inference.generate import Request, encode

    found: Numbers = {}
    model = load(folder / "start", found, device=args.device)
    request = Request([{"role": "user", "content": QUESTION}], [args.photo])
    prompt = encode(request, model.encoder, model.tiles)
    found |= {"tiles": len(prompt.tiles), "prompt_tokens": len(prompt.input_ids)}  # type: ignore[arg-type]
    answer(model, args.photo, {}, 2)
    text = answer(model, args.photo, found, args.tokens)
    pieces = list(model.stream(request, max_new_tokens=args.tokens, min_new_tokens=args.tokens))
    found |= {"stream_equals_answer": "".join(pieces) == text, "pieces": len(pieces)}
    (folder / "prompt.json").write_text(json.dumps(prompt.input_ids.tolist()))
    return found


def adapt(args: argparse.Namespace, folder: Path) -> Numbers:
    """LoRA, merge, both exports."""
    import torch

    from internvl import export
    from internvl.config import LoraConfig
    from internvl.models.adapters import lora

    found: Numbers = {}
    model = load(folder / "start", found, device=args.device)
    lora.select_trainable(model.model, ())
    with timed(found, "lora_attach_s"):
        lora.attach(model.model, LoraConfig(rank=128))
    found["lora_trainable"] = count_parameters(model.model)[0]
    for name, parameter in model.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    with timed(found, "adapter_save_s"):
        lora.save_adapter(model.model, folder / "adapter", folder / "start")
    adapted = export.probe(model.model.eval())
    with timed(found, "merge_s"):
        lora.merge(model.model)
    merged = export.probe(model.model)
    found["merge_moves_logits_std"] = float((merged - adapted).abs().max() / adapted.std())
    torch.save(merged, folder / "logits.pt")
    with timed(found, "export_hf_s"):
        export.run(model, folder / "hf", "hf")
    for file in (folder / "start").glob("*.safetensors"):
        file.unlink()
    with timed(found, "export_official_s"):
        export.run(model, folder / "official", "official")
    return found


def plain(args: argparse.Namespace, folder: Path) -> Numbers:
    """The hf export in `transformers`' own classes: logits, and the processor's prompt."""
    import torch
    from transformers import AutoModelForImageTextToText

    from internvl import export

    found: Numbers = {}
    with host_peak(found), timed(found, "load_s"):
        model = AutoModelForImageTextToText.from_pretrained(
            folder / "hf", dtype="bfloat16", device_map=args.device
        )
    found["class"] = f"{type(model).__module__}.{type(model).__name__}"
    wanted = torch.load(folder / "logits.pt", weights_only=True)
    logits = export.probe(model)
    found["logits_equal"] = torch.equal(logits, wanted)
    found["logits_max_difference"] = float((logits - wanted).abs().max())
    try:
        inputs = _processed(folder / "hf", args.photo)
    except ImportError as error:
        return found | {"processor": str(error).strip().splitlines()[0]}
    ids = json.loads((folder / "prompt.json").read_text())
    found["processor_ids_equal"] = inputs["input_ids"][0].tolist() == ids
    found["processor_tiles"] = len(inputs["pixel_values"])
    output = model.generate(**inputs.to(model.device, torch.bfloat16), max_new_tokens=4)
    found["generated_tokens"] = output.shape[1] - len(ids)
    return found


def _processed(folder: Path, photo: Path) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    text = QUESTION.removeprefix("<image>\n")
    parts = [{"type": "image", "path": str(photo)}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def round_trip(args: argparse.Namespace, folder: Path) -> Numbers:
    """official -> hf -> official, file to file: every tensor of the same bits."""
    import torch

    from internvl import export
    from internvl.models import hub

    found: Numbers = {}
    shutil.rmtree(folder / "hf", ignore_errors=True)
    first_folder = folder / ("official" if (folder / "official").exists() else "start")
    with host_peak(found), timed(found, "two_exports_s"):
        there = export.run(first_folder, folder / "there", "hf", verify=False)
        back = export.run(there, folder / "back", "official", verify=False)
    first, second = (hub.open_folder(f).tensors for f in (first_folder, back))
    equal = [n in second and torch.equal(t.read(), second[n].read()) for n, t in first.items()]
    found |= {"tensors": len(equal), "equal": sum(equal), "names": first.keys() == second.keys()}
    for gone in (there, back):
        shutil.rmtree(gone)
    return found


def quantized(args: argparse.Namespace, folder: Path) -> Numbers:
    """8 bits, 4 bits, a QLoRA step, a device map."""
    import gc

    import torch

    from internvl import export

    found: Numbers = {}
    variants: tuple[Numbers, ...] = (
        {"device_map": "auto"},
        {"quantize": "8bit", "device": args.device},
        {"quantize": "4bit", "device": args.device},
    )
    logits = []
    for options in variants if torch.cuda.is_available() else variants[:1]:
        numbers: Numbers = {}
        model = load(folder / "official", numbers, **options)
        answer(model, args.photo, {}, 4)
        answer(model, args.photo, numbers, 16)
        logits.append(export.probe(model.model).double())
        pair = torch.stack([logits[0].flatten(), logits[-1].flatten()])
        numbers["logits_correlation"] = float(torch.corrcoef(pair)[0, 1])
        found[next(iter(options.values()))] = numbers
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if torch.cuda.is_available():
        found["qlora"] = qlora(args, folder)
    return found


def qlora(args: argparse.Namespace, folder: Path) -> Numbers:
    """Three steps of a recipe with a 4-bit base, and its merge."""
    import torch

    from internvl import export, train
    from internvl.config.recipes import resolve

    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "A photograph."}]
    row = json.dumps({"image": args.photo.name, "conversations": turns})
    (folder / "train.jsonl").write_text(f"{row}\n" * 4)
    source = {"name": "photo", "annotations": str(folder / "train.jsonl")}
    tree = {
        "model": {"id": str(folder / "official"), "quantize": "4bit", "lora": {"rank": 16}},
        "data": {"sources": [source | {"images": str(args.photo.parent)}], "workers": 0},
        "compute": {"compile": False},
        "optim": {"lr": 1e-3, "warmup_ratio": 0.0},
        "run": str(folder / "run"),
        "global_batch": 4,
        "steps": 3,
    }
    found: Numbers = {}
    torch.cuda.reset_peak_memory_stats()
    with timed(found, "three_steps_with_start_s"):
        train.run(resolve(tree))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found["losses"] = [round(json.loads(line)["loss"], 4) for line in lines if '"loss"' in line]
    found["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with timed(found, "merge_s"):
        export.run(folder / "run", folder / "merged", "hf")
    return found


def child(args: argparse.Namespace, step: str, folder: Path) -> Numbers:
    """The step in a fresh process."""
    words = [sys.executable, __file__, "--step", step, "--to", str(folder), "--device", args.device]
    words += ["--photo", str(args.photo), "--tokens", str(args.tokens)]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[-1]) | {"process_s": time.perf_counter() - started}


def machine(device: str) -> Numbers:
    """Hardware, versions and commit."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchvision")
    cpu = f"{os.cpu_count()} x {platform.machine()} cores"
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "python": platform.python_version(),
        **{name: of(name) for name in names},
        "commit": os.environ.get("COMMIT") or _commit(),
    }


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Everything, model by model; or one step, when called by itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, help="InternLM2's tokenizer.model")
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["InternVL2-2B"])
    parser.add_argument("--to", type=Path, required=True, help="folder for the models")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no step after this")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        functions: tuple[Callable[[argparse.Namespace, Path], Numbers], ...]
        functions = (chat, adapt, plain, round_trip, quantized)
        step = dict(zip(STEPS, functions, strict=True))[args.step]
        print(json.dumps(step(args, args.to)))
        return
    started = time.perf_counter()
    result: Numbers = {"benchmark": "loading", **machine(args.device), "models": {}}
    for name in args.models:
        folder = args.to / name
        config = official_config(name, tiny=args.tiny)
        numbers = write_checkpoint(folder / "start", config, args.tokenizer, args.device)
        result["models"][name] = numbers
        for step in args.steps:
            if time.perf_counter() - started > args.budget_s:
                numbers[step] = {"skipped": "no time left"}
                continue
            numbers[step] = child(args, step, folder)
            print(name, step, json.dumps(numbers[step]), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
