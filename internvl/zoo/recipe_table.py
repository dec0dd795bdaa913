"""Writes the recipes that differ in a value or two from one table.

    python -m internvl.zoo.recipe_table

A new size, data set or method is a row of recipe_table.yaml, not a file written by hand.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvl.files import read_yaml

FOLDER = Path(__file__).parent / "recipes"
_TABLE = Path(__file__).with_suffix(".yaml")
_METHODS = {"full": "projector and language model", "lora": "LoRA of rank 16"}
_MPO_METHODS = {"full": "everything trained", "lora": "LoRA of rank 16"}
_WIDTH = 100  # columns, as in the package's code
_SHARING = (
    "data.share_prefix=true puts an image's captions into one row with it and takes about five "
    "times as many samples a second, but a step then holds five times fewer images: at equal "
    "samples captions were worse (docs/training.md), so it is off"
)


def render() -> Iterator[tuple[Path, str]]:
    """Yields (path below `FOLDER`, text) of every recipe in the table."""
    table = read_yaml(_TABLE)
    for family, constants in table["second_finetuning"]["families"].items():
        for model, size in constants["sizes"].items():
            # From InternVL3 on the original has no scripts for adapters.
            for method in (method for method in _METHODS if method in size):
                # The name of the file is the name on the command line and of the run folder.
                name = f"{model.lower().replace('-', '_')}_{method}"
                text = _second_finetuning(name, model, method, size, constants)
                yield Path(family) / f"{name}.yaml", text
    # The original has the tutorial's script for two models only.
    for row in table["coco_lora"]:
        name = f"{row['model'].lower().replace('-', '_')}_lora_coco"
        yield Path(row["folder"]) / f"{name}.yaml", _coco_lora(name, row)
    for key, dataset in table["retrieval"]["datasets"].items():
        for method, settings in table["retrieval"]["methods"].items():
            name = f"internvl_14b_{method}_{key}"
            yield Path("internvl_14b") / f"{name}.yaml", _retrieval(name, key, dataset, settings)
    for row in table["mpo"]["rows"]:
        for method in _MPO_METHODS:
            name = f"{row['model'].lower().replace('-', '_')}_mpo_{method}"
            settings = {**table["mpo"]["releases"][row["release"]], **row}
            yield Path(settings["folder"]) / f"{name}.yaml", _mpo(name, method, settings)
    for group in table["stages"]:
        for row in group["rows"]:
            settings = {**group["constants"], **row}
            yield Path(settings["folder"]) / f"{row['name']}.yaml", _stage(settings)
    for row in table["chat_v1_2"]["rows"]:
        text = _chat_v1_2(row, table["chat_v1_2"]["sources"])
        yield Path("internvl_chat_v1_2") / f"{row['name']}.yaml", text


def _second_finetuning(
    name: str, model: str, method: str, size: dict[str, Any], constants: dict[str, Any]
) -> str:
    gpus, per_device, accumulated = size[method]
    shards = size.get("shards")
    # Only one of the methods, if it takes several times the memory of the other.
    shards = shards.get(method) if isinstance(shards, dict) else shards
    # Adapters are trained without drop path in every script.
    adapted = "lora: {rank: 16}" if method == "lora" else f"drop_path: {size['drop_path']}"
    suffix = constants.get("suffix", "dynamic_res_2nd_finetune")
    tiles = {"size": 448, "min": 1, "max": 6, "thumbnail": True} | constants.get("tiles", {})
    samples = "sample" if per_device == 1 else "samples"
    hardware = (
        f"{gpus} GPUs in the original, {per_device} {samples} a device x {accumulated} accumulated"
    )
    if shards is not None:
        hardware += f"; {size['planned'][method]} GiB of each by plan (80 GB GPUs)"
    head: dict[str, str] = {
        "command": f"internvl train {name}",
        "hardware": hardware,
        "original": f"{size['script']}_{suffix}_{method}.sh",
        "differs": _joined("recipes/README.md", size.get("differs")),
    }
    cut = ""
    if shards is not None:
        cut = _compute(size)
    if shards not in (None, "none"):
        cut += f"parallel: {{shard: {shards}}}\n"
    title = f"{model}, second fine-tuning on your own conversations: {_METHODS[method]}."
    return f"""\
{_head(title, head)}
model: {{id: OpenGVLab/{model}, {adapted}}}
data:
  sources:
    - {{name: custom, annotations: data/custom.jsonl, images: data/custom, insert_image_mark: true}}
  tiles: {_flow(tiles)}
  max_tokens: {constants["max_tokens"]}
optim: {{lr: {_float(size["lr"])}, weight_decay: {size["weight_decay"]}, decay_vectors: true}}
{cut}run: runs/{name}
global_batch: {math.prod(size[method])}
epochs: 1
"""


def _stage(row: dict[str, Any]) -> str:
    """Renders a training of `stages`: of packed rows, of samples, or of preference pairs."""
    name, packed = row["name"], row.get("packed")
    is_preference = row.get("preference", False)
    objective = ""
    # The original never shows an image to two samples at once.
    data = ["share_prefix: false"]
    if packed:
        data += [
            f"row_tokens: {packed['tokens']}",
            f"max_tiles: {packed['tiles']}",
            "packing: official",
        ]
        # Averaged over processes, or each row's mean by itself.
        mean = "" if packed["mean_over"] == "step" else ", loss_normalization: micro_batch"
        objective = f"objective: {{weighting: square{mean}}}\n"
    if is_preference:
        # A pair is at most both answers, each of the longest sample.
        data += [f"row_tokens: {2 * row['tokens']}", "on_bad_sample: skip"]
        weights = "{dpo: 0.8, bco: 0.2, sft: 1.0}"
        objective = f"objective: {{name: mpo, beta: 0.1, weights: {weights}}}\n"
    optim = [f"lr: {_float(row['lr'])}", f"weight_decay: {row['weight_decay']}"]
    optim += [f"{key}: {row[key]}" for key in ("warmup_steps", "warmup_ratio") if key in row]
    # Where the script states both, it ends after the steps.
    steps = row.get("steps")
    every, keep = row["save"]
    batch = "global_batch_rows" if packed else "global_batch"
    lines = [
        _head(f"{row['title']}.", _stage_head(row)),
        *_stage_model(row),
        "data:",
        f"  meta: {row['meta']}",
        "  tiles: {size: 448, min: 1, max: 12, thumbnail: true}",
        f"  max_tokens: {row['tokens']}",
        *(f"  {line}" for line in data),
        f"{objective}optim: {{{', '.join([*optim, 'decay_vectors: true'])}}}",
        f"{_compute(row)}parallel: {{shard: {row['shard']}}}",
        f"checkpoint: {{every: {every}, keep: {keep}}}",
        f"run: runs/{name}",
        f"{batch}: {row['batch']}",
        f"steps: {steps}" if steps is not None else f"epochs: {row['epochs']}",
        *([f"seed: {row['seed']}"] if "seed" in row else []),
    ]
    return "\n".join([*lines, ""])


_PARTS = ("vision", "language", "projector", "template")


def _stage_model(row: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of `model:`."""
    yield "model:"
    if "from" in row:
        yield f"  id: runs/{row['from']}"
    elif "id" in row:
        yield f"  id: {row['id']}"
    else:
        yield from (f"  {key}: {row[key]}" for key in _PARTS if key in row)
    yield f"  train: [{', '.join(row['train'])}]"
    # 0 is the default, and a key that says so would be one more to read.
    if row["drop_path"]:
        yield f"  drop_path: {row['drop_path']}"


def _stage_head(row: dict[str, Any]) -> dict[str, str]:
    name, (gpus, per_device, accumulated) = row["name"], row["gpus"]
    # A packed batch is one row, whatever samples it holds.
    share = f"a row each x {accumulated} accumulated"
    if not row.get("packed"):
        samples = "sample" if per_device == 1 else "samples"
        share = f"{per_device} {samples} a device x {accumulated} accumulated"
    hardware = f"{gpus} GPUs in the original, {share}"
    command = f"internvl train {name}"
    # One machine needs no Slurm.
    if gpus > 8:
        command += (
            f"; on a cluster: internvl launch {name} --nodes {gpus // 8} --gpus-per-node 8 "
            "--partition NAME"
        )
    # InternVL3.5's scripts leave their nodes to the cluster.
    if not gpus:
        hardware = "nodes of 8 GPUs in the original, which does not say how many"
        command += f"; on a cluster: internvl launch {name} --nodes N --gpus-per-node 8"
    start = ""
    if "from" in row:
        start = f'the run of {row["from"]}, "runs/{row["from"]}": train that first'
    if "planned" in row:
        hardware += f"; {row['planned']}"
    lines = {
        "refused": row.get("refused"),
        "missing": row.get("missing"),
        "data": row.get("data"),
        "start": start,
        "command": command,
        "hardware": hardware,
        "original": f"{row['script']}.sh",
        "differs": _joined("recipes/README.md", row.get("differs")),
    }
    return {key: text for key, text in lines.items() if text}


def _chat_v1_2(row: dict[str, Any], sources: list[dict[str, str]]) -> str:
    name, gpus = row["name"], row["gpus"]
    head: dict[str, str] = {
        "data": "internvl data prepare sft-v1.2 --root .",
        "start": (
            "the parts below in pretrained/: OpenGVLab/InternViT-6B-448px-V1-2 (5.5B, 11.1 GB, "
            "with its projector) and NousResearch/Nous-Hermes-2-Yi-34B (34.4B, 65.0 GB; the same "
            "as OpenGVLab/Nous-Hermes-2-Yi-34B): internvl models NAME --download --to "
            "pretrained/NAME"
        ),
        "command": (
            f"internvl train {name}; on a cluster: internvl launch {name} --nodes {gpus // 8} "
            "--gpus-per-node 8 --partition NAME"
        ),
        "hardware": (
            f"{gpus} GPUs of 80 GB, {row['planned']} GiB of each by plan; the original's 64 took "
            "about 18 h with 8 samples a device; 32 GPUs do as well"
        ),
        "original": "internvl_chat_v1_2_hermes2_yi34b_448_res_finetune.sh",
        "differs": (
            f"rows are packed up to {row['row_tokens']:,} tokens, so a per-device batch has no "
            "meaning: only the 512 samples of a step count; the loss is the mean over the step, "
            "not of micro-batch means; samples are shuffled, not grouped by length; its script "
            "trains with pixel shuffle v2 by oversight, this recipe with v1 as the released model "
            "has it"
        ),
        "measured": "not measured yet",
    }
    title = (
        f"InternVL-Chat-V1-2 from its parts on {gpus} GPUs: everything trained on 1,267,819 "
        "samples, one epoch."
    )
    listed = "\n".join(
        f"""\
    - name: {source["name"]}
      annotations: playground/opensource/{source["name"]}.jsonl
      images: {source["images"]}
      insert_image_mark: true"""
        for source in sources
    )
    return f"""\
{_head(title, head)}
model:
  vision: pretrained/InternViT-6B-448px-V1-2
  language: pretrained/Nous-Hermes-2-Yi-34B
  projector: pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth
  template: Hermes-2
  ps_version: v1
  train: [vision_tower, multi_modal_projector, language_model]
  drop_path: 0.4
data:
  sources:
{listed}
  tiles: {{size: 448, min: 1, max: 1, thumbnail: false}}
  max_tokens: 2048
  row_tokens: {row["row_tokens"]}
optim: {{lr: 1.0e-5, weight_decay: 0.05, decay_vectors: true}}
compute: {{checkpointing: full}}
parallel: {{shard: zero3}}
run: runs/{name}
global_batch: 512
epochs: 1
drop_last: true
"""


def _mpo(name: str, method: str, row: dict[str, Any]) -> str:
    is_lora = method == "lora"
    hardware = row.get("hardware", f"{row['batch']} GPUs in the original, a pair each")
    if is_lora:
        hardware = row.get("lora_hardware", "as of the second fine-tuning by LoRA of this size")
    differs = (
        "recipes/README.md; tower and question are computed once for both answers; the reference "
        "is {}; delta takes one update a step and is kept by a resume; a pair that does not fit is "
        "left out and listed, not cut or replaced"
    ).format(
        "the model with its adapters off"
        if is_lora
        else "computed once before the first step, not by a second model in memory"
    )
    head: dict[str, str] = {
        **({"missing": row["missing"]} if "missing" in row else {}),
        "data": f"internvl data prepare mmpr --root . ({row['data']}, its meta file as it is)",
        "command": f"internvl train {name}",
        "hardware": hardware,
        "original": (
            f"assumed; {row['script']} trains all weights, its other values are here"
            if is_lora
            else row["script"]
        ),
        "differs": differs,
        **({"expected": row["expected"]} if "expected" in row and not is_lora else {}),
    }
    trained = "lora: {rank: 16}"
    if not is_lora:
        trained = (
            f"train: [vision_tower, multi_modal_projector, language_model], "
            f"drop_path: {row['drop_path']}"
        )
    # A pair is at most both answers, each of the longest sample.
    row_tokens = row["max_tokens"] if is_lora else 2 * row["max_tokens"]
    # Ten times the rate of full training, as ms-swift's example of MPO by LoRA has it.
    rate = 1e-5 if is_lora else row["lr"]
    shards = f"parallel: {row['parallel']}\n"
    if is_lora:
        # Adapters have hardly any state to keep on the CPU.
        shards = "parallel: {shard: zero3}\n" if row.get("shards_lora") else ""
    title = (
        f"{row['start']}, mixed preference optimization on {row['data']}: {_MPO_METHODS[method]}."
    )
    return f"""\
{_head(title, head)}
model:
  id: OpenGVLab/{row["start"]}
  {trained.replace(", drop_path", chr(10) + "  drop_path")}
data:
  meta: {row["data"]}/meta.json
  tiles: {{size: 448, min: 1, max: 12, thumbnail: true}}
  max_tokens: {row["max_tokens"]}
  row_tokens: {row_tokens}
  share_prefix: false  # pairs of one image come apart, as in the original
  on_bad_sample: skip
objective: {{name: mpo, beta: 0.1, weights: {{dpo: 0.8, bco: 0.2, sft: 1.0}}}}
optim: {{lr: {_float(rate)}, weight_decay: 0.05, decay_vectors: true}}
compute: {{checkpointing: full}}
{shards}run: runs/{name}
global_batch: {row["batch"]}
epochs: 1
"""


def _coco_lora(name: str, row: dict[str, Any]) -> str:
    head: dict[str, str] = {
        "data": "internvl data prepare coco-caption --root .",
        "command": f"internvl train {name}",
        "hardware": "8 GPUs in the original, 4 samples a device x 16 accumulated",
        "original": f"{row['script']}_dynamic_res_2nd_finetune_lora_coco.sh",
        "differs": "recipes/README.md; evaluation has no shortest answer",
        "sharing": _SHARING,
        # Figures exist for the model that was measured; the other's head stays without.
        **{key: row[key] for key in ("expected", "memory", "measured") if key in row},
    }
    title = (
        f"{row['model']} on COCO captions (566,747 samples): LoRA of rank 128, one epoch, "
        "1,106 steps."
    )
    return f"""\
{_head(title, head)}
model: {{id: OpenGVLab/{row["model"]}, lora: {{rank: 128}}}}
data:
  sources:
    - name: coco_karpathy_train_567k
      annotations: data/coco/annotations/coco_karpathy_train_567k.jsonl
      images: data/coco
      insert_image_mark: true
  tiles: {{size: 448, min: 1, max: 6, thumbnail: true}}
  max_tokens: {row["max_tokens"]}
  row_tokens: 16640  # nine images of seven tiles with question and caption
  max_tiles: 64
  share_prefix: false
optim: {{lr: 4.0e-5, weight_decay: 0.01, decay_vectors: true}}
evals:
  coco:
    annotations: data/coco/annotations/coco_karpathy_test_captions.json
    images: data/coco
    prompt: Provide a one-sentence caption for the provided image.
run: runs/{name}
global_batch: 512
epochs: 1
drop_last: true
"""


def _retrieval(name: str, key: str, dataset: dict[str, Any], method: dict[str, Any]) -> str:
    epochs, script = dataset["epochs"], method["script"].format(epochs=dataset["epochs"])
    head: dict[str, str] = {
        "data": dataset["data"],
        "command": f"internvl train {name}",
        "hardware": method["hardware"],
        "original": f"internvl_stage2_finetune_{dataset['script']}_{script}.sh",
        "differs": _retrieval_differs(dataset, method),
        # Most were not measured: the line is then missing, not empty.
        **{
            line: method[line][key]
            for line in ("expected", "measured")
            if key in method.get(line, {})
        },
    }
    title = f"InternVL-14B on {dataset['title']} retrieval: {method['title']}, {epochs} epochs."
    return f"""\
{_head(title, head)}
{method["model"]}data:
  sources:
    - name: {dataset["source"]}
      type: {dataset["type"]}
      annotations: {dataset["train"]}
      images: {dataset["images"]}
  tiles: {{size: {method["size"]}, max: 1}}
objective: {{name: retrieval, micro_batch: {method["micro_batch"]}}}
{method["optim"]}parallel: {{shard: zero3}}
evals:
  {dataset["eval"]}:
    type: retrieval
    annotations: {dataset["test"]}
    images: {dataset["images"]}
    form: {dataset["form"]}
    clean: true
    train: {dataset["train"]}
    batch_size: 64
checkpoint: {{every: 100, keep: 5}}
run: runs/{name}
global_batch: {method["global_batch"]}
epochs: {epochs}
"""


def _retrieval_differs(dataset: dict[str, Any], method: dict[str, Any]) -> str:
    batch, epochs, pairs = method["global_batch"], dataset["epochs"], dataset["pairs"]
    steps = ""
    # The original drops nothing at an epoch's end, so each of its epochs has one step more.
    if pairs is not None:
        ours, original = math.ceil(pairs * epochs / batch), math.ceil(pairs / batch) * epochs
        steps = f" ({ours:,} steps, the original {original:,})"
    differs = [
        f"epochs follow each other without a small batch at the end of each{steps}",
        "a caption's padding is not computed",
        method["rates"],
        method.get("trains"),
        # Full fine-tuning has the drop path of the guide.
        dataset.get("small_differs") if "batch_name" in method else None,
        method.get("batch_name"),
    ]
    return "; ".join(text for text in differs if text is not None)


def _compute(row: Mapping[str, Any]) -> str:
    """Renders `compute:` of a training that recomputes activations."""
    offload = ", offload: true" if row.get("offload") else ""
    return f"compute: {{checkpointing: full{offload}}}\n"


def _joined(*texts: str | None) -> str:
    return "; ".join(text for text in texts if text)


def _head(title: str, lines: Mapping[str, str]) -> str:
    """Renders the comments on top of a recipe: its title, then a paragraph for each key."""
    # Comments, not keys: a recipe holds nothing that training does not read.
    paragraphs = textwrap.wrap(f"# {title}", _WIDTH, subsequent_indent="# ")
    for key, text in lines.items():
        paragraphs += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"# {key + ':':<9} ",
            subsequent_indent="#" + " " * 11,
            # A path or an option must be found by a search as it is.
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(paragraphs)


def _flow(values: Mapping[str, Any]) -> str:
    # As YAML writes booleans, not as Python does.
    texts = (f"{key}: {str(value).lower()}" for key, value in values.items())
    return f"{{{', '.join(texts)}}}"


def _float(value: float) -> str:
    # YAML reads `4e-05` as a text; a float needs its point.
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def write(folder: Path = FOLDER) -> None:
    """Writes every recipe of the table below `folder`."""
    for path, text in render():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
