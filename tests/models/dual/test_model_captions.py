"""Captions: the cache against recomputation, beams against a search written for this test."""

import math

import pytest
import torch
from dual_folders import dual_folder, dual_golden

from internvl.inference import load as loading
from internvl.models.dual.beam_search import BeamSearchConfig

PROMPT = torch.tensor([1, 41, 57, 68])
END = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loading.load(dual_folder(tmp_path_factory.mktemp("dual")), device="cpu").model


@pytest.fixture(scope="module")
def pixels():
    return dual_golden()["input.pixel_values"]


def settings(num_beams, longest=10, shortest=0):
    return BeamSearchConfig(num_beams, longest, shortest, END)


@torch.no_grad()
def log_probabilities(model, vision, rows):
    """Of the next token, nothing cached: (rows, V), for prompt and tokens so far."""
    ids = torch.tensor(rows)
    mask = model.joint_mask("itg", torch.ones_like(ids, dtype=torch.bool))
    _, text = model.joint_states(model.encode_kv(vision.expand(len(ids), -1, -1)), ids, mask)
    return model.lm_head(text[:, -1]).float().log_softmax(-1)


def until_end(ids):
    return ids[: ids.index(END) + 1] if END in ids else ids


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
    found = model.caption(pixels, PROMPT, settings(1, 12, shortest)).tolist()
    for row, image in zip(found, pixels, strict=True):
        vision = model.vision_tokens(image[None])
        assert until_end(row) == greedy(model, vision, 12, shortest)


@pytest.mark.parametrize(("num_beams", "shortest"), [(5, 0), (5, 6), (3, 2)])
def test_beam_search_equals_a_naive_one(model, pixels, num_beams, shortest):
    found = model.caption(pixels, PROMPT, settings(num_beams, 9, shortest)).tolist()
    ended = 0
    for row, image in zip(found, pixels, strict=True):
        vision = model.vision_tokens(image[None])
        assert until_end(row) == beams(model, vision, num_beams, 9, shortest)
        ended += END in row
    assert shortest or ended


@pytest.mark.parametrize("num_beams", [1, 5])
def test_a_batch_answers_as_single_pictures_do(model, pixels, num_beams):
    together = model.caption(pixels, PROMPT, settings(num_beams)).tolist()
    for row, image in zip(together, pixels, strict=True):
        (alone,) = model.caption(image[None], PROMPT, settings(num_beams)).tolist()
        assert until_end(row) == until_end(alone)


def test_beams_differ_from_greedy_and_pictures_differ(model, pixels):
    one, five = (model.caption(pixels, PROMPT, settings(n)).tolist() for n in (1, 5))
    assert one != five
    assert len({tuple(row) for row in five}) == len(pixels)


def test_queries_and_prompt_are_read_once_for_all_beams(model, pixels):
    lengths = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: lengths.append(tuple(args[0].shape[:2])))
    model.caption(pixels[:2], PROMPT, settings(5, 4))
    hook.remove()
    assert lengths == [(2, model.num_queries + len(PROMPT)), (2, 5), (2, 5), (2, 5)]
