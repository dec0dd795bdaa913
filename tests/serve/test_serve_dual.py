"""Embeddings and rankings over HTTP are those of the loaded InternVL-14B."""

import asyncio
import json

import numpy as np
import openai
import pytest
import torch
from dual_folders import dual_folder, small_tokenizer
from http_server import data_address, image_bytes, running
from PIL import Image

from internvl.config import RetrievalEval
from internvl.evals.retrieval import Retrieval
from internvl.inference.load import load

pytestmark = pytest.mark.slow

TEXTS = ["a photo of a red panda", "two cats on the sofa", "雪中的狗"]
IMAGES = [image_bytes(color=color) for color in ((200, 10, 10), (10, 200, 10), (10, 10, 200))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_tokenizer(dual_folder(tmp_path_factory.mktemp("model") / "dual"))


@pytest.fixture(scope="module")
def dual(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with running(folder, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=120) as client:
        yield client


def vectors(response):
    assert [entry.index for entry in response.data] == list(range(len(response.data)))
    return torch.tensor([entry.embedding for entry in response.data])


def test_models(client):
    assert [model.id for model in client.models.list()] == ["dual", "dual:c", "dual:g"]


def test_texts(client, dual):
    expected = dual.encode_texts(TEXTS)
    response = client.embeddings.create(model="dual", input=TEXTS)
    torch.testing.assert_close(vectors(response), expected, atol=1e-6, rtol=1e-5)
    as_floats = client.embeddings.create(model="dual", input=TEXTS, encoding_format="float")
    assert torch.equal(vectors(as_floats), vectors(response))
    tokens = sum(len(dual.encoder.embedding(text)) for text in TEXTS)
    assert response.usage.prompt_tokens == response.usage.total_tokens == tokens
    lone = client.embeddings.create(model="dual:g", input=TEXTS[0])
    torch.testing.assert_close(vectors(lone), expected[:1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_images_and_texts_in_one_request(server, dual, mode):
    addresses = [data_address(image) for image in IMAGES]
    inputs = [
        {"image": addresses[0]},
        TEXTS[0],
        addresses[1],
        {"text": TEXTS[1]},
        {"image": {"url": addresses[2]}},
    ]
    status, response = server.post({"model": f"dual:{mode}", "input": inputs}, "/v1/embeddings")
    assert status == 200
    served = torch.tensor([entry["embedding"] for entry in response["data"]])
    images, texts = dual.encode_images(IMAGES, mode), dual.encode_texts(TEXTS)
    expected = torch.stack([images[0], texts[0], images[1], texts[1], images[2]])
    torch.testing.assert_close(served, expected, atol=1e-5, rtol=1e-4)
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": addresses[0]}}],
    }
    status, lone = server.post({"model": f"dual:{mode}", "messages": [message]}, "/v1/embeddings")
    served = torch.tensor(lone["data"][0]["embedding"])
    torch.testing.assert_close(served, images[0], atol=1e-5, rtol=1e-4)


def test_many_at_once_are_those_of_one_by_one(server, client):
    texts = [f"panda {n} of the sofa" for n in range(32)]
    alone = [client.embeddings.create(model="dual", input=text).data[0].embedding for text in texts]

    async def together():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="x") as others:
            tasks = [others.embeddings.create(model="dual", input=text) for text in texts]
            return [answer.data[0].embedding for answer in await asyncio.gather(*tasks)]

    np.testing.assert_allclose(asyncio.run(together()), alone, atol=1e-6)


def test_ranks_are_those_of_the_match_head(server, dual):
    addresses = [data_address(image) for image in IMAGES]
    body = {"model": "dual", "query": TEXTS[0], "documents": [{"image": a} for a in addresses]}
    status, answer = server.post(body, "/v1/rerank")
    assert status == 200
    expected = dual.match(IMAGES, [TEXTS[0]] * 3)
    order = expected.argsort(descending=True).tolist()
    assert [result["index"] for result in answer["results"]] == order
    scores = torch.tensor([result["relevance_score"] for result in answer["results"]])
    torch.testing.assert_close(scores, expected[order], atol=1e-5, rtol=1e-4)
    body = {"model": "dual", "query": {"image": addresses[0]}, "documents": TEXTS, "top_n": 1}
    status, answer = server.post(body | {"return_documents": True}, "/v1/rerank")
    best = int(dual.match([IMAGES[0]] * 3, TEXTS).argmax())
    (result,) = answer["results"]
    assert (result["index"], result["document"]) == (best, {"text": TEXTS[best]})


def message(part, **fields):
    """vLLM's form of an embedding request."""
    return {"input": None, "messages": [{"role": "user", "content": [part]} | fields]}


@pytest.mark.parametrize(
    ("path", "change", "status", "words"),
    [
        ("embeddings", {"model": "clip"}, 404, "there is dual, dual:c, dual:g"),
        ("embeddings", {"model": None}, 400, "model is missing"),
        ("embeddings", {"input": ["a", "DATA:image/png;base64,AAAA"]}, 400, "input[1]: "),
        ("embeddings", {"input": None}, 400, "either input or messages"),
        ("embeddings", {"input": []}, 400, "1 to 2,048 entries"),
        ("embeddings", {"input": [1, 2]}, 400, "not tokens"),
        ("embeddings", {"input": ["a", " "]}, 400, "input[1] is empty"),
        ("embeddings", {"dimensions": 64}, 400, "vectors have one length"),
        ("embeddings", {"encoding_format": "hex"}, 400, "one of float, base64"),
        ("embeddings", {"input": "data:image/png;base64,AAAA"}, 400, "input[0]"),
        ("embeddings", {"input": {"image": {"url": "data:", "detail": "low"}}}, 400, "one tile"),
        ("embeddings", message({"type": "text", "text": "a"}, role="system"), 400, "one of user"),
        ("embeddings", message({"type": "text", "text": "a"}, name="b"), 400, "messages[0].name"),
        ("embeddings", message({"type": "text", "text": "a", "x": 1}), 400, "content[0].x"),
        ("embeddings", message({"type": "image_url"}), 400, "content[0]"),
        ("rerank", {"documents": ["a"]}, 400, "both texts"),
        ("rerank", {"documents": []}, 400, "a list of 1 to"),
        ("rerank", {"documents": [{"image": "file:///x.png"}]}, 400, "--allow-files"),
        ("chat/completions", {}, 404, "InternVL-14B does not converse"),
    ],
)
def test_what_is_wrong_is_refused(server, path, change, status, words):
    fields = {"query": "a", "documents": ["b"]} if path == "rerank" else {"input": "a"}
    body = {k: v for k, v in ({"model": "dual"} | fields | change).items() if v is not None}
    answer, error = server.post(body, f"/v1/{path}")
    assert (answer, words in error["error"]["message"]) == (status, True), error


def test_one_bad_image_costs_its_own_request_alone(server, dual):
    """An image whose header is whole and whose data is cut off is seen only when it is decoded."""
    cut = IMAGES[0][:-40]

    def ask(content):
        body = {"model": "dual", "input": ["a", {"image": data_address(content)}]}
        return server.post(body, "/v1/embeddings")

    async def together():
        tasks = [asyncio.to_thread(ask, content) for content in [*IMAGES, cut, *IMAGES]]
        return await asyncio.gather(*tasks)

    answers = asyncio.run(together())
    assert [status for status, _ in answers] == [200, 200, 200, 400, 200, 200, 200]
    error = answers[3][1]["error"]
    assert (error["param"], error["code"]) == ("input[1]", "invalid_image")
    documents = [{"image": data_address(content)} for content in (IMAGES[0], cut)]
    body = {"model": "dual", "query": "a", "documents": documents}
    status, answer = server.post(body, "/v1/rerank")
    assert (status, answer["error"]["param"]) == (400, "documents[1]")


def test_images_that_are_too_large_together_are_refused(folder, tmp_path):
    """Their addresses may be short."""
    for n in range(40):
        noise = np.random.default_rng(n).integers(0, 256, (200, 200, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.bmp")
    words = ("--allow-files", tmp_path, "--max-body", 1)
    with running(folder, tmp_path / "server", *words) as server:
        inputs = [{"image": (tmp_path / f"{n}.bmp").as_uri()} for n in range(40)]
        statuses = {}
        for count in (5, 40):
            body = {"model": "dual", "input": inputs[:count]}
            statuses[count], answer = server.post(body, "/v1/embeddings")
    assert statuses == {5: 200, 40: 400}
    assert "more than 1 MiB together (--max-body)" in answer["error"]["message"]


def test_recall_through_http_is_what_evaluate_measures(client, dual, tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (12, 3)).tolist()
    images = [image_bytes(color=tuple(color)) for color in colors]
    texts = [f"{TEXTS[n % 3]} {n}" for n in range(len(images))]
    rows = []
    for n, (image, text) in enumerate(zip(images, texts, strict=True)):
        (tmp_path / f"{n}.png").write_bytes(image)
        rows.append(json.dumps({"image": f"{n}.png", "caption": text}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = RetrievalEval(annotations=tmp_path / "pairs.jsonl", images=tmp_path, recall_k=(1, 5))
    expected = Retrieval(config).run(dual, None).values
    own = torch.arange(len(images))
    for mode in "cg":

        def embed(inputs, model=f"dual:{mode}"):
            return vectors(client.embeddings.create(model=model, input=inputs))

        scores = embed(texts) @ embed([data_address(image) for image in images]).T
        for name, similar in (("image", scores), ("text", scores.T)):
            for k in (1, 5):
                hits = (similar.topk(k).indices == own[:, None]).any(1)
                recall = expected[f"{mode}_{name}_retrieval_recall@{k}"]
                assert hits.float().mean().item() == pytest.approx(recall, abs=1e-6)
    assert 0 < expected["c_image_retrieval_recall@5"] < 1
