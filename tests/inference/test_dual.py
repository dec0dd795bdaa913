"""The Dual handle as a user holds it: images of every kind, strings, and what goes wrong."""

import base64
import io

import accelerate
import numpy as np
import pytest
import torch
from dual_folders import dual_folder, dual_golden, pth_file, small_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

import internvl
from internvl.data.pairs import center_square, clean_caption, pad_right, square
from internvl.errors import BadImage, ModelFolderError, UserError
from internvl.inference import load as loading
from internvl.models.vision import normalize_tiles

TEXTS = ["a photo of a red panda", "two cats", "一张熊猫的照片", ""]


def picture(seed, size=(100, 70)):
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """With a tokenizer; ids that it does not have are never generated."""
    folder = small_tokenizer(dual_folder(tmp_path_factory.mktemp("dual")))
    tensors = load_file(folder / "model.safetensors")
    tensors["qllama.lm_head.weight"][310:] = 0
    tensors["qllama.lm_head.weight"][2] *= 2  # captions end
    save_file(tensors, folder / "model.safetensors")
    return internvl.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def images():
    return [picture(seed) for seed in range(3)]


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["c", "g"])
def test_a_picture_is_the_same_however_it_is_given(dual, images, mode, tmp_path):
    wanted = dual.encode_images(images, mode)
    assert wanted.shape == (3, 48)
    assert wanted.dtype == torch.float32
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(3))
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    tensor = normalize_tiles(torch.stack([square(i, 84) for i in images]), torch.float32)
    for given in (paths, list(map(str, paths)), list(map(encoded, images)), tensor):
        assert torch.equal(dual.encode_images(given, mode), wanted)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)
    one = dual.encode_images(images, mode, batch_size=1)
    torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)


def test_classification_looks_at_the_middle(dual, images):
    middle = torch.stack([center_square(image, 84) for image in images])
    found = dual.encode_images(images, crop=True)
    assert torch.equal(found, dual.encode_images(normalize_tiles(middle, torch.float32)))
    assert not torch.allclose(found, dual.encode_images(images), atol=1e-2)


def test_texts_are_their_ids(dual):
    rows = [dual.encoder.embedding(text) for text in TEXTS]
    assert max(map(len, rows)) > min(map(len, rows))
    found = dual.encode_texts(TEXTS)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    for ids in (pad_right(rows), pad_right(rows, 80)):
        given = dual.encode_texts(input_ids=ids)
        torch.testing.assert_close(given, found, atol=1e-5, rtol=1e-5)
    for text, wanted in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(dual.encode_texts([text])[0], wanted, atol=1e-5, rtol=1e-5)
    backwards = dual.encode_texts(TEXTS[::-1], batch_size=2)
    torch.testing.assert_close(backwards, found.flip(0), atol=1e-5, rtol=1e-5)


def test_similarity_is_the_scaled_cosine(dual, images):
    scale = float(dual.model.logit_scale.detach().exp())
    wanted = scale * dual.encode_images(images, "g") @ dual.encode_texts(TEXTS).T
    torch.testing.assert_close(dual.similarity(images, TEXTS, "g"), wanted)


def test_a_match_reads_the_cleaned_caption_without_the_word_before_it(dual, images):
    texts = ["A Red Panda!", "two cats.", "the sofa"]
    ids = pad_right([dual.encoder.matching(clean_caption(text)) for text in texts])
    found = dual.match(images, texts)
    torch.testing.assert_close(found, dual.match(images, ids))
    torch.testing.assert_close(found, dual.match(images, list(map(clean_caption, texts))))
    for image, text, wanted in zip(images, texts, found, strict=True):
        torch.testing.assert_close(dual.match([image], [text])[0], wanted)


@pytest.mark.parametrize("num_beams", [1, 5])
def test_captions_are_strings_of_their_tokens(dual, images, num_beams):
    settings = {"num_beams": num_beams, "max_new_tokens": 12, "min_new_tokens": 3}
    found = dual.caption(images, **settings)
    assert all(isinstance(text, str) and text == text.strip() for text in found)
    assert [dual.caption([image], **settings)[0] for image in images] == found
    assert dual.caption(images, batch_size=2, **settings) == found
    assert dual.caption(images, prompt="two cats", **settings) != found
    assert dual.caption([]) == []


def test_a_caption_leaves_out_ids_that_the_tokenizer_lacks(images, tmp_path):
    """A model whose output matrix has more rows than the tokenizer has tokens."""
    folder = small_tokenizer(dual_folder(tmp_path))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["qllama.lm_head.weight"]
    head[:320] = 0
    head[321] = -head[320]  # one of the two is above zero: an id beyond the tokenizer's
    save_file(tensors, folder / "model.safetensors")
    model = internvl.load(folder, device="cpu", dtype="float32")
    assert model.caption(images, max_new_tokens=3) == [""] * len(images)


def test_beams_are_scored_by_their_mean_unless_asked_otherwise(dual):
    images = [picture(seed) for seed in range(4)]
    settings = {"num_beams": 4, "max_new_tokens": 20, "min_new_tokens": 1}
    total, mean, long = (
        dual.caption(images, length_penalty=x, **settings) for x in (0.0, 1.0, 9.0)
    )
    assert dual.caption(images, **settings) == mean
    assert mean not in (total, long)


def test_a_picture_that_cannot_be_read_is_named(dual, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(encoded(images[0])[:200])
    with pytest.raises(BadImage, match=r"^image 1: .*broken.jpg: the image cannot be decoded"):
        dual.encode_images([images[0], tmp_path / "broken.jpg"])
    with pytest.raises(BadImage) as caught:
        dual.encode_images(f"data:image/png;base64,{'é' * 5000}")
    assert len(str(caught.value)) < 200
    with pytest.raises(BadImage, match="^image 0: the path of the image is empty; write"):
        dual.encode_images("")
    with pytest.raises(BadImage, match="image 0: not an image"):
        dual.encode_images([b"no image"])
    with pytest.raises(BadImage, match="there is no image"):
        dual.caption([tmp_path / "none.png"])


def test_one_text_or_image_is_one_row(dual, images, tmp_path):
    text, array = "a red panda", np.asarray(images[0])
    (tmp_path / "a.png").write_bytes(encoded(images[0]))
    path = tmp_path / "a.png"
    wanted, seen = dual.encode_texts([text]), dual.encode_images([images[0]])
    for given in (text, np.str_(text), (text,), iter([text]), np.array([text]), np.array(text)):
        assert torch.equal(dual.encode_texts(given), wanted)
    address = f"data:image/png;base64,{base64.b64encode(encoded(images[0])).decode()}"
    one = [images[0], path, str(path), encoded(images[0]), array, array[None], address]
    one += [io.BytesIO(encoded(images[0]))]
    pixels = normalize_tiles(square(images[0], 84)[None], torch.float32)
    for given in (*one, [array], iter([path]), np.array([str(path)]), pixels, pixels[0]):
        assert torch.equal(dual.encode_images(given), seen)
    gray = array[..., 0]
    assert torch.equal(dual.encode_images(gray), dual.encode_images(Image.fromarray(gray)))
    assert dual.encode_images(np.stack([array] * 3)).shape == (3, 48)
    assert torch.equal(dual.encode_images_of(path, "c")["c"], seen)
    assert dual.similarity(path, text).shape == (1, 1)
    torch.testing.assert_close(dual.similarity(path, text), dual.similarity(seen[0], wanted[0]))
    ids = torch.tensor(dual.encoder.embedding(text))
    torch.testing.assert_close(dual.encode_texts(input_ids=ids), wanted)
    assert torch.equal(dual.match(path, text), dual.match([path], [text]))
    assert dual.match(array, text).shape == (1,)
    settings = {"num_beams": 1, "max_new_tokens": 8}
    assert dual.caption(str(path), **settings) == dual.caption([path], **settings)


def test_texts_and_images_that_are_refused(dual, images):
    for texts, says in (
        (["a", None], "text 1 is a NoneType"),
        ([["a"]], "text 0 is a list"),
        (["a", float("nan")], r"text 1 is a float \(nan\), not a text"),
        (["a \ud83d"], r"text 0 has half of a character \(\\ud83d\) at place 2"),
        ({"a"}, "texts: a set has no places; give a list"),
        ({"a": 1}, "texts: a dict has no places"),
        (b"a", "texts must be a list, not bytes"),
        (5, "texts must be a list, not int"),
    ):
        for call in (dual.encode_texts, lambda t: dual.similarity(images, t)):
            with pytest.raises(UserError, match=says):
                call(texts)
        with pytest.raises(UserError, match=says):
            dual.match(images[:1], texts)
    with pytest.raises(UserError, match="images must be a list, not int"):
        dual.encode_images(3)
    with pytest.raises(BadImage, match="image 0: .*uint8"):
        dual.encode_images(np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match="mode is \"c\" .* not 'cg'"):
        dual.encode_images_of(images, "cg")
    with pytest.raises(UserError, match="1 images and 2 texts"):
        dual.match(images[0], ["a", "b"])
    with pytest.raises(UserError, match=r"features of images must be float \(B, 48\)"):
        dual.similarity(torch.ones(1, 40), "a")
    with pytest.raises(UserError, match=r"input_ids must be int64 \(R, L\), not torch.float32"):
        dual.encode_texts(input_ids=torch.ones(1, 3))
    with pytest.raises(UserError, match="input_ids must be a tensor"):
        dual.encode_texts(input_ids=[[1, 2]])
    with pytest.raises(UserError, match="prompt is a list"):
        dual.caption(images, ["a"])


@pytest.mark.parametrize(
    "keys", [{"num_beams": 0}, {"max_new_tokens": 0}, {"min_new_tokens": -1}, {"batch_size": 0}]
)
def test_settings_of_a_caption(keys, dual, images):
    with pytest.raises(UserError, match=f"{next(iter(keys))} must be a whole number"):
        dual.caption(images, **keys)
    with pytest.raises(UserError, match="length_penalty must be a number, not nan"):
        dual.caption(images, length_penalty=float("nan"))


@pytest.mark.parametrize("size", [0, -1, True])
def test_batches_of_nothing(size, dual, images):
    for call, given in (
        *((dual.encode_images, [images]), (dual.encode_texts, ["a"])),
        *((dual.match, [images[:1], "a"]), (dual.caption, [images])),
    ):
        with pytest.raises(UserError, match="batch_size must be a whole number of at least 1"):
            call(*given, batch_size=size)


def test_weights_may_be_elsewhere_until_they_are_used(images, tmp_path):
    """As device_map leaves them where a GPU is too small: every part is called as a module."""
    dual = loading.load(small_tokenizer(dual_folder(tmp_path)), device="cpu")
    pixels, ids = dual_golden()["input.pixel_values"], dual_golden()["input.input_ids"]
    wanted = dual.encode_images(pixels, "g"), dual.encode_texts(input_ids=ids)
    match = dual.match(pixels, ids[:4])
    texts = dual.caption(pixels, num_beams=3, max_new_tokens=5)
    for part in dual.model.children():
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    assert dual.model.model.query_tokens.weight.is_meta
    assert torch.equal(dual.encode_images(pixels, "g"), wanted[0])
    assert torch.equal(dual.encode_texts(input_ids=ids), wanted[1])
    assert torch.equal(dual.match(pixels, ids[:4]), match)
    assert dual.caption(pixels, num_beams=3, max_new_tokens=5) == texts


def test_the_folder_of_internvl_c_needs_no_name(tmp_path):
    file = pth_file(tmp_path / "here")
    beside = (file.parent / "config.json").read_text()
    (file.parent / "config.json").unlink()
    with pytest.raises(ModelFolderError, match="missing weights"):  # the release's sizes
        loading.load(file.parent)
    (file.parent / "config.json").write_text(beside)
    assert loading.load(file, device="cpu").model.num_queries == 0


def test_stochastic_depth_is_for_training(tmp_path):
    dual = loading.load(dual_folder(tmp_path), device="cpu", drop_path=0.5)
    pixels = dual_golden()["input.pixel_values"]
    with torch.no_grad():
        still = dual.model.vision_tokens(pixels)
        assert torch.equal(dual.model.vision_tokens(pixels), still)
        dual.model.train()
        torch.manual_seed(0)
        assert not torch.allclose(dual.model.vision_tokens(pixels), still, atol=1e-2)
