"""Requests in, tokens out: slots that are refilled as answers end.

    tower     tiles of several requests at a time
    prefill   their prompts as one packed row, without padding between them
    decode    one token of every slot, or one for each beam of its search

A request's tokens do not depend on what else is in flight, but for rounding.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from internvl import log
from internvl.data.images import Triple
from internvl.errors import RunError
from internvl.inference.engine.beams import until_end
from internvl.inference.engine.cache import SlotCache
from internvl.inference.engine.choosing import choose, is_plain, likelihoods
from internvl.inference.engine.decoder import REACH, Decoder, Placed, Snapshot, on_device
from internvl.inference.engine.queries import QueryDecoder
from internvl.inference.engine.tower import Tower
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings
from internvl.parallel import lockstep

# For annotations only: PEFT takes half a second, which most requests need not wait.
if TYPE_CHECKING:
    from internvl.models.adapters.switched import Switch


@dataclass(eq=False)
class Job:
    """A request on its way."""

    key: Any
    """The caller's own name for it."""
    prompt: Prompt
    """Without its tiles once they are computed."""
    settings: Settings
    generated: list[int] = field(default_factory=list)
    """Tokens so far, the one that ends the answer included; of a beam search all at its end."""
    ended: bool = False
    cancelled: bool = False
    """Set by anyone: it ends before its next token."""
    generator: torch.Generator | None = None
    """Draws its samples, on the model's device; None for torch's global one."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens `logprobs` lists; None for no `logprobs`."""
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """For each token its log-probability, and the likeliest tokens with theirs."""
    adapter: int = 0
    """Which of the scheduler's adapters computes it; 0 for none."""
    since_s: float = field(default_factory=time.monotonic)
    """When it came, by the monotonic clock."""

    @property
    def prompt_ids(self) -> Tensor:
        """int64 (T,)."""
        return torch.from_numpy(self.prompt.input_ids)

    @property
    def length(self) -> int:
        """Tokens that its slot must hold: the prompt, and all but the last that it may generate,
        in each beam."""
        return self.length_after(self.settings.max_new_tokens)

    @property
    def text_length(self) -> int:
        """Tokens of the prompt and of the longest answer to it, but its last."""
        return len(self.prompt.input_ids) + self.settings.max_new_tokens - 1

    def length_after(self, count: int) -> int:
        """Tokens that its slot holds when the last of `count` new ones is computed."""
        return len(self.prompt.input_ids) + self.settings.num_beams * (count - 1)


@dataclass(eq=False)
class _Launched:
    """Tokens that the device computes, and the host has not read yet."""

    jobs: Sequence[tuple[int, Job]]
    """Slots, and the jobs that were in them."""
    tokens: Snapshot
    logits: dict[int, Tensor]
    """float32 (V,) by slot, where log-probabilities were asked for."""


class Source(Protocol):
    """Where jobs come from, in the order in which they are begun."""

    def take(self, *, wait: bool) -> Job | None:
        """Returns the next job, or None if none is ready; with `wait`, None means the end."""
        ...


class Scheduler:
    """Runs jobs over a model; one thread at a time."""

    def __init__(
        self,
        model: Any,
        *,
        end_id: int,
        statistics: tuple[Triple, Triple],
        slots: int,
        dtype: torch.dtype | None = None,
        row_tokens: int = 16384,
        tiles_at_once: int = 64,
        compiled: bool = False,
        refill: bool = True,
        length: int = 0,
        patience_s: float = math.inf,
        steps_between_rows: int = 0,
        lag: int | None = None,
        switch: "Switch | None" = None,
        num_beams: int = 1,
        in_step: bool = False,
    ) -> None:
        """Does not allocate yet: the first jobs say how long a slot must be.

        Args:
            end_id: the token that ends an answer.
            statistics: mean and deviation that tiles are normalized with.
            slots: most requests in flight; fewer if the device's memory holds fewer.
            dtype: of keys and values; by default the model's.
            row_tokens: most tokens of a prefill; a longer prompt is one of its own.
            tiles_at_once: most tiles in the vision tower.
            compiled: compile the blocks of tower and language model.
            refill: give a slot to the next request when its own ends; otherwise when all have.
            length: least length of a slot, in tokens; by default what the first jobs need.
            patience_s: longest that a request waits for others to share its prefill.
            steps_between_rows: tokens that the others get before the next row is prefilled.
            lag: steps that are begun before the tokens of an earlier one are read, so that a GPU
                never waits for the host; by default 1 on a GPU, 0 on a CPU, which would compute
                tokens after an answer's end in vain.
            switch: chooses the adapter of each job.
            num_beams: beams of every job's search; 1: none.
            in_step: every pass is collective (see `lockstep`). Each rank then runs as many: at
                first it has all of its jobs, a row of prompts holds them, and it decodes until the
                last rank has its answers.
        """
        # By name, not by a table: of the two families only this one's prompts have queries.
        decoder = QueryDecoder if model.family == "dual" else Decoder
        self.decoder: Decoder = decoder(
            model, compiled=compiled, num_beams=num_beams, end_id=end_id
        )
        self.num_beams = num_beams
        self.in_step = in_step
        self.tower = Tower(model, statistics, tiles_at_once, compiled=compiled)
        self.refill = refill
        self.switch = switch
        self.length = length
        self.patience_s = patience_s
        self.steps_between_rows = steps_between_rows
        self.model = model
        self.end_id = end_id
        self.most_slots = slots
        self.dtype = dtype or model.get_input_embeddings().weight.dtype
        self.row_tokens = row_tokens
        self.lag = (1 if model.device.type == "cuda" and not in_step else 0) if lag is None else lag
        self.active: dict[int, Job] = {}
        """Jobs by slot of which a token is still to be computed."""
        self.begun: dict[int, int] = {}
        """Tokens of each active slot's job that are computed or begun."""
        self.launched: deque[_Launched] = deque()
        self.free: list[int] = []
        self.waiting: deque[Job] = deque()
        self.waited = 0
        """Steps that a short row has waited for others to fill it."""
        self.steps_since_row = 0
        """Tokens of every active job since the last prefill."""

    def run(self, source: Source) -> Iterator[Job]:
        """Yields a job after each of its tokens, until the source has no more."""
        drained = False
        while True:
            while not drained and len(self.waiting) < self.most_slots:
                # In step also for the others of its row: how soon they are read differs by rank.
                waits = self.in_step or not (self.waiting or self.active or self.launched)
                job = source.take(wait=waits)
                if job is None:
                    drained = waits
                    break
                self.waiting.append(job)
            ended = drained and not (self.waiting or self.active or self.launched)
            if lockstep.all_done(ended) if self.in_step else ended:
                return
            yield from self._drop_cancelled()
            self._admit()
            if self.active or (self.in_step and not self.waiting):
                yield from self._advance()
            # Without a next step there is nothing to overlap with.
            yield from self._read(self.lag if self.active else 0)

    def _drop_cancelled(self) -> Iterator[Job]:
        """Ends cancelled jobs, whose slots become free."""
        in_slots = {slot: job for slot, job in self.active.items() if job.cancelled}
        jobs = [*in_slots.values(), *(job for job in self.waiting if job.cancelled)]
        if not jobs:
            return
        for slot in in_slots:
            self._leave(slot)
        self.waiting = deque(job for job in self.waiting if not job.cancelled)
        for job in jobs:
            job.ended = True
        yield from jobs

    def _admit(self) -> None:
        """Prefills waiting jobs into free slots, while they fill a row."""
        if self.active and not self.refill:
            return
        while self.waiting and self._fits(self.waiting[0].length):
            if self.active and self.steps_since_row < self.steps_between_rows:
                return
            jobs = self._row()
            # A short row costs as many launches as a long one: while others decode, it may wait.
            if not jobs:
                return
            self.waited = self.steps_since_row = 0
            # Not again at once after one that the memory did not hold: others may end first.
            with on_device(self.model.device):
                begun = self._prefill(jobs)
            if not begun:
                return

    def _fits(self, length: int) -> bool:
        """Makes slots long enough for `length` tokens if none is in use; True if they are."""
        cache = self.decoder.cache
        if cache is not None and length <= cache.length:
            return True
        if self.active:
            return False
        # As long as all that wait need: each new length builds new kernels and graphs.
        longest = max(self.length, self.num_beams, *(job.length for job in self.waiting))
        self._allocate(-(-longest // REACH) * REACH)
        return True

    def _allocate(self, length: int) -> None:
        """Makes as many slots of `length` tokens as are asked for and fit.

        Raises:
            RunError: the device does not hold one.
        """
        slots = min(self.most_slots, self._slots_in_memory(length))
        while True:
            try:
                self.decoder.allocate(slots, length, self.dtype)
                break
            except torch.OutOfMemoryError as error:
                if self.in_step:
                    raise
                if slots == 1:
                    raise RunError(
                        f"out of GPU memory for one request of {length:,} tokens; lower "
                        "max_new_tokens or max_tiles, or quantize the model"
                    ) from error
                slots //= 2
        self.free = list(reversed(range(slots)))
        # On a CPU they are as many as were asked for, which tells nobody anything.
        level = logging.INFO if self.model.device.type == "cuda" else logging.DEBUG
        fewer = slots < self.most_slots
        why = f"the memory holds no more of {self.most_slots}" if fewer else "the memory holds all"
        log.get_logger().log(
            level, "%d requests at a time, of %s tokens: %s", slots, f"{length:,}", why
        )

    def _slots_in_memory(self, length: int) -> int:
        """Returns how many slots the device's free memory holds beside a prefill; at least 1."""
        device = self.model.device
        # In step all of a rank's jobs are one row, whatever its memory.
        if device.type != "cuda" or self.in_step:
            return self.most_slots
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        # A row's widest moment, and its logits.
        row = self.decoder.prefill_bytes(self.row_tokens, self.dtype.itemsize)
        # Of beams also their log-probabilities, and what the best ones are sorted in.
        copies = 3 if self.num_beams == 1 else 6 * self.num_beams
        logits = copies * self.most_slots * self.decoder.config.vocab_size * 4
        spare = free + unused - row - logits - _RESERVE
        slot = SlotCache.bytes_per_slot(
            length=length, item=self.dtype.itemsize, **self.decoder.shape
        )
        return max(1, int(spare // slot) - 1)

    def _row(self) -> list[Job]:
        """Takes waiting jobs for one row; none if it pays to let more slots become free first."""
        assert self.decoder.cache is not None
        count, tokens = 0, 0
        for job in self.waiting:
            length = len(job.prompt.input_ids)
            if count == len(self.free) or job.length > self.decoder.cache.length:
                break
            if count and tokens + length > self.row_tokens:
                break
            count, tokens = count + 1, tokens + length
        is_full = count < len(self.free) and count < len(self.waiting)
        # A step costs the same for few: at first slots are filled as soon as there is a request.
        few = count < min(self.decoder.cache.slots // _REFILL, len(self.active))
        is_patient = time.monotonic() - self.waiting[0].since_s < self.patience_s
        is_patient = is_patient and self.waited < _PATIENCE
        if self.active and few and not is_full and is_patient:
            self.waited += count > 0
            return []
        return [self.waiting.popleft() for _ in range(count)]

    def _prefill(self, jobs: Sequence[Job]) -> bool:
        """Begins jobs in free slots; False if the memory does not hold them together."""
        slots = [self.free.pop() for _ in jobs]
        try:
            visual = self.tower.see([job.prompt.tiles for job in jobs])
            placed = [
                Placed(job.prompt_ids, tokens, slot)
                for job, tokens, slot in zip(jobs, visual, slots, strict=True)
            ]
            if self.switch is not None:
                lengths = [len(job.prompt.input_ids) for job in jobs]
                self.switch.prefill(lengths, [job.adapter for job in jobs], self.model.device)
            logits = self.decoder.prefill(placed)
        except torch.OutOfMemoryError as error:
            # The other ranks are in a pass that this one left: with more of them it would hang.
            if self.in_step:
                raise
            # Nothing of a row that failed is read again: its slots are written from the start.
            self.free += reversed(slots)
            self.waiting.extendleft(reversed(jobs))
            self._take_less(jobs, error)
            return False
        for job in jobs:
            # Tiles are many megabytes, which other requests can be read into.
            job.prompt = replace(job.prompt, tiles=None)
        self.begun |= dict.fromkeys(slots, 0)
        self.active |= zip(slots, jobs, strict=True)
        if self.num_beams > 1:
            sizes = [len(job.prompt.input_ids) for job in jobs]
            self.decoder.begin(slots, sizes, [job.settings for job in jobs], logits)
        self._choose(logits, slots, jobs)
        return True

    def _take_less(self, jobs: Sequence[Job], error: torch.OutOfMemoryError) -> None:
        """Halves what is computed together, after a row that the memory did not hold.

        Raises:
            RunError: there is nothing left to halve.
        """
        tokens = sum(len(job.prompt.input_ids) for job in jobs)
        if len(jobs) > 1:
            self.row_tokens = max(1, tokens // 2)
        elif self.tower.most > 1:
            self.tower.most //= 2
        elif self.active:
            self.refill = False  # the next one has the memory alone, once these have ended
        elif self.most_slots > 1:
            self.most_slots = max(1, min(self.most_slots, len(self.free)) // 2)
            self.decoder.cache = None
        else:
            raise RunError(
                f"out of GPU memory for a prompt of {tokens:,} tokens; lower max_tiles, or "
                "quantize the model"
            ) from error
        log.get_logger().warning(
            "out of GPU memory in a prefill of %s tokens: going on with less at a time",
            f"{tokens:,}",
        )

    def _advance(self) -> Iterator[Job]:
        """Decodes one token of every active job."""
        self.steps_since_row += 1
        # What they choose from depends on all of their tokens.
        if self.num_beams == 1 and not all(is_plain(job) for job in self.active.values()):
            yield from self._read(0)
            if not self.active and not self.in_step:
                return
        assert self.decoder.cache is not None
        positions = [0] * self.decoder.cache.slots
        for slot, job in self.active.items():
            positions[slot] = len(job.prompt.input_ids) + self.begun[slot] - 1
        if self.num_beams == 1:
            self.decoder.place(positions)
        if self.switch is not None:
            adapters = [0] * self.decoder.cache.slots
            for slot, job in self.active.items():
                adapters[slot] = job.adapter
            self.switch.decode(adapters, self.model.device)
        # In step a rank may have no job any more.
        lengths = (job.length_after(self.begun[slot] + 1) for slot, job in self.active.items())
        slots = sorted(self.active)
        with on_device(self.model.device):
            logits = self.decoder.decode(max(lengths, default=self.num_beams))
            self._choose(logits, slots, [self.active[slot] for slot in slots], slots)

    def _choose(
        self,
        logits: Tensor,
        slots: Sequence[int],
        jobs: Sequence[Job],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Begins the next token of jobs in slots; those with their last one leave their slots.

        Args:
            rows: rows of the logits that are theirs; None: in order.
        """
        rows = range(len(jobs)) if rows is None else rows
        for slot, job, row in zip(slots, jobs, rows, strict=True):
            if self.num_beams == 1 and not is_plain(job):
                self.decoder.tokens[slot] = choose(logits[row : row + 1], [job], self.end_id)[0]
        pairs = list(zip(slots, jobs, strict=True))
        # Copied: the next step writes there.
        rows_of = zip(slots, jobs, rows, strict=True)
        likely = {
            slot: logits[row].clone() for slot, job, row in rows_of if job.top_logprobs is not None
        }
        self.launched.append(_Launched(pairs, self.decoder.snapshot(), likely))
        for slot, job in pairs:
            self.begun[slot] += 1
            # Whatever takes the slot now is computed after its last token.
            if self.begun[slot] == job.settings.max_new_tokens:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        del self.active[slot], self.begun[slot]
        self.free.append(slot)

    def _read(self, lag: int) -> Iterator[Job]:
        """Reads tokens that were begun, all but the last `lag` steps."""
        while len(self.launched) > lag:
            step = self.launched.popleft()
            outcome = step.tokens.read()
            first = (outcome if self.num_beams == 1 else outcome[:, 0]).tolist()
            # A token after an answer's end was begun before that was read.
            pairs = [(slot, job) for slot, job in step.jobs if not job.ended]
            for slot, job in pairs:
                if self.num_beams > 1:
                    job.ended = bool(first[slot]) or job.cancelled
                    if first[slot]:
                        most = job.settings.max_new_tokens
                        text = outcome[slot, 1 : 1 + most].tolist()
                        job.generated += until_end(text, self.end_id)
                else:
                    self._add(job, first[slot], step.logits.get(slot))
                if job.ended and self.active.get(slot) is job:
                    self._leave(slot)
            # After all of them: whoever is called may stop here, and the slots must agree.
            yield from [job for _, job in pairs]

    def _add(self, job: Job, token: int, logits: Tensor | None) -> None:
        """Adds a token to a job, and its log-probability if logits (V,) were asked for."""
        # First: who reads the tokens in another thread reads as many of these.
        if job.top_logprobs is not None and logits is not None:
            job.logprobs.append(likelihoods(logits, token, job.top_logprobs))
        job.generated.append(token)
        full = len(job.generated) == job.settings.max_new_tokens
        job.ended = token == self.end_id or full or job.cancelled


_RESERVE = 3 * 2**30
"""Bytes left to the vision tower and to the memory's fragments."""

_REFILL = 8
"""A row is prefilled once this part of the slots is free, or sooner if a row is full."""

_PATIENCE = 8
"""Steps after which a row is prefilled however short it is."""
