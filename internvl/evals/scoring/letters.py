"""Multiple choice: the option that an answer names.

Original: `post_process` and `parse_multi_choice_response` of `internvl_chat/eval/*`.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b

_FINAL = re.compile(r"(Final answer:|Answer:)\s*(.*)", re.IGNORECASE)
_MARKS = (",", ".", "!", "?", ";", ":", "'")

Options = Mapping[str, str]
"""Letter -> text of the option."""


def final_answer(text: str) -> str:
    """Returns what follows the first "Final answer:" or "Answer:", to the end of its line; the
    whole text without one.

    >>> final_answer("It grows. Final answer: B")
    'B'
    """
    # The first one, also inside a word: evaluate_scienceqa.py:41, the same in pope and mathvista.
    match = _FINAL.search(text)
    return match[2].strip() if match else text


def option_letter(answer: str, options: Options) -> str:
    """Returns the letter that begins an answer, else that of the first option whose text it
    contains, else the answer stripped. Original: MMBench, CCBench, MMMU, MMIU, MMVP."""
    text = answer.strip()
    # The original stops at an empty answer.
    if len(text) <= 1:
        return text
    if text[0] in options:
        return text[0]
    return next((letter for letter, option in options.items() if str(option) in text), text)


def open_or_letter(answer: str, options: Options) -> str:
    """Returns `option_letter`, or the unchanged answer to an open question."""
    return option_letter(answer, options) if options else answer


def science_letter(answer: str, options: Options) -> str:
    """Returns `option_letter`, else X of "X." or "(X)" for any character X. Original: ScienceQA."""
    text = option_letter(answer, options)
    if len(text) > 1 and text[1] == ".":
        text = text[0]
    # "(Z" alone stops the original.
    return text[1] if len(text) > 2 and text[0] == "(" and text[2] == ")" else text


_ANSWER = r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*"


def careful_letter(answer: str, options: Options) -> str:
    """Returns the letter of the option that an answer chooses, or an empty text.

    In this order: a letter alone or after "answer"; one in brackets; one at the beginning or end
    that is no word; an option's whole text; the only option whose text stands in the answer.
    Several letters beside each other, as in "A or B", choose none.

    >>> careful_letter("(b)", {"A": "Yes", "B": "No"})
    'B'
    >>> careful_letter("Because it is a dog", {"A": "cat", "B": "dog"})
    'B'
    """
    letters = "".join(options)
    text = answer.strip().strip("*$ ")
    if not text or not letters:
        return ""
    anywhere, exact_case = f"[{letters}{letters.lower()}]", f"[{letters}]"
    patterns = (
        rf"^\(?({anywhere})[\).:,]*$",
        rf"{_ANSWER}\(?({exact_case})\b(?!['’])",
        rf"\(({anywhere})\)",
        rf"^({exact_case})[\).:,](?:\s|$)",
        # "A" may be the article: only before a line's end.
        rf"^({exact_case})\s*(?:\n|$)",
        rf"(?<![Nn]ot)(?:^|\s)({exact_case})[.!]?$",
    )
    several = rf"\(?{exact_case}\)?(?:\s*(?:[,/&、或和]|or\b|and\b)+\s*\(?{exact_case}\b\)?)+"
    # Who names all of them would be right whatever the question.
    if re.search(rf"(?:^|{_ANSWER})(?i:either\s+|both\s+)?{several}[.!]?$", text):
        return ""
    for pattern in patterns:
        matches = re.findall(pattern, text)
        if matches:
            return matches[-1].upper()
    lowered = text.lower().rstrip(".")
    for letter, option in options.items():
        if lowered == str(option).strip().lower().rstrip("."):
            return letter
    named = [
        letter
        for letter, option in options.items()
        if str(option).strip() and re.search(_word(str(option).strip()), text, re.IGNORECASE)
    ]
    return named[0] if len(named) == 1 else ""


def _word(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def response_letter(response: str, options: Options, *, pro: bool = False) -> str | None:
    """Returns the option that a longer response names last, or None if it names none.

    Original: MMMU's `parse_multi_choice_response`; `pro` is MMMU-Pro's, which takes the only
    letter after the last "Answer:" first, and needs no space before a letter.
    """
    if pro and "Answer:" in response:
        tail = response.rpartition("Answer:")[2].strip()
        unique = [letter for letter in options if letter in tail]
        if len(unique) == 1:
            return unique[0]
    for mark in _MARKS:
        response = response.strip(mark)
    # Spaces around, so that a letter at either end is told from the part of a word.
    response = f" {response} "
    forms = ["({})", "{} ", "{}."] if pro else ["({})", " {} "]
    for form in forms:
        letters = [letter for letter in options if form.format(letter) in response]
        if letters:
            last = form if form == "({})" else " {} "
            return _last(letters, [response.rfind(last.format(letter)) for letter in letters])
    if len(response.split()) <= 5:
        return None
    lowered = response.lower()
    letters = [letter for letter, text in options.items() if text.lower() in lowered]
    return _last(letters, [lowered.rfind(options[letter].lower()) for letter in letters])


def _last(letters: Sequence[str], positions: Sequence[int]) -> str | None:
    """Returns the letter at the largest position, the first of equal ones; None without any."""
    if not letters:
        return None
    return letters[max(range(len(letters)), key=lambda index: (positions[index], -index))]


def drawn_letter(response: str, options: Options) -> str:
    """Draws an option for a response that names none, the same whenever it is called.

    The original draws from a global generator, so its score differs from run to run.
    """
    digest = blake2b(response.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    letters = list(options)
    return letters[int.from_bytes(digest, "big") % len(letters)] if letters else ""


def pro_letter(response: str, options: Options) -> str:
    """Returns the option of a response by MMMU-Pro's rules, a drawn one if it names none."""
    return response_letter(response, options, pro=True) or drawn_letter(response, options)


_WORLD_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    # One entry: the original's list lacks a comma here.
    "The best option isThe correct option is",
    "Best answer:",
    "Best option:",
)


def world_letter(answer: str, choices: Sequence[str]) -> str:
    """Returns the first capital A to E of an answer, else the letter of the first choice that
    contains it. Original: MME-RealWorld; choices are written "(A) text"."""
    text = answer.strip()
    for prefix in _WORLD_PREFIXES:
        text = text.replace(prefix, "")
    # mme_rw/evaluate.py:126: anywhere, so that "Answer: C" is A by the A of Answer.
    match = re.search("[ABCDE]", text)
    if match:
        return match[0]
    if len(text.split()) > 10:
        return ""
    return next((choice[1] for choice in choices if text.lower() in choice.lower()), "")


def first_letter(answer: str) -> str:
    """Returns the first character of an answer, empty for an empty one. Original: SEED."""
    return answer[:1]


def video_choice(answer: str, expected: str) -> bool:
    """True if the first words of an answer and of "(A) text" contain one another.

    Original: MVBench; an answer whose first word is empty, "." or a bracket is right there.
    """
    first = answer.replace("Answer: ", "").lower().split(" ")[0]
    option = expected.lower().split(" ")[0]
    return first.replace(".", "") in option or option in first


def interleaved_choice(answer: str, letter: str, options: Sequence[str], is_choice: bool) -> bool:
    """True if an answer is the letter, the letter in brackets, or the raw text of its option; for
    an open question, if it equals the expected answer without case. Original: Mantis-Eval."""
    if not is_choice:
        return answer.lower() == letter.lower()
    if len(answer) == 3 and answer[0] == "(" and answer[-1] == ")":
        answer = answer[1:-1]
    # As Python indexes: "@" names the last option.
    index = ord(letter) - ord("A") if len(letter) == 1 else len(options)
    text = options[index] if -len(options) <= index < len(options) else None
    return answer in (letter, text)
