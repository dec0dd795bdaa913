"""Captions: the engine against recomputation, beams against a search written for this test."""

import math

import numpy as np
import pytest
import torch
from dual_folders import dual_folder, dual_golden, small_tokenizer

from internvl.inference import engine
from internvl.inference import load as loading
from internvl.inference.engine.queries import QueryDecoder
from internvl.inference.engine.scheduler import Job
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings

PROMPT = torch.tensor([1, 41, 57, 68])
END = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dual_folder(tmp_path_factory.mktemp("dual"))


@pytest.fixture(scope="module")
def model(folder):
    return loading.load(folder, device="cpu").model


@pytest.fixture(scope="module")
def pixels():
    return dual_golden()["input.pixel_values"]


def captions(model, pixels, num_beams, longest=10, shortest=0, slots=16, prompts=None, **options):
    """Tokens of the caption of every image, and the scheduler."""
    scheduler = engine.captions(model, slots, num_beams=num_beams, **options)
    settings = Settings(longest, shortest, num_beams)
    prompts = prompts or [PROMPT] * len(pixels)
    jobs = [
        Job(n, Prompt(np.array([0] * model.num_queries + text.tolist()), image[None]), settings)
        for n, (image, text) in enumerate(zip(pixels, prompts, strict=True))
    ]
    ended = {j.key: j.generated for j in scheduler.run(engine.Ready(jobs)) if j.ended}
    return [ended[n] for n in range(len(pixels))], scheduler


@torch.no_grad()
def log_probabilities(model, vision, rows):
    """Of the next token, nothing cached: (rows, V), for prompt and tokens so far."""
    ids = torch.tensor(rows)
    mask = model.joint_mask("itg", torch.ones_like(ids, dtype=torch.bool))
    _, text = model.joint_states(model.encode_kv(vision.expand(len(ids), -1, -1)), ids, mask)
    return model.lm_head(text[:, -1]).float().log_softmax(-1)


def greedy(model, vision, longest, shortest):
    ids = []
    while len(ids) < longest and END not in ids:
        scores = log_probabilities(model, vision, [PROMPT.tolist() + ids])[0]
        if len(ids) < shortest:
            scores[END] = -math.inf
        ids.append(int(scores.argmax()))
    return ids


def beams(model, vision, num_beams, longest, shortest):
    """The best finished hypothesis by mean log probability, its end counted as a token."""
    running, finished = [(0.0, [])], []
    for length in range(1, longest + 1):
        rows = log_probabilities(model, vision, [PROMPT.tolist() + ids for _, ids in running])
        if length <= shortest:
            rows[:, END] = -math.inf
        found = [
            (total + float(score), [*ids, token])
            for (total, ids), scores in zip(running, rows, strict=True)
            for token, score in enumerate(scores.tolist())
        ]
        found = sorted(found, key=lambda pair: -pair[0])[: 2 * num_beams]
        for place, (total, ids) in enumerate(found):
            if place < num_beams and (ids[-1] == END or length == longest):
                finished.append((total / length, ids))
        finished = sorted(finished, key=lambda pair: -pair[0])[:num_beams]
        running = [pair for pair in found if pair[1][-1] != END][:num_beams]
        if len(finished) == num_beams and finished[-1][0] >= running[0][0] / length:
            break
    return finished[0][1]


@pytest.mark.parametrize("shortest", [0, 6])
def test_greedy_captions_equal_full_recomputation(model, pixels, shortest):
    found, _ = captions(model, pixels, 1, 12, shortest)
    for row, image in zip(found, pixels, strict=True):
        vision = model.vision_tokens(image[None])
        assert row == greedy(model, vision, 12, shortest)


@pytest.mark.parametrize(("num_beams", "shortest"), [(5, 0), (5, 6), (3, 2)])
def test_beam_search_equals_a_naive_one(model, pixels, num_beams, shortest):
    found, _ = captions(model, pixels, num_beams, 9, shortest)
    ended = 0
    for row, image in zip(found, pixels, strict=True):
        vision = model.vision_tokens(image[None])
        assert row == beams(model, vision, num_beams, 9, shortest)
        ended += END in row
    assert shortest or ended


@pytest.mark.parametrize("num_beams", [1, 5])
def test_slots_order_and_lag_change_nothing(model, pixels, num_beams):
    alone = [captions(model, image[None], num_beams)[0][0] for image in pixels]
    for slots, lag in ((1, 0), (2, 1), (3, 3), (16, 0)):
        assert captions(model, pixels, num_beams, slots=slots, lag=lag)[0] == alone
    backwards, _ = captions(model, pixels.flip(0), num_beams, slots=2, row_tokens=30)
    assert backwards[::-1] == alone


def test_a_slot_is_refilled_while_other_searches_run(model, pixels):
    ids = np.array([0] * model.num_queries + PROMPT.tolist())
    jobs = [
        Job(n, Prompt(ids, pixels[n % len(pixels)][None]), Settings(4 + 3 * (n % 3), 4, 3))
        for n in range(9)
    ]
    rows = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:2])))
    list(engine.captions(model, 3, num_beams=3).run(engine.Ready(jobs)))
    hook.remove()
    prompts = [count for count, length in rows if length > 3]
    # Three at first, and then each as a slot becomes free: in rounds there would be three rows.
    assert sum(prompts) == 9
    assert len(prompts) > 3
    assert len(rows) < len(prompts) + 9 + 9 + 9


@pytest.mark.parametrize("num_beams", [1, 5])
def test_prompts_of_several_lengths_share_a_row(model, pixels, num_beams):
    prompts = [torch.tensor([1, *range(40, 40 + n)]) for n in (3, 1, 6, 2)][: len(pixels)]
    together, _ = captions(model, pixels[: len(prompts)], num_beams, prompts=prompts)
    for image, prompt, ids in zip(pixels, prompts, together, strict=False):
        assert captions(model, image[None], num_beams, prompts=[prompt])[0] == [ids]


def test_a_search_for_each_setting_of_its_own(model, pixels):
    scheduler = engine.captions(model, 4, num_beams=3)
    shapes = ((10, 0, 1.0), (4, 4, 1.0), (10, 6, 0.0), (7, 0, 2.5))
    ids = np.array([0] * model.num_queries + PROMPT.tolist())

    def jobs():
        return [
            Job(n, Prompt(ids, pixels[n % len(pixels)][None]), Settings(
                longest, shortest, 3, extra={"length_penalty": penalty}
            ))
            for n, (longest, shortest, penalty) in enumerate(shapes)
        ]  # fmt: skip

    together = {j.key: j.generated for j in scheduler.run(engine.Ready(jobs())) if j.ended}
    for job in jobs():
        list(engine.captions(model, 1, num_beams=3).run(engine.Ready([job])))
        assert job.generated == together[job.key]
        longest, shortest, _ = shapes[job.key]
        assert shortest <= len(job.generated) <= longest


def test_a_cancelled_search_leaves_its_slot(model, pixels):
    scheduler = engine.captions(model, 1, num_beams=3)
    ids = np.array([0] * model.num_queries + PROMPT.tolist())
    jobs = [Job(n, Prompt(ids, pixels[n][None]), Settings(10, 8, 3)) for n in range(2)]
    steps = 0
    for job in scheduler.run(engine.Ready(jobs)):
        steps += job.key == 0
        if steps == 3:
            jobs[0].cancelled = True
    assert jobs[0].ended
    assert not jobs[0].generated
    assert jobs[1].generated == captions(model, pixels[1:2], 3, 10, 8)[0][0]


class Late(engine.Ready):
    """Jobs that are never ready at once, as images that a thread reads."""

    def take(self, *, wait):
        return super().take(wait=wait) if wait else None


@pytest.mark.parametrize("source", [engine.Ready, Late])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_in_step_a_rank_has_one_row_however_late_its_images_are(model, pixels, num_beams, source):
    count, options = len(pixels), {"in_step": True, "row_tokens": 10**9, "tiles_at_once": 99}
    ids = np.array([0] * model.num_queries + PROMPT.tolist())
    settings = Settings(5, 5, num_beams)
    jobs = [Job(n, Prompt(ids, image[None]), settings) for n, image in enumerate(pixels)]
    passes = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape[:2])))
    scheduler = engine.captions(model, count, num_beams=num_beams, **options)
    list(scheduler.run(source(jobs)))
    hook.remove()
    assert passes == [(count, model.num_queries + len(PROMPT)), *[(count, num_beams)] * 4]
    assert [job.generated for job in jobs] == captions(model, pixels, num_beams, 5, 5)[0]


def test_beams_differ_from_greedy_and_images_differ(model, pixels):
    one, five = (captions(model, pixels, n)[0] for n in (1, 5))
    assert one != five
    assert len({tuple(row) for row in five}) == len(pixels)


def test_queries_and_prompt_are_read_once_for_all_beams(model, pixels):
    lengths = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: lengths.append(tuple(args[0].shape[:2])))
    captions(model, pixels[:2], 5, 4, slots=2)
    hook.remove()
    assert lengths == [(2, model.num_queries + len(PROMPT)), (2, 5), (2, 5), (2, 5)]


def test_a_layer_keeps_its_keys_where_it_computes(model, monkeypatch):
    """As accelerate's map says; weights on the host or the disk come to the main device."""
    decoder = QueryDecoder(model, num_beams=2, end_id=END)
    layers = model.config.text_config.num_hidden_layers
    assert decoder._layer_devices() == [torch.device("cpu")]
    prefix = "model.language_model.layers"
    placed = {"model.vision_tower": 0, f"{prefix}.0": 1, "lm_head": "cpu"}
    placed |= {f"{prefix}.{n}": "cpu" for n in range(1, layers)}
    monkeypatch.setattr(model, "hf_device_map", placed, raising=False)
    cpu = torch.device("cpu")
    assert decoder._layer_devices() == [torch.device("cuda", 1), *[cpu] * (layers - 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_beams", [1, 5])
def test_a_captured_search_is_the_search(folder, pixels, num_beams):
    on_gpu = loading.load(folder, device="cuda", dtype="float32").model
    texts = []
    for captures in (False, True):
        scheduler = engine.captions(on_gpu, 2, num_beams=num_beams)
        assert scheduler.decoder._captures()
        if not captures:
            scheduler.decoder._captures = lambda: False
        settings = Settings(10, 2, num_beams)
        ids = np.array([0] * on_gpu.num_queries + PROMPT.tolist())
        jobs = [Job(n, Prompt(ids, image[None]), settings) for n, image in enumerate(pixels)]
        list(scheduler.run(engine.Ready(jobs)))
        texts.append([job.generated for job in jobs])
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_images_that_are_on_the_gpu(folder, pixels):
    dual = loading.load(small_tokenizer(folder), device="cuda", dtype="float32")
    settings = {"num_beams": 3, "max_new_tokens": 6}
    assert dual.caption(pixels.cuda(), **settings) == dual.caption(pixels, **settings)
