"""Adapters chosen by model name: answers of the base and of each adapter, in the same batches."""

import asyncio

import openai
import peft_folders
import pytest
from http_server import asked, image_bytes, image_part, running

from internvl.inference.load import load
from internvl.inference.requests import Request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    base = peft_folders.hf_folder(work)
    first = peft_folders.write(base, work / "first")
    second = peft_folders.write(base, work / "second", r=2, target_modules=peft_folders.LANGUAGE)
    return {"hf": base, "stamps": first, "birds": second}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    words = [f"--adapter={name}={folders[name]}" for name in ("stamps", "birds")]
    words += ["--slots", 3]
    with running(folders["hf"], tmp_path_factory.mktemp("server"), *words) as server:
        yield server


def question(model, n, **fields):
    shown = [image_part()] if n % 4 == 0 else []
    return asked(f"Number {n}?", *shown, model=model, max_tokens=10, **fields)


def test_answers_are_those_of_each_folder(server, folders):
    with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client:
        listed = client.models.list().data
        assert [model.id for model in listed] == ["hf", "stamps", "birds"]
        assert [model.parent for model in listed] == [None, "hf", "hf"]
        texts = {}
        for name, folder in folders.items():
            chat = load(folder, device="cpu", dtype="float32")
            served = [client.chat.completions.create(**question(name, n)) for n in range(3)]
            texts[name] = [answer.choices[0].message.content for answer in served]
            requests = [
                Request(f"<image>\nNumber {n}?" if n % 4 == 0 else f"Number {n}?", images)
                for n, images in ((0, [image_bytes()]), (1, []), (2, []))
            ]
            assert texts[name] == chat.answer(requests, max_new_tokens=10)
        assert len({tuple(answers) for answers in texts.values()}) == 3
        with pytest.raises(openai.NotFoundError, match="there is hf, stamps, birds"):
            client.chat.completions.create(**question("fish", 1))


def test_none_starves_among_ten_times_as_many_of_another(server):
    """They share slots and batches: the rare ones end among the others, not after them."""
    names = ["stamps"] * 20 + ["birds"] + ["stamps"] * 10 + ["hf"] + ["stamps"] * 10
    questions = [question(name, n) for n, name in enumerate(names)]

    async def one(client, n, ended):
        answer = await client.chat.completions.create(**questions[n])
        ended.append(n)
        return answer.choices[0].message.content

    async def together():
        ended = []
        async with openai.AsyncOpenAI(base_url=server.url, api_key="x") as client:
            tasks = [one(client, n, ended) for n in range(len(names))]
            return await asyncio.gather(*tasks), ended

    texts, ended = asyncio.run(together())
    # Where the machine is busy, one of them may have come late itself.
    assert min(ended.index(20), ended.index(31)) < len(names) - 5
    assert ended[-1] not in (20, 31) or ended[-2] not in (20, 31)
    with openai.OpenAI(base_url=server.url, api_key="x") as client:
        alone = [client.chat.completions.create(**question) for question in questions[18:34]]
    assert texts[18:34] == [answer.choices[0].message.content for answer in alone]
