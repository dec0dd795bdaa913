"""memory: what weights and states take, and what autograd keeps, against real small models."""

from dataclasses import replace

import pytest
import torch
from data_files import model_folder, recipe
from saved_bytes import bytes_of, kept
from small_models import small_model

from internvl import plan, zoo
from internvl.compute import kernels, placement
from internvl.config import ComputeConfig, LoraConfig
from internvl.config.recipes import resolve
from internvl.inference import load as loading
from internvl.models.adapters import seeded_dropout
from internvl.models.attention.packed import dense_mask
from internvl.models.chat import model as chat_model
from internvl.models.modules import replace_module
from internvl.plan import memory
from internvl.plan.work import Work, padded
from internvl.training import optim
from internvl.zoo import gpus

TOKENS = 640
TEXT = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
VISION = {"hidden_size": 192, "intermediate_size": 512, "image_size": 112}


def text_run(model, supervised=1):
    document = torch.zeros(TOKENS, dtype=torch.long)
    positions = torch.arange(supervised)
    supervision = chat_model.Supervision(positions, positions, torch.ones(supervised))
    inputs = {
        "input_ids": torch.randint(10, 400, (1, TOKENS)),
        "position_ids": torch.arange(TOKENS)[None],
        "attention_mask": dense_mask(document, document),
        "supervision": supervision,
    }
    return lambda: model(**inputs).loss


def activations(model, compute, tiles=0, supervised=1):
    """What a row keeps as computed on a CPU, predicted."""
    recipe = released("InternVL2-2B")
    compute = replace(compute, attention="dense", compile=bool(compute.compile))
    row = Work(tiles=tiles, supervised=supervised, rows=padded(1, TOKENS))
    return memory.activations_of(model, replace(recipe, compute=compute), row)


def difference(build, run, compute):
    """(counted, predicted) bytes of two blocks more."""
    counted, predicted = [], []
    for layers in (2, 4):
        model = build(layers)
        kernels.apply_compute(model, torch.device("cpu"), compute)
        counted.append(kept(model, run(model)))
        row = activations(model, compute, tiles=3)
        predicted.append(row.casts() + row.decoder() + row.tower())
    return counted[1] - counted[0], predicted[1] - predicted[0]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Dropout of joined adapters keeps a seed, not a mask."""
    monkeypatch.setattr(seeded_dropout, "used", lambda x: True)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "rank", "dropout"),
    [
        pytest.param("InternVL2-2B", 16, 0.0, marks=pytest.mark.slow),
        ("InternVL2-2B", 16, 0.05),
        pytest.param("InternVL2-1B", 16, 0.05, marks=pytest.mark.slow),
        pytest.param("InternVL3_5-8B", 16, 0.0, marks=pytest.mark.slow),
        pytest.param("InternVL2-1B", None, 0.0, marks=pytest.mark.slow),
        pytest.param("InternVL3_5-8B", None, 0.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("graphs_alone")
def test_what_autograd_keeps_of_a_decoder_block(name, rank, dropout, compile):
    parts = () if rank else ("multi_modal_projector", "language_model")

    def build(layers):
        text = TEXT | {"num_hidden_layers": layers}
        sizes = {"text": text}
        return small_model(name, parts, rank, dropout=dropout, dtype="bfloat16", sizes=sizes)

    counted, predicted = difference(build, text_run, ComputeConfig(compile=compile))
    assert predicted == pytest.approx(counted, rel=0.02)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rank", "dropout"), [(None, 0.0), (16, 0.0), (16, 0.05)])
@pytest.mark.usefixtures("graphs_alone")
def test_what_autograd_keeps_of_a_tower_block(rank, dropout, compile):
    # A CPU's layer norm takes no bfloat16 weights with float32 inputs: the projector trains too.
    parts = ("multi_modal_projector",) if rank else ("vision_tower", "multi_modal_projector")

    def build(layers):
        sizes = {"vision": VISION | {"num_hidden_layers": layers}}
        on = ("vision_tower",)
        return small_model(
            "InternVL2-2B", parts, rank, on=on, dropout=dropout, dtype="bfloat16", sizes=sizes
        )

    def run(model):
        pixels = torch.rand(3, 3, 112, 112)
        return lambda: model.model.get_image_features(pixels).pooler_output.float().sum()

    counted, predicted = difference(build, run, ComputeConfig(compile=compile))
    assert predicted == pytest.approx(counted, rel=0.02)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("name", "rank", "dropout", "compile"),
    [
        ("InternVL2-2B", 16, 0.0, False),
        ("InternVL2-2B", 16, 0.05, False),
        ("InternVL3_5-8B", None, 0.0, False),
        pytest.param("InternVL2-2B", 16, 0.0, True, marks=pytest.mark.slow),
        pytest.param("InternVL3_5-8B", None, 0.0, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("graphs_alone")
def test_what_the_last_mlp_no_longer_keeps(name, rank, dropout, compile):
    parts = () if rank else ("multi_modal_projector", "language_model")
    sizes = {"text": TEXT | {"num_hidden_layers": 1}}
    model = small_model(name, parts, rank, dropout=dropout, dtype="bfloat16", sizes=sizes)
    layers, supervised = model.model.language_model.layers, 40
    block_class = type(layers[0])
    compute = ComputeConfig(compile=compile)
    kernels.apply_compute(model, torch.device("cpu"), compute)
    cut = kept(model, text_run(model, supervised))
    row = activations(model, compute, supervised=supervised)
    predicted = row.decoder_block(TOKENS) - row.last_block()
    block = replace_module(layers, "0", block_class)
    if compile:
        block.compile(dynamic=False)
    saved = kept(model, text_run(model, supervised)) - cut
    # The norm after it, which is not compiled: its input in float32, trained its output as well.
    norm = (TOKENS - supervised) * (TEXT["hidden_size"] * (4 if rank else 8) + 4)
    assert saved - norm == pytest.approx(predicted, rel=0.005)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_code_keeps_what_its_graphs_do(request):
    """The sizes of the tests above are those of real compiled blocks."""

    def counted():
        sizes = {"text": TEXT | {"num_hidden_layers": 1}}
        model = small_model("InternVL2-2B", (), 16, dropout=0.05, dtype="bfloat16", sizes=sizes)
        kernels.apply_compute(model, torch.device("cpu"), ComputeConfig(compile=True))
        return kept(model, text_run(model))

    torch._dynamo.reset()
    compiled = counted()
    request.getfixturevalue("graphs_alone")
    assert counted() == compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compile", [False, True])
def test_checkpointed_blocks_keep_what_enters_them(compile):
    """Compiled ones too, nothing of what fused LoRA's autograd function saves."""

    def build(layers):
        sizes = {"text": TEXT | {"num_hidden_layers": layers}}
        return small_model("InternVL2-2B", (), 16, dtype="bfloat16", sizes=sizes)

    compute = ComputeConfig(checkpointing="full", compile=compile)
    counted, predicted = difference(build, text_run, compute)
    assert predicted == 2 * TOKENS * 256 * 2
    # A compiled block keeps its generator's state: attention could drop weights at random.
    states = 2 * torch.get_rng_state().nbytes if compile else 0
    assert counted == predicted + states


def run_of(folder, tmp_path, **model):
    made = recipe(folder, tmp_path / "x.jsonl", tmp_path, tmp_path / "run", "dtype=bfloat16")
    return replace(made, model=replace(made.model, **model))


@pytest.mark.parametrize("method", ["full", "lora", "last blocks"])
def test_states_are_those_of_the_real_run(tmp_path, method):
    folder = model_folder(tmp_path / "model")
    settings = {
        "full": {},
        "lora": {"lora": LoraConfig(rank=8)},
        "last blocks": {"train": (), "train_last_vision_blocks": 1},
    }[method]
    made = run_of(folder, tmp_path, **settings)
    chat = loading.for_training(made)
    model = placement.to_device(chat.model, torch.device("cpu"), made.dtype)
    optimizer = optim.build(model, made.optim)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for value in state.values() if value.ndim
    ]
    found = memory.states(plan.model_of(made), made)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found["trained weights"] == bytes_of(trained)
    assert found["gradients"] == bytes_of(p.grad for p in trained)
    # A number for a parameter's step is not counted; vectors of one number are moments.
    assert found["optimizer states"] == bytes_of(moments)
    kernels.apply_compute(model, torch.device("cpu"), ComputeConfig())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert found["frozen weights"] == storage_of([*frozen, *model.buffers()])


def storage_of(tensors):
    """Bytes that the tensors take together; views of one buffer count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def released(name, **model):
    """A recipe for a released model, whose files are not here."""
    tree = {
        "model": {"id": f"OpenGVLab/{name}", **model},
        "data": {"sources": [{"name": "x", "annotations": "x.jsonl"}], "max_tokens": 4096},
        "run": "x",
        "global_batch": 64,
        "epochs": 1,
    }
    return resolve(tree)


def test_the_tutorials_adapters_have_their_number():
    made = released("InternVL2-2B", lora={"rank": 128})
    found = memory.states(plan.model_of(made), made)
    assert found["trained weights"] == 4 * 125_829_120
    assert found["optimizer states"] == 8 * 125_829_120


def test_moments_in_8_bits_take_a_byte_and_their_scales():
    made = released("InternVL2-2B", lora={"rank": 128})
    small = replace(made, optim=replace(made.optim, name="adamw-8bit"))
    found = memory.states(plan.model_of(small), small)["optimizer states"]
    assert found == 2 * 125_829_120 * (1 + 4 / 256)


def test_moments_on_the_cpu_take_nothing_and_are_copied():
    made = released("InternVL2-2B", lora={"rank": 128})
    there = replace(made, optim=replace(made.optim, offload=True))
    before, after = (memory.states(plan.model_of(made), recipe) for recipe in (made, there))
    assert after == before | {"optimizer states": 0.0}
    copies = "moments from the CPU and back"
    h200 = gpus.find("H200")
    known, with_copies = (plan.make(recipe, h200) for recipe in (made, there))
    assert with_copies.component_s[copies] == 16 * 125_829_120 / (0.04 * 1e12)
    assert copies not in known.component_s
    assert "the CPU's memory holds 0.9 GiB of moments" in with_copies.render()


@pytest.mark.parametrize("name", ["InternVL2-1B", "InternVL2-26B", "InternVL3_5-30B-A3B"])
@pytest.mark.parametrize("dtype", ["bfloat16", "4bit", "8bit"])
@pytest.mark.slow
def test_weights_take_what_the_table_of_models_says(name, dtype):
    quantize = None if dtype == "bfloat16" else dtype
    made = released(name, lora={"rank": 1}, quantize=quantize)
    found = memory.states(plan.model_of(made), made)
    weights = found["frozen weights"] + found["quantized weights"]
    wanted = zoo.memory_gib(zoo.find(name), dtype) * 2**30
    assert weights == pytest.approx(wanted, rel=3e-3)
