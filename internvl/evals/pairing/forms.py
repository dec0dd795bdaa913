"""Forms of an answer: what a question asks for, and where the final answer stands in a response.

Original: `tools/reasoning_data_pipeline`; its prompt versions en, en_v2 and en_r1 are `reason`,
`boxed` and `think`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from internvl.data.messages import IMAGE_MARK, count_marks, fill_marks
from internvl.files import read_yaml

_SHORT_ANSWER = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Please answer Yes or No.",
    "Please answer the question and put the final answer within \\boxed{}.",
)
"""Ends of questions that contradict an instruction to reason."""
_TRIGGERS = ("Final answer:", "Final Answer:", "答案:")
_THOUGHT = re.compile(r"<think>.*?</think>\s*.+", re.DOTALL)
_BOX = "\\boxed{"
_SHORTEST_REASONING = 20
"""Characters; a shorter response does not reason."""


@dataclass(frozen=True)
class Form:
    """A form of answers."""

    instruction: str
    """Text with {question} in it; empty for the question as it is."""
    final: Callable[[str], str | None]
    """Returns the final answer of a response; None if it is not in this form."""

    def asked(self, question: str) -> str:
        """Returns a question with the instruction around it; a lone image's mark comes first."""
        if not self.instruction:
            return question
        for instruction in _SHORT_ANSWER:
            if question.endswith(instruction):
                question = question[: -len(instruction)].strip()
        # An instruction before the image would be another prompt than the models were trained on.
        lone = count_marks(question, IMAGE_MARK) == 1
        if lone:
            question = fill_marks(question, IMAGE_MARK, lambda: "").strip()
        text = self.instruction.replace("{question}", question)
        return f"{IMAGE_MARK}\n{text}" if lone else text


def _plain(response: str) -> str | None:
    return response.strip() or None


def _after_trigger(response: str) -> str | None:
    """Returns what follows "Final answer:", which a reasoning of two lines must precede."""
    # The first of these that occurs, in this order, as in the original.
    trigger = next((t for t in _TRIGGERS if t in response), _TRIGGERS[-1])
    if not 1 <= response.count(trigger) <= 2 or response.count("\n") < 2:
        return None
    reasoning, answer = response.rsplit(trigger, 1)
    answer = answer.strip()
    # A final answer of several lines is no final answer but more reasoning.
    return answer if reasoning.strip() and answer and "\n" not in answer else None


def _in_box(response: str) -> str | None:
    # Without a box the whole response is compared, which a reasoning never equals.
    return boxed(response) if len(response) > _SHORTEST_REASONING else None


def _after_thought(response: str) -> str | None:
    """Returns the boxed answer behind the only <think>…</think>."""
    if _THOUGHT.fullmatch(response) is None:
        return None
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return None
    thought, answer = (text.strip() for text in response.split("</think>"))
    # The original measures the thought with its tag, which alone is not longer than this.
    if len(thought) <= _SHORTEST_REASONING or boxed(answer) == answer:
        return None
    return boxed(response)


def boxed(text: str) -> str:
    r"""Returns the content of the last \boxed{…} of a text; the whole text without one.

    >>> boxed(r"So \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(_BOX)
    if start < 0:
        return text
    start += len(_BOX)
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text


_FINALS: dict[str, Callable[[str], str | None]] = {
    "plain": _plain,
    "reason": _after_trigger,
    "boxed": _in_box,
    "think": _after_thought,
}
NAMES = ("plain", *(f"{name}{end}" for name in ("reason", "boxed", "think") for end in ("", "-zh")))
"""Forms by name; those that end with -zh ask in Chinese."""


@cache
def form(name: str) -> Form:
    """Returns a form by its name, one of NAMES."""
    texts = read_yaml(Path(__file__).with_name("forms.yaml"))
    instruction = texts.get(name, "").replace("{protocol}", texts["protocol"])
    return Form(instruction, _FINALS[name.removesuffix("-zh")])
