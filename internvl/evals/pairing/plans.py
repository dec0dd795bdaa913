"""What is asked about each question of a file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from internvl.errors import BadSample, UserError
from internvl.evals.pairing import questions
from internvl.evals.pairing.choosing import CORRECTNESS, DROPOUT_NTP, beginning
from internvl.evals.pairing.options import PairOptions
from internvl.evals.pairing.questions import Question
from internvl.evals.pairing.rules import rule_of
from internvl.evals.scores import raise_or_log

REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"


@dataclass(frozen=True)
class Plan:
    """What is asked about a question."""

    question: Question
    rule: str | None
    """None: its reference is continued without the image."""
    prefix: str = ""
    reason: str = ""
    """Why nothing is asked."""

    @property
    def method(self) -> str:
        return DROPOUT_NTP if self.rule is None else CORRECTNESS


@dataclass(frozen=True)
class Planned:
    """The questions of a file."""

    plans: Sequence[Plan]
    bad: Sequence[BadSample]
    """Rows that cannot be read."""


def plan_questions(options: PairOptions) -> Planned:
    """Reads the questions and says what is asked about each.

    Raises:
        UserError: bad rows, unless they are skipped; no question at all.
    """
    bad: list[BadSample] = []
    plans: list[Plan] = []
    seen: set[tuple[str, ...]] = set()
    rows = questions.read(options.annotations, options.images, tolerance=options.tolerance)
    for row in rows:
        # Before the next row is parsed: files are long, and trials ask a few questions.
        if options.limit is not None and len(plans) + len(bad) >= options.limit:
            break
        if isinstance(row, BadSample):
            bad.append(row)
            continue
        of_row = _plan(row, options)
        # Its answers would be the same ones, as they hang on the question alone.
        content = (row.key, *row.reference.texts)
        if content in seen:
            of_row = replace(of_row, reason="its question is in the file already")
        seen.add(content)
        plans.append(of_row)
    raise_or_log(bad, options.on_bad_sample, REMEDY)
    if not plans:
        raise UserError(f"{options.annotations} holds no question with a reference answer")
    return Planned(plans, bad)


def _plan(question: Question, options: PairOptions) -> Plan:
    # A rule that is asked for holds for long references too.
    rule = rule_of(question.reference) if options.rule == "auto" else options.rule
    if options.method == CORRECTNESS and rule is None:
        reason = "no rule can compare its reference; choose one, or the method dropout-ntp"
        return Plan(question, None, reason=reason)
    if options.method == CORRECTNESS or (options.method == "auto" and rule is not None):
        return Plan(question, rule)
    # Nothing would be dropped: the continuation is as good as the reference.
    if not question.media:
        return Plan(question, None, reason="it has no image to leave out")
    # The first of several: each of them would be a good answer.
    prefix = beginning(question.reference.texts[0], options.begin)
    return Plan(question, None, prefix, "" if prefix else "its reference is too short to be cut")
