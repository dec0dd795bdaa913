"""Slots: tokens are those of `generate`, whatever else is in flight, and however slots are cut."""

import pytest
import torch
from small_models import small_model

from internvl.data.images import STATISTICS
from internvl.errors import RunError
from internvl.inference import engine
from internvl.inference.engine.scheduler import Job, Scheduler
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings
from internvl.models.chat.model import tokens_per_tile

END = 17
NAMES = ("InternVL2-1B", "InternVL2-2B", "InternVL2-4B", "InternVL3_5-1B", "InternVL3_5-30B-A3B")


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    torch.manual_seed(0)
    return small_model(request.param, (), 0).eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return small_model("InternVL2-2B", (), 0).eval()


def prompt(model, length, tiles, seed):
    """A prompt of `length` tokens and, after the first, those of some tiles."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 500, (length,), generator=draw)
    if not tiles:
        return Prompt(ids.numpy(), None)
    side = model.config.vision_config.image_size[0]
    visual = torch.full((tiles * tokens_per_tile(model.config, side),), model.config.image_token_id)
    pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=draw, dtype=torch.uint8)
    return Prompt(torch.cat([ids[:1], visual, ids[1:]]).numpy(), pixels)


SHAPES = ((3, 0, 6), (9, 1, 1), (4, 2, 9), (30, 0, 4), (2, 1, 12), (5, 3, 3), (7, 0, 2))
"""Tokens, tiles and new tokens of the requests."""


def jobs(model, shapes=SHAPES, **settings):
    return [
        Job(n, prompt(model, length, tiles, n), Settings(max_new_tokens=new, **settings))
        for n, (length, tiles, new) in enumerate(shapes)
    ]


def scheduler(model, slots, end_id=END, **options):
    statistics = STATISTICS["imagenet"]
    return Scheduler(model, end_id=end_id, statistics=statistics, slots=slots, **options)


def tokens(model, todo, slots, **options):
    """Tokens of each job by its key."""
    ended = [job for job in scheduler(model, slots, **options).run(engine.Ready(todo)) if job.ended]
    assert len(ended) == len(todo)
    return {job.key: job.generated for job in ended}


def theirs(model, job):
    """What the model's own `generate` answers to a job alone."""
    tiles = job.prompt.tiles
    pixels = None
    if tiles is not None:
        mean, std = (torch.tensor(v)[:, None, None] for v in STATISTICS["imagenet"])
        pixels = (tiles / 255 - mean) / std
    config = job.settings.generation_config(END, 0)
    ids = job.prompt_ids[None]
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        generation_config=config,
    )
    return output[0, ids.shape[1] :].tolist()


def test_tokens_are_those_of_generate(model):
    wanted = {job.key: theirs(model, job) for job in jobs(model)}
    for slots in (1, 3, 16):
        assert tokens(model, jobs(model), slots) == wanted
    assert tokens(model, jobs(model)[::-1], 2, row_tokens=40, tiles_at_once=2) == wanted


@pytest.mark.parametrize("lag", [1, 3])
def test_tokens_that_are_read_later_are_the_same(small, lag):
    end = tokens(small, jobs(small), 1)[4][5]  # so that answers end early, and not at once
    wanted = tokens(small, jobs(small), 1, end_id=end)
    assert len(wanted[4]) < SHAPES[4][2]
    for slots in (1, 3, 16):
        assert tokens(small, jobs(small), slots, end_id=end, lag=lag) == wanted
    settings = ({}, {"repetition_penalty": 2.5}, {"min_new_tokens": 8}, {"temperature": 1e-4})
    mixed = [
        Job(n, prompt(small, 6, n % 2, n), Settings(max_new_tokens=8, **chosen))
        for n, chosen in enumerate(settings * 2)
    ]
    again = [Job(job.key, job.prompt, job.settings) for job in mixed]
    assert tokens(small, mixed, 3, lag=lag) == tokens(small, again, 1)


def test_tiles_that_are_normalized_beside_others(small):
    todo = jobs(small)
    mean, std = (torch.tensor(v)[:, None, None] for v in STATISTICS["imagenet"])
    for job in todo[::2]:
        if job.prompt.tiles is not None:
            normalized = (job.prompt.tiles / 255 - mean) / std
            job.prompt = Prompt(job.prompt.input_ids, normalized)
    assert tokens(small, todo, 4, tiles_at_once=2) == tokens(small, jobs(small), 1)


def test_without_refill_all_slots_end_before_the_next_requests(small):
    busy = []
    waits = scheduler(small, 3, refill=False)
    for _ in waits.run(engine.Ready(jobs(small))):
        busy.append({job.key for job in waits.active.values()})
    assert all(max(keys) < 3 or min(keys) > 2 for keys in busy if keys)


def test_settings_are_each_requests_own(small):
    mixed = [
        Job(n, prompt(small, 6, n % 2, n), Settings(max_new_tokens=8, **settings))
        for n, settings in enumerate(
            ({}, {"repetition_penalty": 2.5}, {"min_new_tokens": 8}, {"repetition_penalty": 0.5})
        )
    ]
    wanted = {job.key: theirs(small, job) for job in mixed}
    assert tokens(small, mixed, 4) == wanted


def test_a_sample_is_that_of_generate(small):
    for seed in range(5):
        (job,) = jobs(small, [(6, 1, 7)], temperature=1.3, top_p=0.9)
        torch.manual_seed(seed)
        wanted = theirs(small, job)
        torch.manual_seed(seed)
        assert tokens(small, [job], 1) == {0: wanted}


def test_in_bfloat16_under_autocast(small):
    with torch.autocast("cpu", torch.bfloat16):
        found = tokens(small, jobs(small), 3, dtype=torch.bfloat16)
        wanted = {job.key: theirs(small, job) for job in jobs(small)}
    alike = sum(found[key][:1] == wanted[key][:1] for key in wanted)
    assert alike >= len(wanted) - 1  # rounding may turn one of two tokens that are as likely


def test_a_longer_request_waits_until_longer_slots_can_be_made(small):
    short, long = (4, 0, 5), (600, 0, 5)
    todo = jobs(small, [short, short, long, short])
    wanted = {job.key: theirs(small, job) for job in todo}
    # One at a time becomes known, so that the first slots are short.
    found, lengths = {}, set()
    engine_of_two = scheduler(small, 2)
    for job in engine_of_two.run(engine.Ready(todo)):
        lengths.add(engine_of_two.decoder.cache.length)
        if job.ended:
            found[job.key] = job.generated
    assert found == wanted
    assert lengths == {256, 768}


def test_a_request_ends_at_once_when_cancelled(small):
    todo = jobs(small, [(4, 0, 50), (5, 0, 6), (6, 0, 6)])
    seen = []
    for job in scheduler(small, 2).run(engine.Ready(todo)):
        if job.key == 0 and len(job.generated) == 3:
            job.cancelled = True
        if job.ended:
            seen.append((job.key, len(job.generated)))
    assert dict(seen)[0] == 3
    assert len(seen) == 3


def test_a_cancelled_request_that_waits_is_never_begun(small):
    todo = jobs(small, [(4, 0, 5), (5, 0, 6), (6, 0, 6)])
    todo[1].cancelled = True
    assert [len(g) for g in tokens(small, todo, 1).values()] == [0, 5, 6]


def test_a_short_row_waits_for_others_only_some_steps_and_not_without_patience(small):
    def when_begun(first, **options):
        todo = jobs(small, [(4, 0, 40)] * first + [(5, 0, 3)])
        source = Late(todo[:first], todo[first:])
        for job in scheduler(small, 32, **options).run(source):
            if job.key == first:
                return len(todo[0].generated)

    assert when_begun(3, patience_s=0.0) < 5
    assert 5 < when_begun(3) < 15  # of 40: some steps for others to come
    assert when_begun(1) < 5  # while few are answered, nothing is won by waiting


def test_others_get_tokens_between_two_prefills(small):
    def when_begun(steps):
        todo = jobs(small, [(4, 0, 20), (5, 0, 20), (6, 0, 20)])
        begun, first = {}, todo[0]
        # A row holds one prompt.
        made = scheduler(small, 3, row_tokens=1, steps_between_rows=steps)
        for job in made.run(engine.Ready(todo)):
            begun.setdefault(job.key, len(first.generated))
        return begun, [job.generated for job in todo]

    together, wanted = when_begun(0)
    apart, found = when_begun(4)
    assert max(together.values()) <= 2
    assert [apart[1], apart[2]] == [5, 9]
    assert found == wanted


class Late:
    """A source whose second jobs come once the first ones run."""

    def __init__(self, first, second):
        self.first, self.second = list(first), list(second)
        self.ready = False

    def take(self, *, wait):
        if self.first:
            return self.first.pop(0)
        if not (wait or self.ready):
            self.ready = True
            return None
        return self.second.pop(0) if self.second else None


def test_slots_are_as_long_as_they_are_asked_for(small):
    lone = scheduler(small, 2, length=700)
    list(lone.run(engine.Ready(jobs(small))))
    assert lone.decoder.cache.length == 768


def test_likelihoods_of_every_token(small):
    todo = jobs(small, [(4, 0, 5), (5, 1, 6)])
    todo[1].top_logprobs = 2
    tokens(small, todo, 2)
    assert todo[0].logprobs == []
    assert [pairs[0][0] for _, pairs in todo[1].logprobs] == todo[1].generated
    assert all(value == pairs[0][1] >= pairs[1][1] for value, pairs in todo[1].logprobs)


class Trickle:
    """A source that has a job only every other time it is asked, unless it must."""

    def __init__(self, todo):
        self.todo, self.asked = list(todo), 0

    def take(self, *, wait):
        self.asked += 1
        if not self.todo or (not wait and self.asked % 2):
            return None
        return self.todo.pop(0)


def test_jobs_may_come_while_others_are_answered(small):
    wanted = tokens(small, jobs(small), 1)
    found = {j.key: j.generated for j in scheduler(small, 3).run(Trickle(jobs(small))) if j.ended}
    assert found == wanted


def test_memory_for_not_even_one_request(small, monkeypatch):
    asked = []

    def allocate(slots, length, dtype):
        asked.append(slots)
        raise torch.OutOfMemoryError

    full = scheduler(small, 5)
    monkeypatch.setattr(full.decoder, "allocate", allocate)
    with pytest.raises(RunError, match=r"one request of 256 tokens; lower max_new_tokens"):
        next(full.run(engine.Ready(jobs(small))))
    assert asked == [5, 2, 1]


def test_a_row_that_the_memory_does_not_hold_is_begun_again_with_less(small, monkeypatch):
    wanted = tokens(small, jobs(small), 1)
    poor = scheduler(small, 4)
    prefill, see = poor.decoder.prefill, poor.tower.see
    rows = []

    def little(placed):
        rows.append(sum(len(one.input_ids) for one in placed))
        if len(placed) > 1 or (poor.active and rows[-1] > 20):
            raise torch.OutOfMemoryError
        return prefill(placed)

    def narrow(tiles):
        if any(t is not None for t in tiles) and poor.tower.most > 2:
            raise torch.OutOfMemoryError
        return see(tiles)

    monkeypatch.setattr(poor.decoder, "prefill", little)
    monkeypatch.setattr(poor.tower, "see", narrow)
    found = {j.key: j.generated for j in poor.run(engine.Ready(jobs(small))) if j.ended}
    assert found == wanted
    assert max(rows) > min(rows)


def test_memory_for_not_even_one_prompt(small, monkeypatch):
    none = scheduler(small, 3)

    def prefill(placed):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(none.decoder, "prefill", prefill)
    with pytest.raises(RunError, match="for a prompt of 3 tokens; lower max_tiles"):
        list(none.run(engine.Ready(jobs(small))))


@pytest.mark.parametrize("part", ["allocate", "prefill"])
def test_in_step_less_at_a_time_is_no_way_out(small, monkeypatch, part):
    """Other ranks would wait for ever in the pass that this one has left; no user's error either,
    after which an evaluation goes on with its next batch."""
    calls = []

    def full(*_):
        calls.append(part)
        raise torch.OutOfMemoryError

    one = scheduler(small, 5, in_step=True)
    monkeypatch.setattr(one.decoder, part, full)
    with pytest.raises(torch.OutOfMemoryError):
        next(one.run(engine.Ready(jobs(small))))
    assert calls == [part]


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_are_those_of_generate(model, num_beams):
    shapes = ((3, 0, 6), (9, 1, 1), (4, 2, 7), (2, 1, 9))
    extra = {"length_penalty": 0.5}

    def asked():
        return jobs(model, shapes, num_beams=num_beams, min_new_tokens=1, extra=extra)

    wanted = {job.key: theirs(model, job) for job in asked()}
    for slots in (1, 3):
        found = tokens(model, asked(), slots, num_beams=num_beams, lag=slots // 3)
        assert found == wanted


def test_an_end_of_beams_is_that_of_generate(small):
    end = tokens(small, jobs(small, num_beams=3), 1, num_beams=3, end_id=-1)[4][5]
    found = tokens(small, jobs(small, num_beams=3), 2, num_beams=3, end_id=end)
    assert len(found[4]) < SHAPES[4][2]
