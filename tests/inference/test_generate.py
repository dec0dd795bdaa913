"""Answers: those of the original's chat(); batches, streams, beams and samples of our own."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_folders import (
    PROMPT_RUNS,
    add_tokenizer,
    golden_tensors,
    official_folder,
    prompt_folder,
    shared,
)
from PIL import Image

from internvl.config import TilesConfig
from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS
from internvl.data.records import Message, Sample
from internvl.data.templates import TEMPLATES
from internvl.data.tokenizers import load_tokenizer
from internvl.errors import BadImage, BadSample, UserError
from internvl.inference import generate
from internvl.inference import load as loading
from internvl.inference.generate import Request

CHAT = "internlm2.internlm2-chat"
QUESTIONS = {
    "single_image_2tiles_no_placeholder": (["What is it?"], [2]),
    "single_image_placeholder_in_question": (["Look: <image>\nDescribe."], [1]),
    "two_images_num_patches_list": (["Image-1: <image>\nImage-2: <image>\nCompare."], [2, 1]),
    "text_only": (["Hello"], []),
    "system_message_override": (["<image>\nHi"], [1]),
    "return_history": (["<image>\nWhat is it?"], [1]),
    "second_turn_history": (["<image>\nWhat is it?", "A dog.", "And then?"], [1]),
}
ROLES = ("user", "assistant", "user")


def golden_request(key: str, name: str) -> Request:
    texts, counts = QUESTIONS[name]
    messages = [Message(role, text) for role, text in zip(ROLES, texts, strict=False)]
    if name == "system_message_override":
        messages.insert(0, Message("system", "You are tiny."))
    rows = PROMPT_RUNS[key]["runs"][name]["pixel_value_rows"] or []
    return Request(messages, tiles_of(key, rows, counts))


def tiles_of(key: str, rows: list[int], counts: list[int]) -> list[torch.Tensor]:
    pixels = golden_tensors(f"chat_{key.partition('.')[0]}")["input.pixel_values"]
    return list(pixels[rows].split(counts)) if counts else []


def returned(key: str, text: str) -> str:
    """What the original returned, without the token its library puts first: the tiny Qwen2's
    configuration makes that an ordinary one, which shows as a quotation mark."""
    return text.removeprefix('"').strip() if key.startswith("qwen2") else text


@pytest.fixture(scope="module", params=PROMPT_RUNS)
def golden_chat(request, tmp_path_factory):
    folder = prompt_folder(request.param, tmp_path_factory.mktemp("golden") / "model")
    return request.param, loading.load(folder, device="cpu")


@pytest.mark.parametrize("name", QUESTIONS)
def test_golden_prompts_and_answers(name, golden_chat):
    """Prompt ids, generated ids and returned text of the original's chat()."""
    key, chat = golden_chat
    run, request = PROMPT_RUNS[key]["runs"][name], golden_request(key, name)
    prompt = generate.encode(request, chat.encoder, chat.tiles)
    assert prompt.input_ids.tolist() == run["input_ids"][0]
    wanted = run["generated_ids"][0][1:]  # without the BOS the original's library puts first
    found = run["returned"]
    found = found if isinstance(found, str) else found[0]
    assert generate.answer_text(wanted, chat.encoder) == returned(key, found)
    assert chat.answer([request], max_new_tokens=8) == [returned(key, found)]
    assert "".join(chat.stream(request, max_new_tokens=8)) == returned(key, found)


def test_golden_batch(golden_chat):
    """The original's batch_chat: two tiles and one tile, padded on the left."""
    key, chat = golden_chat
    run = PROMPT_RUNS[key]["runs"]["batch_chat"]
    texts = ["What?", "Describe the image in detail."]
    images = tiles_of(key, run["pixel_value_rows"], [2, 1])
    requests = [
        Request([Message("user", text)], [image]) for text, image in zip(texts, images, strict=True)
    ]
    prompts = [generate.encode(request, chat.encoder, chat.tiles) for request in requests]
    side = chat.tokenizer.padding_side
    pad_id = chat.tokenizer.pad_token_id
    ids, mask = generate.pad_left(prompts, pad_id)
    assert (ids.tolist(), mask.tolist()) == (run["input_ids"], run["attention_mask"])
    wanted = [returned(key, text) for text in run["returned"]]
    assert chat.answer(requests, max_new_tokens=8) == wanted
    assert chat.tokenizer.padding_side == side


def test_golden_questions_as_one_batch(golden_chat):
    """All of them together get the answers they get alone."""
    key, chat = golden_chat
    found = chat.answer([golden_request(key, name) for name in QUESTIONS], max_new_tokens=8)
    for name, text in zip(QUESTIONS, found, strict=True):
        run = PROMPT_RUNS[key]["runs"][name]["returned"]
        assert text == returned(key, run if isinstance(run, str) else run[0]), name


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return loading.load(prompt_folder(CHAT, tmp_path_factory.mktemp("own") / "m"), device="cpu")


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed(pictures: list) -> list[Request]:
    """Several tiles, several images, text only, history, in one batch."""

    def ask(*texts: str) -> list[dict[str, str]]:
        return [{"role": r, "content": t} for r, t in zip(ROLES, texts, strict=False)]

    return [
        Request(ask("What is it?"), [pictures[0]]),
        Request(ask("One <image>\nand two <image>\nCompare."), pictures[1:3]),
        Request(ask("Hello")),
        Request(ask("<image>\nWhat is it?", "A dog.", "Sure?"), [pictures[3]]),
        Request(ask("Hello", "Hi.", "Bye")),
    ]


PICTURES = [noise(*size) for size in ((300, 100, 1), (90, 90, 2), (100, 260, 3), (200, 200, 4))]
BEAMS = {"num_beams": 3, "max_new_tokens": 6}


@pytest.mark.parametrize("settings", [{"max_new_tokens": 12}, BEAMS], ids=["greedy", "beams"])
def test_a_mixed_batch_gets_the_single_answers(settings, chat):
    requests = mixed(PICTURES)
    assert len({len(chat.encoder.prompt([], [])), *(len(r.images) for r in requests)}) > 3
    alone = [chat.answer([request], **settings)[0] for request in requests]
    assert chat.answer(requests, **settings) == alone
    assert chat.answer(requests, batch_size=2, **settings) == alone


def test_real_photos_of_several_sizes(chat):
    names = ("kitti_1242x375.jpg", "tiny_37x25.png", "unsplash_portrait_1944x2592.jpg")
    files = [shared(f"data/tiling/{n}") for n in (*names, "panorama_strip_3000x600.jpg")]
    requests = mixed(files)
    alone = [chat.answer([request], max_new_tokens=8)[0] for request in requests]
    assert chat.answer(requests, max_new_tokens=8) == alone


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "GptOssForCausalLM"])
def test_a_mixed_batch_on_other_language_models(architecture, tmp_path):
    """Sliding windows, sinks and long rope next to padding."""
    folder = add_tokenizer(official_folder(architecture, tmp_path, template="Hermes-2"), "qwen2")
    chat = loading.load(folder, device="cpu")
    requests = mixed(PICTURES)
    alone = [chat.answer([request], max_new_tokens=8)[0] for request in requests]
    assert chat.answer(requests, max_new_tokens=8) == alone


def test_answers_come_in_the_order_of_the_requests_and_progress_is_told(chat):
    requests = [Request([{"role": "user", "content": "a" * n}]) for n in (1, 30, 10)]
    told = []
    settings = generate.Settings(max_new_tokens=3)
    found = generate.answers(
        chat.model, chat.encoder, chat.tiles, requests, settings, batch_size=2, progress=told.append
    )
    assert found == [chat.answer([r], max_new_tokens=3)[0] for r in requests]
    assert told == [1, 1, 1]


def test_samples_follow_torchs_seed(chat):
    request = Request([{"role": "user", "content": "Hello"}])

    def sample(seed: int, **settings) -> str:
        torch.manual_seed(seed)
        return chat.answer([request], max_new_tokens=12, **settings)[0]

    assert sample(1, temperature=1.5) == sample(1, temperature=1.5)
    assert len({sample(seed, temperature=1.5) for seed in range(4)}) > 1
    greedy = sample(0)
    assert sample(3, temperature=1.5, top_k=1) == greedy
    assert sample(3, temperature=1.5, top_p=1e-6) == greedy
    assert sample(3, temperature=1e-4) == greedy


@pytest.mark.parametrize(
    "settings", [{}, {"extra": {"renormalize_logits": True}}], ids=["engine", "generate"]
)
def test_a_seeded_sample_does_not_depend_on_its_company(settings, chat):
    requests, seeds = mixed(PICTURES)[2:], [7, 8, 9]
    settings = {"temperature": 1.0, "max_new_tokens": 8, **settings}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = chat.answer(requests, seeds=seeds, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    one_by_one = [
        chat.answer(r, seed=seed, **settings)[0] for r, seed in zip(requests, seeds, strict=True)
    ]
    assert one_by_one == together
    assert (
        chat.answer(requests[::-1], seeds=seeds[::-1], batch_size=2, **settings) == together[::-1]
    )
    assert chat.answer(requests, seeds=[1, 2, 3], **settings) != together
    with pytest.raises(UserError, match="2 seeds for 3 requests; give one for each"):
        chat.answer(requests, seeds=[1, 2], **settings)


def test_an_answer_continues_its_prefix(chat):
    question = [{"role": "user", "content": "<image>\nWhat is it?"}]
    plain = chat.answer(Request(question, [PICTURES[1]]), max_new_tokens=12)[0]
    request = Request(question, [PICTURES[1]], prefix="A dog on")
    (answer,) = chat.answer(request, max_new_tokens=12)
    assert answer.startswith("A dog on")
    assert len(answer) > len("A dog on")
    assert answer != plain
    assert "".join(chat.stream(request, max_new_tokens=12)) == answer


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([("human", "Hi")], "turn 1 is from 'human'; known: system, user, assistant"),
        ([("user", "Hi"), ("assistant", "call"), ("tool", "42")], "turn 3 is from 'tool'"),
        ([("user", "Hi"), ("system", "Be short"), ("user", "Ho")], "turn 2 is from system; only"),
        ([("user", "Hi"), ("user", "Ho")], "turns 1 and 2 are both from user"),
        ([("user", "Hi"), ("assistant", "Ho")], "it ends with an answer"),
        ([("user", "Hi"), ("assistant", " "), ("user", "Ho")], "an answer is empty"),
        ([], "the conversation is empty"),
        ([("user", "<IMG_CONTEXT>")], "the text must not contain <IMG_CONTEXT>"),
        ([("user", "What is <image>?")], r"1 <image> mark.*0 image.* and \\<image>"),
        ([("user", "What is <video>?")], "1 <video> mark in the questions, but 0 video"),
    ],
)
def test_inference_refuses_what_training_refuses(turns, says, chat):
    messages = [{"role": role, "content": text} for role, text in turns]
    request = Request(messages)
    with pytest.raises(BadSample, match=f"^request: .*{says}"):
        chat.answer([request])
    with pytest.raises(BadSample, match=f"^request: .*{says}"):
        chat.stream(request)
    good = Request([{"role": "user", "content": "Hi"}])
    with pytest.raises(BadSample, match=rf"^requests\[1\]: .*{says}"):
        chat.answer([good, request, good])
    with pytest.raises(BadSample, match=says):
        chat.answer([Request([Message(role, text) for role, text in turns])])
    if turns and turns[-1][0] == "user" and turns[0][0] == "user":
        answered = [*(Message(*turn) for turn in turns), Message("assistant", "Yes.")]
        with pytest.raises(BadSample, match=says):
            chat.encoder.encode(Sample("x", tuple(answered)), ())


def test_a_request_is_one_and_its_messages_a_list(chat):
    request = Request([{"role": "user", "content": "Hi"}])
    assert chat.answer(request, max_new_tokens=3) == chat.answer([request], max_new_tokens=3)
    assert chat.answer((r for r in [request]), max_new_tokens=3) == chat.answer(
        [request], max_new_tokens=3
    )
    assert chat.answer([]) == []
    with pytest.raises(
        UserError, match=r"request is a dict, not internvl.Request\(messages, images"
    ):
        chat.answer([{"role": "user", "content": "Hi"}])
    with pytest.raises(UserError, match="request is a list, not internvl.Request"):
        chat.stream([request])
    with pytest.raises(UserError, match="requests must be a list, not int"):
        chat.answer(5)
    with pytest.raises(BadSample, match="`messages` must be a list; it is a int"):
        chat.answer([Request(5)])


def test_an_answer_that_opens_a_conversation_is_dropped_as_in_training(chat):
    turns = [{"role": "user", "content": "Hi"}]
    greeted = [{"role": "assistant", "content": "Welcome."}, *turns]
    found = [generate.encode(Request(m), chat.encoder, chat.tiles) for m in (turns, greeted)]
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()


def test_an_image_is_the_same_however_a_request_gives_it(chat, tmp_path):
    image = noise(200, 90, 5)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.asarray(image)
    question = [{"role": "user", "content": "<image>\nWhat?"}]
    wanted = generate.encode(Request(question, [image]), chat.encoder, chat.tiles)
    path = tmp_path / "a.png"
    one = [image, str(path), path, data, array, address, torch.tensor(array).movedim(-1, 0)]
    one.append(io.BytesIO(data))
    given = [*one, *([i] for i in one), array[None], (image,), iter([path]), np.array([str(path)])]
    requests = [Request(question, images) for images in given]
    for part in ({"image": image}, {"image": array}, {"path": path}, {"url": str(path)}):
        parts = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
        requests.append(Request([{"role": "user", "content": parts}]))
    inline = {"type": "image_url", "image_url": {"url": address}}
    words = {"type": "text", "text": "What?"}
    requests.append(Request([{"role": "user", "content": [inline, words]}]))
    for request in requests:
        prompt = generate.encode(request, chat.encoder, chat.tiles)
        assert prompt.input_ids.tolist() == wanted.input_ids.tolist()
        assert torch.equal(prompt.tiles, wanted.tiles)
    assert Request(question, None).images == ()
    two = Request(question, np.stack([array, array]))
    with pytest.raises(BadSample, match="1 <image> mark.* but 2 image"):
        chat.answer([two])


@pytest.mark.parametrize("normalize", STATISTICS)
def test_a_square_is_padded_in_the_colour_of_training(chat, normalize, monkeypatch):
    """The mean of the statistics that the model's pixels are normalized with."""
    square = TilesConfig(size=chat.tiles.size, max=1, pad_square=True)
    own = replace(chat, tiles=square)
    monkeypatch.setitem(own.model.config.internvl, "normalize", normalize)
    seen = []
    monkeypatch.setattr(generate, "generate", lambda m, e, prompts, s: seen.extend(prompts) or [""])
    monkeypatch.setattr(generate, "stream", lambda m, e, prompt, s: seen.append(prompt))
    request = Request([{"role": "user", "content": "What?"}], Image.new("RGB", (90, 30)))
    own.answer([request])
    own.stream(request)
    color = torch.tensor([int(255 * channel) for channel in STATISTICS[normalize][0]])
    for prompt in seen:
        assert prompt.tiles.shape[0] == 1
        assert prompt.tiles[0, :, 0, 0].tolist() == color.tolist()
    assert len(seen) == 2


def test_parts_and_images_are_in_the_order_of_their_marks(chat):
    parts = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "or <image>?"}]
    mixed = Request([{"role": "user", "content": parts}], PICTURES[1])
    text = [{"role": "user", "content": "<image>\nor <image>?"}]
    found, wanted = (
        generate.encode(request, chat.encoder, chat.tiles)
        for request in (mixed, Request(text, PICTURES[:2]))
    )
    assert torch.equal(found.tiles, wanted.tiles)
    assert found.input_ids.tolist() == wanted.input_ids.tolist()


def test_an_image_that_cannot_be_read_is_named_with_its_request(chat, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = Request([{"role": "user", "content": "Hi"}])
    bad = Request([{"role": "user", "content": "Hi"}], [PICTURES[0], tmp_path / "broken.png"])
    with pytest.raises(BadImage, match=r"^requests\[1\]: image 1: .*not an image"):
        chat.answer([good, bad])
    floats = Request([{"role": "user", "content": "Hi"}], np.zeros((9, 9, 3)))
    with pytest.raises(BadImage, match="^request: image 0: .*uint8"):
        chat.answer(floats)
    with pytest.raises(BadImage, match="^request: image 0: an image is not base64"):
        chat.answer(Request(good.messages, "data:image/png;base64,é"))
    with pytest.raises(BadImage, match="^request: image 1: the path of the image is empty; write"):
        chat.answer(Request(good.messages, [PICTURES[0], ""]))
    with pytest.raises(UserError, match="images: a set has no places; give a list"):
        Request(good.messages, {"a.png"})


@pytest.mark.parametrize("temperature", [0, 0.0, None, np.float32(0)])
@pytest.mark.parametrize("more", [{}, BEAMS, {"top_p": 0.5, "top_k": 3}])
def test_a_temperature_of_zero_is_greedy(temperature, more, chat):
    request = Request([{"role": "user", "content": "Hello"}])
    more = {"max_new_tokens": 8, **more}
    plain = {key: value for key, value in more.items() if not key.startswith("top_")}
    assert chat.answer(request, temperature=temperature, **more) == chat.answer(request, **plain)
    if "num_beams" not in more:
        pieces = chat.stream(request, temperature=temperature, **more)
        assert ["".join(pieces)] == chat.answer(request, **plain)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"temperature": -0.1}, "temperature must be a number above 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, not nan"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be a number above 0, not 'hot'"),
        ({"temperature": True}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_p": None}, "top_p must be"),
        ({"min_p": 1.5}, "min_p must be a number above 0 and at most 1, not 1.5"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, not -1"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be"),
        ({"min_new_tokens": -1}, "min_new_tokens must be"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens \(9\) is above max_new"),
        ({"num_beams": 0}, "num_beams must be"),
        ({"num_beams": True}, "num_beams must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
        ({"max_tokens": 5}, "there is no setting 'max_tokens'; did you mean max_new_tokens"),
        ({"temprature": 5}, "there is no setting 'temprature'; did you mean temperature"),
        ({"zzz": 5}, "there is no setting 'zzz'; known are max_new_tokens, min_new_tokens"),
        ({"do_sample": True}, "there is no setting 'do_sample'; set temperature"),
        (
            {"length_penalty": 0.5},
            "is a setting of transformers: write extra={'length_penalty': …}",
        ),
        (
            {"extra": {"length_penaltie": 1}},
            "'length_penaltie' is not followed here; did you mean l",
        ),
        ({"extra": {"max_new_tokens": 1}}, "extra: max_new_tokens is a setting of its own"),
        ({"extra": {"num_return_sequences": 2}}, "not followed here; an answer is one text"),
        ({"extra": {"max_length": 2}}, "not followed here; use max_new_tokens"),
        ({"extra": {"eos_token_id": 2}}, "not followed here; the template's end"),
        ({"extra": {"_from_model_config": 2}}, "not followed here"),
        ({"extra": [1]}, "extra must be a dict of settings, not list"),
    ],
)
def test_settings_that_are_refused(keys, says, chat):
    request = Request([{"role": "user", "content": "Hello"}])
    for use in (chat.answer, chat.stream):
        with pytest.raises(UserError, match=says):
            use(request, **keys)


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_batches_of_no_request(size, chat):
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1"):
        chat.answer([Request([{"role": "user", "content": "Hello"}])], batch_size=size)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", [[]]),
        ("cache_implementation", "foo"),
        ("max_time", "a"),
        ("forced_eos_token_id", -5),
        ("watermarking_config", {"a": 1}),
        ("sequence_bias", {(1,): "a"}),
        ("assistant_early_exit", 1),
        ("length_penalty", "x"),
        ("no_repeat_ngram_size", -1),
        ("encoder_no_repeat_ngram_size", 1.5),
        ("exponential_decay_length_penalty", (1,)),
        ("suppress_tokens", "ab"),
        ("begin_suppress_tokens", 3.5),
        ("renormalize_logits", "yes"),
        ("typical_p", 2.0),
        ("top_h", 7),
        ("epsilon_cutoff", "x"),
        ("forced_eos_token_id", 10**9),
        ("prompt_lookup_num_tokens", 0),
        ("early_stopping", "soon"),
        ("compile_config", 3),
    ],
)
def test_a_wrong_value_of_transformers_is_refused_with_its_key(key, value, chat):
    request = Request([{"role": "user", "content": "Hello"}])
    with pytest.raises(UserError, match=f"extra.*{key}") as refused:
        chat.answer(request, max_new_tokens=3, extra={key: value})
    assert repr(value)[:60] in str(refused.value)


def test_an_error_of_the_model_is_not_blamed_on_extra(chat, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("ours")

    monkeypatch.setattr(chat.model.lm_head, "forward", broken)
    with pytest.raises(ValueError, match=r"^ours$"):
        chat.answer(
            Request([{"role": "user", "content": "Hello"}]), extra={"no_repeat_ngram_size": 2}
        )


def test_settings_become_the_generation_config():
    settings = generate.Settings(num_beams=4, min_new_tokens=2, extra={"length_penalty": 0.5})
    config = settings.generation_config(7, 8)
    assert (config.num_beams, config.min_new_tokens, config.length_penalty) == (4, 2, 0.5)
    assert (config.eos_token_id, config.pad_token_id, config.do_sample) == (7, 8, False)


def test_the_pieces_of_a_stream_are_the_answer(chat):
    for request in mixed(PICTURES):
        pieces = list(chat.stream(request, max_new_tokens=24))
        assert "".join(pieces) == chat.answer([request], max_new_tokens=24)[0]
        assert len(pieces) > 1


def test_ids_beyond_the_tokenizer_are_left_out_of_answers_and_streams(tmp_path):
    """A model whose output matrix has more rows than its tokenizer has tokens."""
    folder = prompt_folder(CHAT, tmp_path / "m")
    chat = loading.load(folder, device="cpu")
    rows = chat.model.lm_head.weight.data
    beyond = len(chat.encoder.tokenizer)
    assert len(rows) > beyond + 2
    rows[:beyond] = 0
    rows[beyond + 1] = -rows[beyond].normal_()  # one of the two is above zero
    request = Request([{"role": "user", "content": "Hello"}])
    assert chat.answer([request], max_new_tokens=4) == [""]
    assert "".join(chat.stream(request, max_new_tokens=4)) == ""


def test_a_stream_that_is_closed_stops_generating(chat):
    steps = []
    chat.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    pieces = chat.stream(Request([{"role": "user", "content": "Hello"}]), max_new_tokens=400)
    next(pieces)
    pieces.close()
    assert len(steps) < 100
    chat.model.lm_head._forward_hooks.clear()


def test_what_goes_wrong_in_a_stream_is_raised(chat):
    request = Request([{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match="num_beams = 2. cannot stream"):
        list(chat.stream(request, num_beams=2))
    with pytest.raises(ValueError, match="temperature"):
        list(chat.stream(request, temperature=-1.0))


@pytest.mark.parametrize(
    "images", [[torch.zeros(1, 3, 80, 80)], [torch.zeros(3, 84, 84)], [noise(9, 9, 0)]]
)
def test_tiles_of_a_wrong_shape_or_beside_pictures(images, chat):
    request = Request([{"role": "user", "content": "x"}], [torch.zeros(1, 3, 84, 84), *images])
    with pytest.raises(ValueError, match=r"shape \(N, 3, 84, 84\)"):
        chat.answer([request])


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    """An encoder with the template of GPT-OSS, its marks added to a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = load_tokenizer(add_tokenizer(folder, "qwen2"))
    marks = ("start", "message", "channel", "end", "return")
    tokenizer.add_tokens([f"<|{mark}|>" for mark in marks], special_tokens=True)
    return ChatEncoder(tokenizer, TEMPLATES["internvl3_5_gpt_oss"], 9)


def test_gpt_oss_prompts_and_answers(channels):
    """The header of the channel is the model's own text, and not the user's to read."""
    tokenizer = channels.tokenizer
    turns = [Message("user", "Hi"), Message("assistant", "Yes."), Message("user", "And?")]
    text = tokenizer.decode(channels.prompt(turns, []))
    assert text.startswith("<|start|>system<|message|>You are InternVL, a large language model")
    assert text.endswith(
        "<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.<|end|>"
        "<|start|>user<|message|>And?<|end|><|start|>assistant"
    )
    written = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|> No."
    )
    for end in ("<|return|>", "<|return|>more", ""):
        ids = tokenizer(written + end).input_ids
        assert generate.answer_text(ids, channels) == "No."


def test_gpt_oss_labels(channels):
    """Supervised: header, text and what closes an answer; `<|return|>` only after the last."""
    turns = [Message(r, t) for r, t in zip((*ROLES, "assistant"), "abcd", strict=True)]
    example = channels.encode(Sample("x", tuple(turns)), [])
    kept = channels.tokenizer.decode(example.labels[example.labels != -100])
    assert kept == ("<|channel|>final<|message|>b<|end|><|channel|>final<|message|>d<|return|>")


def test_gpt_oss_streams_without_the_header(channels):
    said = []
    pieces = generate._Streamer(
        generate._Pieces(channels), lambda piece: piece and said.append(piece)
    )
    pieces.put(torch.tensor([[1, 2]]))
    text = "<|channel|>final<|message|> One two <|return|>"
    for token in channels.tokenizer(text).input_ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(said) == "One two"
    assert len(said) > 1


def test_calls_that_share_an_engine(chat, monkeypatch):
    made = []
    build = generate.engine.scheduler
    monkeypatch.setattr(
        generate.engine, "scheduler", lambda *a, **k: made.append(build(*a, **k)) or made[-1]
    )
    requests = [Request("<image>\nWhat is it?", [noise(60 + n, 50, n)]) for n in range(4)]
    alone = [chat.answer([request], max_new_tokens=4)[0] for request in requests]
    made.clear()
    with generate.engine.one_engine(chat.model, 4):
        shared_ = [chat.answer([request], max_new_tokens=4)[0] for request in requests]
        with pytest.raises(BadImage):
            chat.answer([Request("<image>\nx", [b"no image"])], max_new_tokens=4)
        assert chat.answer([requests[0]], max_new_tokens=4) == alone[:1]
    assert shared_ == alone
    # After a request that failed the engine may hold others of its call.
    assert len(made) == 2
    chat.answer([requests[0]], max_new_tokens=4)
    assert len(made) == 3
