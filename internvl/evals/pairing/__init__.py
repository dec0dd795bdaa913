"""Makes preference pairs of a model's own answers: `internvl data make-pairs`.

    correctness   several answers are sampled and called right or wrong by reference answers
    dropout-ntp   a good answer is cut, and the model continues its beginning without the image

Original: `tools/reasoning_data_pipeline`. A question's answers depend on its seed alone, so neither
batches nor the order of the file nor the number of ranks change them, but for rounding.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from internvl import dist
from internvl.errors import BadSample, UserError, counted
from internvl.evals import asking
from internvl.evals.call import opening
from internvl.evals.pairing.choosing import DROPOUT_NTP, Chosen, by_correctness, by_dropout
from internvl.evals.pairing.forms import form
from internvl.evals.pairing.options import PairOptions as PairOptions
from internvl.evals.pairing.plans import REMEDY, Plan, Planned, plan_questions
from internvl.evals.pairing.requests import Asker, seed_of
from internvl.evals.scores import raise_or_log
from internvl.files import write_lines
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.opened import OpenedModel, open_model

_BATCH, _GPU_BATCH = 64, 1024
"""Answers between two writes to the disk, and so the most that a killed run loses on a rank."""


@dataclass
class Made:
    """Result of `run`."""

    file: Path
    left_out_file: Path
    answers_folder: Path
    num_questions: int = 0
    with_pairs: int = 0
    """Questions that gave pairs."""
    pairs: Counter[str] = field(default_factory=Counter)
    """What sets the answers apart -> pairs."""
    rules: Counter[str] = field(default_factory=Counter)
    """Rule, or dropout-ntp -> questions."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why a question gave no pairs -> questions."""
    num_right: int = 0
    num_judged: int = 0
    """Answers that were called right or wrong."""


def run(
    model: Any,
    to: str | Path,
    options: PairOptions,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    base: Sequence[str] | None = None,
) -> Made | None:
    """Asks a chat model questions and writes the pairs of its answers; continues a killed call.

    Under torchrun, Slurm or MPI the questions are shared out over all processes.

    Args:
        model: what `internvl.load` takes, or an opened model.
        to: JSONL file of pairs, which objective mpo trains on. Beside it are the answers, which the
            same call reads instead of asking again, and the questions that gave no pairs.
        device, dtype, quantize, base: as of `internvl.load`.

    Returns:
        On rank 0, what was made; None on the others.

    Raises:
        UserError: questions that cannot be used, no chat model, or no pairs at all.
    """
    device = opening.join(device, None)
    # Before the model: reading finds bad questions in seconds, loading may take minutes.
    planned = plan_questions(options)
    opened = model if isinstance(model, OpenedModel) else open_model(model, base=base)
    handle = loading.load(opened, device=device, dtype=dtype, quantize=quantize)
    chat = handle.as_chat("data make-pairs")
    weights = dist.on_main(opened.weight_states), quantize
    return make(chat, weights, Path(to), options, planned)


def make(chat: Chat, weights: Any, to: Path, options: PairOptions, planned: Planned) -> Made | None:
    """Asks a loaded model; see `run`.

    Args:
        weights: what tells them from other weights, whose answers are not read again.
    """
    asks = [
        (plan, sample)
        for plan in planned.plans
        if not plan.reason
        for sample in range(options.samples if plan.rule else options.continuations)
    ]
    asker = Asker(chat, options, asks)
    # Kept afterwards: pairs by another rule, or fewer of them, need no new answers.
    folder = to.with_name(f"{to.stem}_answers") / asker.key(weights)
    # A batch ends with its longest answer, for which the other slots of a GPU wait.
    batch = _GPU_BATCH if chat.device.type == "cuda" else _BATCH
    answers = asking.ask(
        chat,
        len(asks),
        asker.question,
        options.settings(),
        batch_size=options.batch_size or batch,
        fills_device=options.batch_size is None,
        cache=folder,
        unit="answers",
    )
    return dist.main_alone(lambda: _write(planned, asks, answers, to, folder, options))


def _write(
    planned: Planned,
    asks: Sequence[tuple[Plan, int]],
    answers: Sequence[asking.Answer],
    to: Path,
    folder: Path,
    options: PairOptions,
) -> Made:
    """Pairs the answers and writes both files."""
    responses: dict[str, list[str]] = {}
    unread: dict[str, BadSample] = {}
    for (plan, _), answer in zip(asks, answers, strict=True):
        name = plan.question.name
        if "reason" in answer:
            unread[name] = BadSample(name, answer["reason"])
        else:
            responses.setdefault(name, []).append(answer["answer"])
    # Only now: the answers to all others are on the disk, and the next call has them.
    raise_or_log([*unread.values()], options.on_bad_sample, REMEDY)
    plans, bad = planned.plans, planned.bad
    result = Made(to, to.with_name(f"{to.stem}_left_out.jsonl"), folder, len(plans) + len(bad))
    left_out = [json.dumps({"sample": row.name, "reason": row.reason}) for row in bad]
    if bad:
        result.reasons["it cannot be read"] = len(bad)

    # One at a time: a question of fifteen pairs takes the memory of fifteen questions.
    def rows() -> Iterator[str]:
        for plan in plans:
            name = plan.question.name
            if name in unread:
                chosen, reason = Chosen(()), "it cannot be asked"
            elif plan.reason:
                chosen, reason = Chosen(()), plan.reason
            else:
                result.rules[plan.rule or DROPOUT_NTP] += 1
                chosen = _choose(plan, responses[name], options)
                reason = chosen.reason
            if plan.rule is not None:
                result.num_right += chosen.num_right
                result.num_judged += chosen.num_answers
            if reason:
                result.reasons[reason] += 1
                detail = unread[name].reason if name in unread else reason
                left_out.append(json.dumps({"sample": name, "reason": detail}))
                continue
            result.with_pairs += 1
            for pair in chosen.pairs:
                result.pairs[pair.made_by] += 1
                row = _row(plan, options) | {"chosen": pair.chosen, "rejected": pair.rejected}
                row |= _origin(plan, pair.made_by)
                # Readable in any language; a lone surrogate of a row was refused when it was read.
                yield json.dumps(row, ensure_ascii=False)

    # Without pairs there is no file of them, and an earlier one stays.
    pairs = rows()
    first = [*islice(pairs, 1)]
    if first:
        write_lines(to, chain(first, pairs))
    write_lines(result.left_out_file, left_out)
    # Only now: the file says why.
    if not first:
        raise UserError(f"no pairs: {_shares(result.reasons)}; see {result.left_out_file}")
    return result


def _choose(plan: Plan, responses: Sequence[str], options: PairOptions) -> Chosen:
    question = plan.question
    if plan.rule is None:
        return by_dropout(question.reference.texts[0], responses)
    return by_correctness(
        responses,
        question.reference,
        plan.rule,
        form(options.form),
        options.per_question,
        seed_of(options.seed, question.key, 0),
    )


def _row(plan: Plan, options: PairOptions) -> dict[str, Any]:
    """Returns the media and the question of a pair, in the original's row if it has one turn."""
    question = plan.question
    earlier = question.sample.messages[:-2]
    asked = question.text
    if plan.rule is not None:
        asked = form(options.form).asked(asked)
    # The original has no other row; several turns are a row of LLaMA-Factory's form.
    if not earlier:
        return {**question.media, "question": asked}
    roles = {"user": "human", "assistant": "gpt"}
    turns = [(roles.get(m.role, m.role), m.content) for m in earlier]
    turns.append(("human", asked))
    return {**question.media, "conversations": [{"from": f, "value": v} for f, v in turns]}


def _origin(plan: Plan, made_by: str) -> dict[str, Any]:
    """Returns what tells the pairs apart that other methods and rules made."""
    if plan.rule is None:
        return {"made_by": made_by}
    # What judged the answers, so that a pair that looks wrong can be traced.
    references = list(plan.question.reference.texts)
    answer = references[0] if len(references) == 1 else references
    return {"answer_gt": answer, "made_by": made_by, "rule": plan.rule}


def render(result: Made) -> str:
    """Returns the lines that say what was made."""
    pairs = sum(result.pairs.values())
    lines = [
        f"{counted(pairs, 'pair')} ({_shares(result.pairs)}) of "
        f"{counted(result.with_pairs, 'question')}: {result.file}"
    ]
    if result.num_judged:
        share = 100 * result.num_right / result.num_judged
        judged = {name: n for name, n in result.rules.items() if name != DROPOUT_NTP}
        lines.append(
            f"{share:.1f} % of {counted(result.num_judged, 'answer')} right, by rule "
            f"({_shares(judged)} questions)"
        )
    without = result.num_questions - result.with_pairs
    if without:
        lines.append(
            f"{counted(without, 'question')} without pairs ({result.left_out_file}): "
            f"{_shares(result.reasons)}"
        )
    lines.append(f"answers, for the same call: {result.answers_folder}")
    return "\n".join(lines)


def _shares(counts: Any) -> str:
    # The commonest first: it says what to change.
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {count:,}" for name, count in ordered)
