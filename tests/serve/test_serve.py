"""`internvl serve` answers OpenAI's own client, as the package answers itself."""

import asyncio
import json

import openai
import pytest
from chat_folders import add_tokenizer, official_folder, prompt_folder
from command_line import call
from http_server import asked, data_address, image_bytes, image_part, running

from internvl.data.records import Message, Sample
from internvl.inference.load import load
from internvl.inference.requests import Request

KEY = "internlm2.internvl2_5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prompt_folder(KEY, tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def chat(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with running(folder, tmp_path_factory.mktemp("server"), "--slots", 4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=120) as client:
        yield client


def text_of(completion):
    return completion.choices[0].message.content


def test_the_client_code_of_the_original_pages(server, client, chat):
    """models.list, a text before its image, print(response); and the same as a stream."""
    name = client.models.list().data[0].id
    assert name == "chat"
    response = client.chat.completions.create(
        model=name,
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "describe this image"}, image_part()],
            }
        ],
        temperature=0,
        max_tokens=12,
    )
    request = Request("<image>\ndescribe this image", [image_bytes()])
    assert text_of(response) == chat.answer(request, max_new_tokens=12)[0] != ""
    assert response.usage.completion_tokens <= 12
    stream = client.chat.completions.create(
        **asked("describe this image", image_part(), max_tokens=12, stream=True)
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == text_of(response)


def test_a_model_is_described_as_in_the_list(client):
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed


def test_metrics_name_the_paths_that_there_are(server):
    """Clients may send endlessly many others."""
    for path in ("/v1/tiles", "/v1/tiles", "/v1/gone", "/v1/embeddings"):
        server.post({}, path)
    requests = 'internvl_requests_total{{path="{}",status="{}"}}'
    assert server.metric(requests.format("/v1/tiles", 400)) == 2
    assert server.metric(requests.format("other", 404)) == 2


@pytest.mark.slow
def test_tiles_are_counted_for_as_many_images_as_a_request_may_have(server):
    body = {"model": asked("Hi")["model"], "sizes": [[900, 600]] * 16}
    status, answer = server.post(body, "/v1/tiles")
    assert (status, len(answer["images"])) == (200, 16)
    status, answer = server.post(body | {"sizes": [[900, 600]] * 17}, "/v1/tiles")
    assert (status, answer["error"]["param"]) == (400, "sizes")


@pytest.mark.slow
class TestFields:
    """What a request may ask for."""

    def test_the_prompt_is_that_of_training(self, client, chat):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Which?"}, image_part()]},
            {"role": "assistant", "content": "A red one."},
            {"role": "user", "content": "And now?"},
        ]
        served = client.chat.completions.create(model="chat", messages=messages, max_tokens=1)
        turns = [
            Message("system", "Be brief."),
            Message("user", "<image>\nWhich?"),
            Message("assistant", "A red one."),
            Message("user", "And now?"),
            Message("assistant", "x"),
        ]
        tiles = chat.pixel_values(image_bytes()).shape[0]
        row = chat.encoder.encode(Sample("row", tuple(turns), ("a.png",)), [tiles])
        supervised = row.labels != -100
        # The last answer, its end and what follows them are not in the prompt.
        start = max(i for i in range(1, len(supervised)) if supervised[i] and not supervised[i - 1])
        assert served.usage.prompt_tokens == start

    def test_32_at_once_are_those_of_one_by_one(self, server, client):
        questions = [
            asked(f"What is number {n}?", *([image_part()] if n % 3 == 0 else []), max_tokens=5 + n)
            for n in range(32)
        ]
        alone = [text_of(client.chat.completions.create(**question)) for question in questions]

        async def together():
            async with openai.AsyncOpenAI(base_url=server.url, api_key="x") as others:
                tasks = [others.chat.completions.create(**question) for question in questions]
                return [text_of(answer) for answer in await asyncio.gather(*tasks)]

        assert asyncio.run(together()) == alone
        assert len(set(alone)) > 8

    def test_streams_at_once_are_the_whole_answers(self, server, client):
        questions = [asked(f"Tell {n}", max_tokens=30, temperature=1.5, seed=n) for n in range(8)]
        whole = [text_of(client.chat.completions.create(**question)) for question in questions]

        async def one(others, question):
            stream = await others.chat.completions.create(**question, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        async def together():
            async with openai.AsyncOpenAI(base_url=server.url, api_key="x") as others:
                return await asyncio.gather(*(one(others, question) for question in questions))

        assert asyncio.run(together()) == whole

    @pytest.mark.parametrize(
        ("fields", "settings"),
        [
            ({"temperature": 1.3, "seed": 7}, {"temperature": 1.3, "top_k": 0, "seed": 7}),
            (
                {"temperature": 0.9, "seed": 3, "extra_body": {"top_k": 5, "min_p": 0.05}},
                {"temperature": 0.9, "seed": 3, "top_k": 5, "min_p": 0.05},
            ),
            (
                {"temperature": 1.0, "top_p": 0.5, "seed": 1},
                {"temperature": 1.0, "top_k": 0, "top_p": 0.5, "seed": 1},
            ),
            ({"extra_body": {"repetition_penalty": 1.7}}, {"repetition_penalty": 1.7}),
            ({"extra_body": {"min_new_tokens": 9}}, {"min_new_tokens": 9}),
            ({"extra_body": {"min_tokens": 9}}, {"min_new_tokens": 9}),
        ],
    )
    def test_settings_are_those_of_answer(self, client, chat, fields, settings):
        body = asked("What is this?") | {"max_tokens": None, "max_completion_tokens": 9} | fields
        served = text_of(client.chat.completions.create(**body))
        assert served == chat.answer("What is this?", max_new_tokens=9, **settings)[0]

    def test_n_answers_with_seeds_of_their_own(self, client):
        def texts(**fields):
            answer = client.chat.completions.create(**asked("Hi", temperature=2.0, **fields))
            assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
            return [choice.message.content for choice in answer.choices]

        three = texts(n=3, seed=5)
        assert three == texts(n=3, seed=5)
        assert len(set(three)) == 3
        assert three[1:2] == texts(seed=6)
        stream = client.chat.completions.create(
            **asked("Hi", temperature=2.0, n=3, seed=5, stream=True)
        )
        streamed = ["", "", ""]
        for chunk in stream:
            choice = chunk.choices[0]
            streamed[choice.index] += choice.delta.content or ""
        assert streamed == three

    def test_logprobs_of_the_answer(self, client):
        body = asked("Hi", logprobs=True, top_logprobs=2)
        answer = client.chat.completions.create(**body)
        content = answer.choices[0].logprobs.content
        assert all(entry.token == entry.top_logprobs[0].token for entry in content)
        assert all(entry.logprob >= entry.top_logprobs[1].logprob for entry in content)
        stream = client.chat.completions.create(**body, stream=True)
        streamed = [
            entry
            for chunk in stream
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert streamed == content

    def test_an_answer_ends_before_a_stop_string(self, client):
        whole = client.chat.completions.create(**asked("Hi", max_tokens=30))
        assert whole.choices[0].finish_reason == "length"
        text = text_of(whole)
        triples = (text[i : i + 3] for i in range(4, len(text)))
        stop = next(t for t in triples if t.isprintable() and "\ufffd" not in t)
        expected = text[: text.index(stop)]
        cut = client.chat.completions.create(**asked("Hi", max_tokens=30, stop=[stop, "never"]))
        assert (text_of(cut), cut.choices[0].finish_reason) == (expected, "stop")
        assert cut.usage.completion_tokens < whole.usage.completion_tokens
        stream = client.chat.completions.create(
            **asked("Hi", max_tokens=30, stop=stop, stream=True)
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected

    def test_usage_is_the_last_event_where_it_is_asked_for(self, server):
        body = asked("Hi", stream=True, stream_options={"include_usage": True})
        status, headers, raw = server.request("POST", "/v1/chat/completions", body)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        events = raw.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        usage = chunks[-1]["usage"]
        assert chunks[-1]["choices"] == []
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    def test_tiles_of_an_image_are_those_asked_for(self, client):
        wide = image_bytes(600, 100)

        def tokens(**fields):
            body = asked("Hi", image_part(wide, **fields), max_tokens=1)
            return client.chat.completions.create(**body).usage.prompt_tokens

        assert tokens(max_dynamic_patch=1) < tokens(max_dynamic_patch=3) < tokens()
        assert tokens(detail="low") == tokens(max_dynamic_patch=6) == tokens()
        assert tokens(detail="high") == tokens(max_dynamic_patch=24)

    def test_several_images_and_marks(self, client, chat):
        images = [image_bytes(color=color) for color in ((9, 9, 200), (9, 200, 9))]
        shown = [image_part(image) for image in images]
        for text, rendered in (
            ("Compare.", "<image>\n<image>\nCompare."),
            ("Image-1: <image>\nImage-2: <image>\nCompare.", None),
        ):
            served = client.chat.completions.create(**asked(text, *shown, max_tokens=9))
            request = Request(rendered or text, images)
            assert text_of(served) == chat.answer(request, max_new_tokens=9)[0]
        between = asked("First", shown[0], "second", shown[1], "compare", max_tokens=9)
        request = Request("First<image>\nsecond<image>\ncompare", images)
        served = client.chat.completions.create(**between)
        assert text_of(served) == chat.answer(request, max_new_tokens=9)[0]

    def test_special_tokens_are_shown_where_they_are_asked_for(self, client, chat):
        """A box that the model is made to write: it repeats the prompt's likeliest tokens."""
        hidden = client.chat.completions.create(**asked("Hi", max_tokens=30, temperature=3, seed=2))
        shown = client.chat.completions.create(
            **asked("Hi", max_tokens=30, temperature=3, seed=2),
            extra_body={"skip_special_tokens": False},
        )
        names = [str(token) for token in chat.tokenizer.added_tokens_decoder.values()]
        text = text_of(shown)
        assert any(name in text for name in names)
        for name in names:
            text = text.replace(name, "")
        assert "".join(text.split()) == "".join(text_of(hidden).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "there is no model 'gpt-4' here; there is chat"),
        ({"model": None}, 400, "model", "model is missing"),
        ({"messages": []}, 400, "messages", "a list of at least one message"),
        ({"topk": 3}, 400, "topk", "did you mean top_k?"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "these models call no tools"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "use repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "free text"),
        ({"temperature": "hot"}, 400, "temperature", "a number from 0 to 100, not 'hot'"),
        ({"top_p": 0}, 400, "top_p", "from 1e-08 to 1, not 0"),
        ({"n": 17}, 400, "n", "a whole number from 1 to 16"),
        ({"n": True}, 400, "n", "not True"),
        ({"max_tokens": 10**400}, 400, "messages", "together they may have"),
        ({"temperature": 10**400}, 400, "temperature", "a number"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "belong to logprobs"),
        ({"stream_options": {}}, 400, "stream_options", "belong to stream"),
        ({"max_completion_tokens": 3}, 400, "max_tokens", "mean the same"),
        ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
        ({"stop": ["a", 5]}, 400, "stop[1]", "is an int (5), not a text"),
        ({"seed": 2**63}, 400, "seed", "from -9223372036854775808 to 9223372036854775807, not"),
        ({"max_tokens": 5000}, 400, "messages", "answer 5,000; together they may have 511"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "text or"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            400,
            "messages",
            "both from user",
        ),
        (
            {"messages": [{"role": "user", "content": "<image> what?"}]},
            400,
            "messages[0]",
            "1 <image> mark in its text, and 0 images",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            400,
            "messages[0].content[0].text",
            "half of a character",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "name": "Bob"}]},
            400,
            "messages[0].name",
            "not rendered in training",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "messages[0].content[0].type",
            "known are text, image_url, video_url",
        ),
        (
            {"messages": [{"role": "system", "content": [image_part()]}]},
            400,
            "messages[0].content[0].image_url",
            "only messages from the user",
        ),
        (
            {"messages": [{"role": "user", "content": [image_part(detail="original")]}]},
            400,
            "messages[0].content[0].image_url.detail",
            "one of auto, low, medium, high",
        ),
        (
            {"messages": [{"role": "user", "content": [image_part()] * 17}]},
            400,
            "messages",
            "17 images in the messages, and a request may have 16",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 900}]},
            400,
            "messages",
            "together they may have 511. Send fewer",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 20_000}]},
            400,
            "messages",
            "100,000 characters, more than a prompt of 511 tokens",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}] * 600},
            400,
            "messages",
            "600 messages, more than",
        ),
        (
            {"messages": [{"role": "assistant", "content": ""}, {"role": "user", "content": "a"}]},
            400,
            "messages[0].content",
            "messages[0] is an empty answer",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_field(server, client, change, status, param, words):
    refusals = {400: openai.BadRequestError, 404: openai.NotFoundError}
    body = {key: value for key, value in (asked("Hi") | change).items() if value is not None}
    answer, error = server.post(json.dumps(body).encode())
    assert answer == status
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["param"] == param
    assert words in error["error"]["message"]
    if not isinstance(change.get("messages", [{}]), list) or "\\ud800" in json.dumps(body):
        return  # OpenAI's client cannot send it
    with pytest.raises(refusals[status]) as refused:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.body["param"] == param


@pytest.mark.slow
def test_an_image_of_every_form(client, chat):
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        content = image_bytes(form=form)
        url = data_address(content, f"image/{form.lower()}")
        part = {"type": "image_url", "image_url": {"url": url}}
        served = client.chat.completions.create(**asked("What?", part))
        request = Request("<image>\nWhat?", [content])
        assert text_of(served) == chat.answer(request, max_new_tokens=8)[0]


@pytest.mark.slow
def test_a_video_is_its_frames(client, chat, tmp_path):
    frames = [image_bytes(color=(40 * n, 90, 10)) for n in range(6)]
    import io

    from PIL import Image

    first, *others = [Image.open(io.BytesIO(frame)) for frame in frames]
    file = tmp_path / "video.gif"
    first.save(file, save_all=True, append_images=others, duration=100)
    url = data_address(file.read_bytes(), "image/gif")
    part = {"type": "video_url", "video_url": {"url": url, "num_frames": 3}}
    served = client.chat.completions.create(**asked("What moves?", part))
    request = Request("<video>\nWhat moves?", videos=[file], num_frames=3)
    assert text_of(served) == chat.answer(request, max_new_tokens=8)[0]
    processor = {"mm_processor_kwargs": {"num_frames": 3}}
    part = {"type": "video_url", "video_url": {"url": url}}
    again = client.chat.completions.create(**asked("What moves?", part), extra_body=processor)
    assert text_of(again) == text_of(served)


@pytest.mark.slow
def test_a_model_that_the_engine_does_not_run_answers_one_by_one(tmp_path):
    """GPT-OSS attends to a window in every other layer."""
    folder = official_folder("GptOssForCausalLM", tmp_path / "chat", template="internvl2_5")
    chat = load(add_tokenizer(folder, "qwen2"), device="cpu")
    with (
        running(folder, tmp_path / "server") as server,
        openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        assert "one request is answered after the other" in server.log.read_text()
        sampled = {"temperature": 1.5, "seed": 3}
        for fields, settings in (({}, {}), (sampled, sampled | {"top_k": 0})):
            body = asked("What?", image_part(), **fields)
            request = Request("<image>\nWhat?", [image_bytes()])
            expected = chat.answer(request, max_new_tokens=8, **settings)[0]
            assert text_of(client.chat.completions.create(**body)) == expected
            stream = client.chat.completions.create(**body, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in stream) == expected
        status, error = server.post(asked("Hi", logprobs=True))
        assert (status, error["error"]["param"]) == (400, "logprobs")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-length", "0"], "--max-length must be a whole number of at least 1"),
        (["--adapter", "a b=."], "--adapter a b=.: write NAME=PATH"),
        (["--adapter", "a=gone"], "there is no folder gone"),
        (["--adapter", "a=.", "--adapter", "a=."], "the name a is taken"),
        (["--adapter", "a=.", "--name", "a"], "the name a is the model's own"),
        (["--api-key", ""], "--api-key is empty"),
        (["--temperature", "-1"], "--temperature is 0 (greedy) to 100, not -1.0"),
        (["--temperature", "nan"], "not nan"),
        (["--max-videos", "0"], "--max-videos must be a whole number of at least 1"),
        (["--allow-files", "gone"], "--allow-files: there is no folder gone"),
        (["--gpus", "99"], "--gpus 99: this machine has"),
        (["--gpus", "1", "--device", "cpu"], "leave --device and --device-map out"),
    ],
)
def test_wrong_options_are_named(folder, capsys, words, says):
    code, _, error = call(capsys, "serve", folder, *words)
    assert code in (1, 2)
    assert says in error
