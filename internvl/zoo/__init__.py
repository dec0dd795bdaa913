"""Released models: vision tower, language model, sizes, template, tiling, published scores.

The data are in `models.yaml` and `scores.yaml` of this folder. Imports no torch.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from internvl.errors import UnknownModel
from internvl.files import read_yaml

BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes per weight by dtype; in 4 bits, 64 weights share a float32 scale. bitsandbytes quantizes
only the linear layers of the blocks, the rest is then bfloat16."""


def _read(file_name: str) -> dict[str, Any]:
    tree: dict[str, Any] = read_yaml(Path(__file__).with_name(file_name))
    return tree


_DATA = _read("models.yaml")
VISION_TOWERS: dict[str, dict[str, Any]] = _DATA["vision_towers"]
"""Name of a vision tower -> the keys of its `vision_config` that determine shapes."""
LANGUAGE_MODELS: dict[str, dict[str, Any]] = _DATA["language_models"]
"""Name of a language model -> the keys of its `llm_config` that determine shapes."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One released model."""

    name: str
    vision: str
    """Key of VISION_TOWERS."""
    language: str
    """Key of LANGUAGE_MODELS."""
    template: str = "internvl2_5"
    """Conversation template; empty for InternVL-14B."""
    select_layer: int = -1
    """Index of the tower's block whose output is used."""
    ps_version: str = "v2"
    """Version of the pixel shuffle."""
    max_tiles: int = 12
    """Most tiles of an image, thumbnail not counted; 1: the image is one square tile."""
    published: str = ""
    """Number of parameters as the release prints it, "2.2B"; empty if it prints none."""
    download_gb: float | None = None
    """Size of the download, GB as the release prints it."""
    note: str = ""
    """A remark on this row, such as why two numbers of it differ."""

    @property
    def repository(self) -> str:
        """Hub id."""
        return f"OpenGVLab/{self.name}"

    @property
    def family(self) -> str:
        """ "chat" or "dual"."""
        return "dual" if self.language == "QLLaMA" else "chat"


MODELS: dict[str, Model] = {name: Model(name=name, **row) for name, row in _DATA["models"].items()}
"""Released models by name."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A vision tower or language model that is downloaded alone."""

    repositories: tuple[str, ...]
    """Hub ids of the same files; the first one is downloaded."""
    published: str
    """Number of parameters as the guide prints it."""
    download_gb: float
    """Size of the download, GB as the guide prints it."""


PARTS: dict[str, Release] = {
    name: Release(**row | {"repositories": tuple(row["repositories"])})
    for name, row in _DATA["parts"].items()
}
"""Name of a vision tower or language model -> its release."""


_STAGES = ("-Pretrained", "-Instruct", "-MPO")


def find(name: str) -> Model:
    """Returns a released model by name or hub id, in any case.

    Raises:
        UnknownModel: no such model; lists the nearest names.
    """
    # Folders end in a slash, converted models in -hf, hub ids begin with an owner.
    short = name.rstrip("/").split("/")[-1].removesuffix("-hf").removesuffix("-HF")
    # Releases of the same sizes at other stages of their training.
    for stage in _STAGES:
        short = short.removesuffix(stage)
    lowered = {name.lower(): model for name, model in MODELS.items()}
    # InternVL-C alone, released as a file beside the whole model.
    short = "InternVL-14B-224px" if short == "internvl_c_13b_224px.pth" else short
    if short.lower() in lowered:
        return lowered[short.lower()]
    near = difflib.get_close_matches(short.lower(), lowered, n=3, cutoff=0.4)
    names = ", ".join(lowered[match].name for match in near) or "`internvl models` lists them"
    raise UnknownModel(f"no released model is called {name!r}; nearest: {names}")


def find_tower(name: str) -> dict[str, Any]:
    """Returns the `vision_config` of a released tower by name or hub id.

    Raises:
        UnknownModel: no such tower; lists the nearest names.
    """
    return _find_component(name, VISION_TOWERS, "vision tower")


def find_language_model(name: str) -> dict[str, Any]:
    """Returns the `llm_config` of a released chat model's language model by name or hub id.

    Raises:
        UnknownModel: no such language model; lists the nearest names.
    """
    # QLLaMA is no causal language model: it has queries and cross-attention of its own.
    chat_only = {key: sizes for key, sizes in LANGUAGE_MODELS.items() if key != "QLLaMA"}
    return _find_component(name, chat_only, "language model")


def repository(name: str) -> str:
    """Returns the hub id of a model or of one of its parts; a hub id is returned unchanged.

    Raises:
        UnknownModel: no such model or part, or a part that is not released alone.
    """
    # Unchanged: `-hf` repositories and forks are in no table.
    if "/" in name:
        return name
    component = _component_name(name)
    if component is None:
        return find(name).repository
    if component not in PARTS:
        raise UnknownModel(f"{component}: its hub id is in no table; name it with its owner")
    return PARTS[component].repositories[0]


def _component_name(name: str) -> str | None:
    """Returns the key of a vision tower or language model by name or hub id; None if it is none."""
    short = name.rstrip("/").split("/")[-1].lower()
    parts = {key.lower(): key for key in (*VISION_TOWERS, *LANGUAGE_MODELS) if key != "QLLaMA"}
    return parts.get(short)


def _find_component(name: str, table: dict[str, dict[str, Any]], component: str) -> dict[str, Any]:
    short = name.rstrip("/").split("/")[-1].lower()
    lowered = {key.lower(): key for key in table}
    if short in lowered:
        return table[lowered[short]]
    near = difflib.get_close_matches(short, lowered, n=3, cutoff=0.4) or [*lowered][:3]
    names = ", ".join(lowered[match] for match in near)
    raise UnknownModel(f"no {component} of a released model is called {name!r}; nearest: {names}")


def official_config(model: Model) -> dict[str, Any]:
    """Returns the keys of a model's official `config.json` that determine shapes and tiling."""
    if model.family == "dual":
        return {
            "model_type": "internvl",
            "vision_config": VISION_TOWERS[model.vision],
            "qllama_config": LANGUAGE_MODELS[model.language],
            "clip_embed_dim": _EMBED_DIM,
        }
    return {
        "model_type": "internvl_chat",
        "vision_config": VISION_TOWERS[model.vision],
        "llm_config": LANGUAGE_MODELS[model.language],
        "template": model.template,
        "select_layer": model.select_layer,
        "ps_version": model.ps_version,
        "dynamic_image_size": model.max_tiles > 1,
        "use_thumbnail": model.max_tiles > 1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": model.max_tiles,
        "force_image_size": VISION_TOWERS[model.vision]["image_size"],
        "downsample_ratio": 0.5,
    }


def num_parameters(model: Model) -> int:
    """Computes the number of parameters of a model from its sizes."""
    vision, language = VISION_TOWERS[model.vision], LANGUAGE_MODELS[model.language]
    if model.family == "dual":
        return _tower(vision) + _language_model(language) + _queries_and_heads(vision, language)
    return _tower(vision) + _projector(vision, language) + _language_model(language)


def _tower(sizes: dict[str, Any]) -> int:
    """Parameters of a vision tower."""
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    layer_norm, bias = sizes["norm_type"] == "layer_norm", sizes["qkv_bias"]
    # Norms before attention and MLP; a LayerNorm has a bias too.
    norms = 2 * d * (2 if layer_norm else 1) + (2 * d if sizes["qk_normalization"] else 0)
    block = 3 * d * d + (3 * d if bias else 0) + d * d + d + 2 * d * f + f + d + norms + 2 * d
    patches = (sizes["image_size"] // 14) ** 2  # all towers have patches of 14 px
    return sizes["num_hidden_layers"] * block + d * (1 + 1 + patches) + 3 * 14 * 14 * d + d


def _projector(vision: dict[str, Any], language: dict[str, Any]) -> int:
    """Parameters of the projector: LayerNorm and two linear layers with bias."""
    # Pixel shuffle joins 2 x 2 tokens of the tower: four widths enter.
    wide, d = 4 * vision["hidden_size"], language["hidden_size"]
    return 2 * wide + wide * d + d + d * d + d


def _language_model(sizes: dict[str, Any]) -> int:
    """Parameters of a language model, embeddings and head included."""
    d, heads, kv_heads = (
        sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    architecture, head_dim = sizes["architectures"][0], sizes.get("head_dim") or d // heads
    attention = d * head_dim * (2 * heads + 2 * kv_heads)
    if architecture in ("Qwen2ForCausalLM", "GptOssForCausalLM"):
        attention += head_dim * (heads + 2 * kv_heads)  # biases of q, k and v
    if architecture.startswith("Qwen3"):
        attention += 2 * head_dim  # norms of q and k
    if architecture == "GptOssForCausalLM":
        experts, f = sizes["num_local_experts"], sizes["intermediate_size"]
        attention += d + heads  # bias of the output, an attention sink a head
        mlp = experts * (3 * d * f + 2 * f + d) + experts * d + experts
    elif architecture == "Qwen3MoeForCausalLM":
        mlp = sizes["num_experts"] * (3 * d * sizes["moe_intermediate_size"] + d)
    else:
        mlp = 3 * d * sizes["intermediate_size"]
    blocks = sizes["num_hidden_layers"] * (attention + mlp + 2 * d)
    # Input embeddings and lm_head both: the releases store them untied.
    return blocks + d + 2 * sizes["vocab_size"] * d


_EMBED_DIM = 768


def _queries_and_heads(vision: dict[str, Any], language: dict[str, Any]) -> int:
    """Parameters of InternVL-14B besides its vision tower and its Llama."""
    wide, d = vision["hidden_size"], language["hidden_size"]
    # Every second layer of QLLaMA, the first included, attends to the image.
    cross = -(-language["num_hidden_layers"] // language["cross_attention_frequency"])
    cross *= 2 * d * d + 2 * wide * d + d + wide
    pools = sum(3 * (w * w + 3 * w) + w * _EMBED_DIM + _EMBED_DIM for w in (wide, d))
    heads = d * _EMBED_DIM + 2 * d + 2 + 1
    return language["num_query_token"] * d + cross + pools + heads


def memory_gib(model: Model, dtype: str) -> float:
    """Returns the memory of the weights alone in GiB, in `dtype`, a key of BYTES."""
    stored = _quantizable(model) if dtype in ("8bit", "4bit") else num_parameters(model)
    rest = num_parameters(model) - stored
    return (stored * BYTES[dtype] + rest * BYTES["bfloat16"]) / 2**30


def _quantizable(model: Model) -> int:
    """Number of weights that bitsandbytes quantizes: the linear layers of the blocks."""
    if model.family == "dual":
        return num_parameters(model)  # not known, so all of them
    vision, language = VISION_TOWERS[model.vision], LANGUAGE_MODELS[model.language]
    d, f = vision["hidden_size"], vision["intermediate_size"]
    tower = vision["num_hidden_layers"] * (4 * d * d + 2 * d * f)
    d, heads = language["hidden_size"], language["num_attention_heads"]
    head_dim = language.get("head_dim") or d // heads
    block = 2 * d * head_dim * (heads + language["num_key_value_heads"])
    # bitsandbytes replaces nn.Linear alone; experts are stacked parameters.
    if "num_experts_per_tok" not in language:
        block += 3 * d * language["intermediate_size"]
    return tower + language["num_hidden_layers"] * block


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """A published score of a released model."""

    task: str
    """Task of `internvl evaluate`."""
    metric: str
    value: float
    source: str
    """Key of the publication in scores.yaml."""
    language: str = "en"
    mode: str = "chat"
    """ "c" or "g" for InternVL-14B; "chat" otherwise."""
    recipe: str = ""
    """Further training of the released model; empty: as released."""


@cache  # not when imported: only `internvl models NAME` and the demo's report show scores
def _score_rows() -> dict[str, Any]:
    return _read("scores.yaml")


def scores(name: str) -> tuple[PublishedScore, ...]:
    """Returns the published scores of a model.

    Captions of chat models are fractions, the rest percent or points, as their sources print them.
    """
    return tuple(
        PublishedScore(
            metric=metric, value=value, **{k: v for k, v in row.items() if k != "scores"}
        )
        for row in _score_rows().get(find(name).name, ())
        for metric, value in row["scores"].items()
    )


def training(run_name: str) -> tuple[str, str] | None:
    """Returns (model, recipe) of the published scores of a training, by the name of its run folder;
    None if it has none."""
    row = _read("trainings.yaml").get(run_name)
    return None if row is None else (row[0], row[1])


def render_table() -> str:
    """Renders all models, one line each: size, memory, parts, template, tiling."""
    head = ("model", "params", "GiB bf16", "vision tower", "language model", "template", "tiles")
    rows = [head]
    for model in MODELS.values():
        count = num_parameters(model) / 10**9
        tiles = f"1-{model.max_tiles}" if model.max_tiles > 1 else "1"
        memory = f"{memory_gib(model, 'bfloat16'):.1f}"
        parts = (model.vision, model.language, model.template or "-", tiles)
        rows.append((model.name, f"{count:.1f}B", memory, *parts))
    return _aligned(rows)


def describe(name: str) -> str:
    """Renders one model in full: parts, sizes, memory per dtype, download, published scores.

    A vision tower or language model of a released model is rendered too.

    Raises:
        UnknownModel: no such model.
    """
    component = _component_name(name)
    if component is not None:
        return _describe_component(component)
    model = find(name)
    vision = VISION_TOWERS[model.vision]
    lines = [
        f"{model.name}  (hub id {model.repository})",
        f"  vision tower    {model.vision}, {vision['num_hidden_layers']} blocks, "
        f"{vision['image_size']} px, output of block {model.select_layer}",
        f"  language model  {model.language}",
    ]
    if model.family == "chat":
        tiling = (
            f"1 to {model.max_tiles} tiles and a thumbnail" if model.max_tiles > 1 else "1 tile"
        )
        lines.append(f"  template        {model.template}")
        lines.append(f"  images          {tiling}, pixel shuffle {model.ps_version}")
    counted = f"{num_parameters(model):,}"
    published = f" (published {model.published})" if model.published else ""
    lines.append(f"  parameters      {counted}{published}")
    memory = ", ".join(f"{dtype} {memory_gib(model, dtype):.1f}" for dtype in BYTES)
    lines.append(f"  weights, GiB    {memory}")
    if model.download_gb is not None:
        lines.append(f"  download        {model.download_gb:g} GB")
    if model.note:
        lines.append(f"  note            {model.note}")
    published_scores = scores(model.name)
    if published_scores:
        rows = [("task", "language", "mode", "metric", "published", "after")]
        rows += [
            (s.task, s.language, s.mode, s.metric, f"{s.value:g}", s.recipe or "-")
            for s in published_scores
        ]
        lines += ["", _aligned(rows)]
    return "\n".join(lines)


def _describe_component(name: str) -> str:
    """Renders a vision tower or language model: hub ids, size, memory, models that have it."""
    is_tower = name in VISION_TOWERS
    release = PARTS.get(name)
    count = _tower(VISION_TOWERS[name]) if is_tower else _language_model(LANGUAGE_MODELS[name])
    title = f"  (hub id {' or '.join(release.repositories)})" if release else ""
    published = f" (published {release.published})" if release else ""
    lines = [
        f"{name}, a {'vision tower' if is_tower else 'language model'}{title}",
        f"  parameters      {count:,}{published}",
        f"  weights, GiB    float32 {count * 4 / 2**30:.1f}, bfloat16 {count * 2 / 2**30:.1f}",
    ]
    if release:
        lines.append(f"  download        {release.download_gb} GB")
    models = [model.name for model in MODELS.values() if name in (model.vision, model.language)]
    return "\n".join([*lines, f"  part of         {', '.join(models)}"])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Renders a table of cells, columns aligned, two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in row).rstrip() for row in padded)
