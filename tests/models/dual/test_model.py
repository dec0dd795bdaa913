"""InternVL-14B through `load` against the original's numbers, and its pieces against each other."""

import json

import pytest
import torch
import torch.nn.functional as F
from dual_folders import DUAL, dual_folder, dual_golden
from safetensors.torch import load_file, save_file

from internvl.compute.kernels import recompute
from internvl.errors import UserError
from internvl.inference import load as loading
from internvl.models.dual.configs import DualConfig, from_official
from internvl.models.dual.model import DualModel
from internvl.models.dual.qllama import attention_mask

CASE = json.loads((DUAL / "case.json").read_text())
LENGTHS = [20, 13, 7, 2, 16]


@pytest.fixture(scope="module")
def golden():
    return dual_golden()


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    folder = dual_folder(tmp_path_factory.mktemp("dual"))
    return loading.load(folder, device="cpu", dtype="float32")


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_golden_states(dual, golden):
    vision = dual.model.vision_tokens(golden["input.pixel_values"])
    close(vision, golden["output.vision_last_hidden_state"])
    queries = dual.model.query_states(dual.model.encode_kv(vision))
    close(queries, golden["output.get_image_features.query_embeds"])
    close(dual.model.query_embeds(queries), golden["output.clip_projector2_of_query_embeds"])
    ids = golden["input.input_ids"]
    text = dual.model.text_states(ids, ids > 0)
    for row, length in enumerate(LENGTHS):
        wanted = golden["output.get_text_features.last_hidden"][row, :length]
        close(text[row, :length], wanted)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_golden_features(dual, golden, mode):
    name = f"InternVL-{mode.upper()}"
    pixels, ids = golden["input.pixel_values"], golden["input.input_ids"]
    images = dual.encode_images(pixels, mode, normalize=False)
    close(images, golden[f"output.encode_image.{name}"])
    texts = dual.encode_texts(input_ids=ids, normalize=False)
    close(texts, golden["output.encode_text"])
    wanted = golden[f"output.logits_per_image.{name}"]
    for given in ((pixels, ids), (images, texts), (pixels, texts), (images, ids)):
        found = dual.similarity(*given, mode)
        torch.testing.assert_close(found, wanted, atol=3e-4, rtol=0)
    close(dual.encode_images(pixels, mode), F.normalize(images, dim=-1))
    close(dual.encode_texts(input_ids=ids), F.normalize(texts, dim=-1))


@torch.no_grad()
def test_golden_probe_makes_norm_epsilons_visible(golden, tmp_path):
    folder = dual_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for part, factor in CASE["probe_small_residual"]["factors"].items():
        for name in tensors:
            if part in name:
                tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors")
    dual = loading.load(folder, device="cpu")
    pixels, ids = golden["input.pixel_values"], golden["input.input_ids"]
    vision = dual.model.vision_tokens(pixels)
    found = {
        "vision_last_hidden_state": vision,
        "get_image_features.query_embeds": dual.model.query_states(dual.model.encode_kv(vision)),
        "encode_text": dual.encode_texts(input_ids=ids, normalize=False),
    }
    for mode in "cg":
        name = f"InternVL-{mode.upper()}"
        found[f"encode_image.{name}"] = dual.encode_images(pixels, mode, normalize=False)
        found[f"logits_per_image.{name}"] = dual.similarity(pixels, ids, mode)
    for name, tensor in found.items():
        wanted = golden[f"probe.{name}"]
        assert float((tensor - wanted).abs().max()) <= 1e-4 * float(wanted.std()), name


def test_features_are_the_same_in_every_batch_and_however_much_is_padded(dual, golden):
    pixels, ids = golden["input.pixel_values"], golden["input.input_ids"]
    for mode in "cg":
        one = dual.encode_images(pixels, mode, batch_size=1)
        close(dual.encode_images(pixels, mode, batch_size=3), one)
    one = dual.encode_texts(input_ids=ids, batch_size=1)
    close(dual.encode_texts(input_ids=F.pad(ids, (0, 60)), batch_size=2), one)
    with torch.no_grad():
        wide = dual.model.encode_text(F.pad(ids, (0, 60)))
        close(F.normalize(wide, dim=-1), one)


def allowed(kind, num_queries, text):
    """The table of the masks, position by position."""
    length = len(text)
    rows = torch.zeros(num_queries + length, num_queries + length, dtype=torch.bool)
    for i in range(len(rows)):
        for j in range(len(rows)):
            a, b = i - num_queries, j - num_queries
            if i < num_queries and j < num_queries:
                seen = True
            elif i < num_queries:
                seen = kind == "itm"
            elif j < num_queries:
                seen = kind != "itc"
            else:
                seen = kind == "itm" or b <= a
            rows[i, j] = i == j or (seen and (b < 0 or text[b]))
    return rows


@pytest.mark.parametrize("kind", ["itc", "itm", "itg", "text"])
def test_masks_are_those_of_the_table(kind):
    text = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    found = attention_mask(kind, text, 3)
    num_queries = 0 if kind == "text" else 3
    for row in range(2):
        assert torch.equal(found[row, 0], allowed(kind, num_queries, text[row].tolist()))


@torch.no_grad()
def test_a_caption_alone_equals_the_itc_block(dual, golden):
    ids, vision = (
        golden["input.input_ids"][:4],
        dual.model.vision_tokens(golden["input.pixel_values"]),
    )
    mask = dual.model.joint_mask("itc", ids > 0)
    queries, text = dual.model.joint_states(dual.model.encode_kv(vision), ids, mask)
    close(queries, dual.model.query_states(dual.model.encode_kv(vision)))
    alone = dual.model.text_states(ids, ids > 0)
    for row, length in enumerate(LENGTHS[:4]):
        close(text[row, :length], alone[row, :length])


@torch.no_grad()
def test_blocks_share_the_pictures(dual, golden):
    """Three blocks over four images are the twelve sequences one by one."""
    pixels, ids = golden["input.pixel_values"], golden["input.input_ids"][:4]
    vision = dual.model.vision_tokens(pixels)
    blocks = torch.cat([ids, ids.roll(1, 0), ids.roll(2, 0)])
    kinds = ["itm", "itg", "itc"]
    mask = torch.cat(
        [
            dual.model.joint_mask(kind, part > 0)
            for kind, part in zip(kinds, blocks.split(4), strict=True)
        ]
    )
    queries, text = dual.model.joint_states(dual.model.encode_kv(vision), blocks, mask)
    for row in range(12):
        one = dual.model.encode_kv(vision[row % 4 : row % 4 + 1])
        part = slice(row, row + 1)
        alone = dual.model.joint_states(one, blocks[part], mask[part])
        close(queries[part], alone[0])
        close(text[part], alone[1])


def test_a_match_looks_at_the_whole_caption(dual, golden):
    pixels, ids = golden["input.pixel_values"], golden["input.input_ids"][:4]
    found = dual.match(pixels, ids)
    assert found.shape == (4,)
    assert ((found > 0) & (found < 1)).all()
    close(dual.match(pixels, ids, batch_size=1), found)
    changed = ids.clone()
    changed[0, 0] = 9
    assert not torch.allclose(dual.match(pixels, changed)[0], found[0])
    with pytest.raises(UserError, match="pairs, not 4 images and 3 texts"):
        dual.match(pixels, ids[:3])


def test_every_weight_gets_its_gradient(golden, tmp_path):
    model = loading.load(dual_folder(tmp_path), device="cpu").model.train()
    plain = gradients(model, golden)
    assert [name for name, grad in plain.items() if grad is None] == []
    for block in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layer):
        recompute(block)
    again = gradients(model, golden)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_layers_compile_whole(golden, tmp_path):
    """Without a break, for queries, captions and both; the values do not change."""
    model = loading.load(dual_folder(tmp_path), device="cpu").model
    blocks = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layer]
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = model.encode_image(golden["input.pixel_values"], ["g"])[0]
    close(found, golden["output.encode_image.InternVL-G"])
    close(model.encode_text(golden["input.input_ids"]), golden["output.encode_text"])


def gradients(model, golden):
    model.zero_grad(set_to_none=True)
    ids = golden["input.input_ids"][:4]
    vision = model.vision_tokens(golden["input.pixel_values"])
    mask = torch.cat([model.joint_mask(kind, ids > 0) for kind in ("itm", "itc", "itg")])
    queries, text = model.joint_states(model.encode_kv(vision), ids.repeat(3, 1), mask)
    c, g = model.image_embeds(vision), model.query_embeds(queries[4:8])
    t = model.text_embeds(text[4:8], ids > 0)
    similarity = model.logit_scale.exp() * F.normalize(c + g, dim=-1) @ F.normalize(t, dim=-1).T
    itm, itg = model.itm_logits(queries[:4]), model.lm_head(text[8:, :3])
    loss = similarity.logsumexp(1).sum() + itm.logsumexp(1).sum() + itg.logsumexp(2).mean()
    loss.backward()
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def test_a_fresh_model_can_learn():
    torch.manual_seed(0)
    model = DualModel(from_official(CASE["config"]))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    queries = model.model.query_tokens.weight[0]
    assert len(queries.unique(dim=0)) == len(queries)
    assert float(model.logit_scale.exp().detach()) == pytest.approx(1 / 0.07)
    assert float(model.text_projection.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.1)


def test_dimensions_come_from_the_configuration():
    config = from_official(
        CASE["config"] | {"num_query_token": 5, "cross_attention_frequency": 3, "clip_embed_dim": 7}
    )
    model = DualModel(config).eval()
    crossed = [layer.cross_attn is not None for layer in model.model.language_model.layers]
    assert crossed == [True, False, False, True]
    with torch.no_grad():
        assert model.encode_image(torch.rand(2, 3, 84, 84), ["g"])[0].shape == (2, 7)
    again = DualConfig.from_dict(config.to_dict())
    assert again.text_config.num_query_tokens == 5
    assert again.image_size == 84


def test_bfloat16_stays_close(golden, tmp_path):
    dual = loading.load(dual_folder(tmp_path), device="cpu", dtype="bfloat16")
    assert dual.dtype == torch.bfloat16
    wanted = F.normalize(golden["output.encode_image.InternVL-G"], dim=-1)
    found = dual.encode_images(golden["input.pixel_values"], "g")
    assert found.dtype == torch.float32
    assert float((found * wanted).sum(-1).min()) > 0.99


def test_other_input_is_refused(dual, golden):
    with pytest.raises(UserError, match='mode is "c"'):
        dual.encode_images(golden["input.pixel_values"], "InternVL-C")
    with pytest.raises(UserError, match=r"normalized and of shape \(B, 3, 84, 84\)"):
        dual.encode_images(torch.rand(1, 3, 56, 56))
    with pytest.raises(UserError, match="normalized and of shape"):
        dual.encode_images(torch.zeros(1, 3, 84, 84, dtype=torch.uint8))
    with pytest.raises(UserError, match="either texts or input_ids"):
        dual.encode_texts()
    assert dual.encode_images([]).shape == (0, 48)
    assert dual.encode_texts([]).shape == (0, 48)
