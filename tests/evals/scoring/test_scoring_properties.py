"""What holds for every answer, over drawn ones; and malformed answers, worked out by hand."""

import json
import math
import random
from itertools import pairwise

import pytest

from internvl.datasets.tasks import tasks
from internvl.evals.benchmark.readers import Item
from internvl.evals.benchmark.results import Outcome
from internvl.evals.benchmark.scores import PARSERS, SCORES
from internvl.evals.scoring import answers, boxes, domains, letters, mmmu, reviews, texts, yes_no
from internvl.evals.scoring.answers import METRICS, Reference

PIECES = [
    *("A", "b", "(C)", "D.", "Answer:", "Final answer:", "The best answer is", "none", "of", "The"),
    *("yes", "No", "NOT", "是", "不是", "没有", "cat", "Dog", "é", "\u2028", "İ", "ß", "", "\x00"),
    *("12", "-3.5", "1,200", "50%", "%", "$", "1e400", "nan", "inf", "½", "٣", "3 km", ".", ","),
    *("[[1, 2, 3, 4]]", "[0.1, 0.2, 0.3, 0.4]", "[1,2", "<box>", "(", ")", "[[]]", "[[[1]]]"),
    *("\n", "\t", " ", "  ", ":", "\\", "'", '"', "{", "}", "|", "*", "<image>", "c1: (1, 2)"),
]
OPTIONS = {"A": "cat", "B": "dog", "C": "", "D": "12"}
FIELDS = {
    "options": OPTIONS,
    "choices": ["(A) cat", "(B) dog", "(C) 12", "(D) yes", "(E) none"],
}


@pytest.fixture
def drawn():
    """400 answers, the same in every run."""
    choose = random.Random(0)
    return [
        choose.choice(["", " ", "\n"]).join(choose.choices(PIECES, k=choose.randrange(7)))
        for _ in range(400)
    ]


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_makes_text_of_any_answer(name, drawn):
    for answer in drawn:
        parsed = PARSERS[name](answer, Item(FIELDS))
        assert isinstance(parsed, str), answer
        json.dumps(parsed)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_ones_own_questions_is_from_0_to_1(name, drawn):
    for answer, expected in pairwise(drawn):
        for further in ([expected], [expected, "cat", "12"]):
            reference = Reference(further, "Which?\nA. cat\nB. dog", 0.05)
            assert 0 <= METRICS[name](answer, reference) <= 1, (answer, further)
            assert answers.metric_of(reference) in (*METRICS, "judge")


def test_what_is_equal_is_right(drawn):
    for answer in drawn:
        assert texts.exact(answer, [answer]) == 1
        assert texts.careful_anls(answer, [answer]) == 1
        assert texts.agreement(answer, [answer] * 3) == 1
        value = texts.to_number(answer)
        if value is None or math.isfinite(value):
            assert texts.careful_relaxed_accuracy(answer, [answer]) == 1, answer


def test_distance_is_a_distance(drawn):
    for a, b, c in zip(drawn, drawn[1:], drawn[2:], strict=False):
        assert texts.distance(a, b) == texts.distance(b, a) <= max(len(a), len(b))
        assert texts.distance(a, c) <= texts.distance(a, b) + texts.distance(b, c)
        assert (texts.distance(a, b) == 0) == (a == b)


def test_agreement_of_ten_people_is_from_0_to_1(drawn):
    for answer, *people in zip(drawn, *(drawn[n:] for n in range(1, 11)), strict=False):
        assert 0 <= texts.soft_accuracy(answer, people) <= 1


def test_boxes_overlap_by_a_share_the_same_both_ways():
    choose = random.Random(1)
    for _ in range(200):
        corners = [sorted(choose.sample(range(1001), 2)) for _ in range(4)]
        (x1, x2), (y1, y2), (x3, x4), (y3, y4) = corners
        a, b = [x1, y1, x2, y2], [x3, y3, x4, y4]
        for overlap in (boxes.box_iou, boxes.pixel_iou):
            assert 0 <= overlap(a, b) <= 1
            assert overlap(a, b) == pytest.approx(overlap(b, a))
            assert overlap(a, a) == pytest.approx(1)


def test_malformed_boxes_are_wrong_not_errors(drawn):
    for answer in drawn:
        box = boxes.referred_box(answer, 60, 90)
        assert not boxes.box_iou(box, [0, 0, 0, 0]) >= 0.5
        assert boxes.remote_correct(answer, [900, 900, 950, 950], [1000, 1000]) is False
        careful = boxes.careful_box(answer, 60, 90)
        assert careful is None or len(careful) == 4


@pytest.mark.parametrize(
    "form",
    [
        *(
            "{0}",
            "{0}.",
            "({0})",
            "{0})",
            " {0} \n",
            "**{0}**",
            "Answer: {0}",
            "The answer is {0}.",
        ),
        *(
            "The answer is ({0}).",
            "Option {0}",
            "({0}) dog",
            "{0}. dog",
            "{0}: dog",
            "{0}\nbecause",
        ),
        *("I looked at it.\n\nFinal answer: {0}", "It is a cat, so (A)? No: ({0})"),
    ],
)
def test_a_letter_in_any_form(form):
    options = {"A": "cat", "B": "dog", "C": "a bird"}
    for letter in "BC":
        final = letters.final_answer(form.format(letter))
        assert letters.careful_letter(final, options) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("cat", "A"),
        ("It is a dog.", "B"),
        ("", ""),
        ("E", ""),
        *(("A or B", ""), ("(A), (B)", ""), ("A/B", ""), ("Both A and B.", "")),
        *(("The answer is A or B", ""), ("It is A, not B", ""), ("Not A but B", "B")),
        *(("A, because it purrs", "A"), ("B. A or B? B", "B")),
        ("cat and dog", ""),
    ],
)
def test_words_of_options_and_letters_outside(answer, letter):
    assert letters.careful_letter(answer, {"A": "cat", "B": "dog"}) == letter


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        *(
            ("是", "yes"),
            ("是的。", "yes"),
            ("不是", "no"),
            ("没有", "no"),
            ("否", "no"),
            ("对", "yes"),
        ),
        *(("YES!", "yes"), ("no, there is not", "no"), ("There is no cat", "no"), ("maybe", "")),
        *(("True", "yes"), ("False.", "no"), ("", ""), ("I know", ""), ("Yes, not bad", "yes")),
    ],
)
def test_yes_and_no_in_two_languages(answer, label):
    assert yes_no.careful_yes_no(answer) == label


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        *(("50%", "0.5", 1), ("12 %", "12%", 1), ("$1,200", "1200", 1), ("3 km", "3", 1)),
        *(("about 3", "3", 1), ("3 of 4", "3", 0), ("three", "3", 0), ("-2.50", "-2.5", 1)),
        *(("", "0", 0), ("0", "0", 1), ("1e400", "1", 0), ("103", "100", 0)),
    ],
)
def test_numbers_with_marks_and_units(answer, expected, right):
    assert answers.same_amount(answer, Reference([expected])) == right


def test_numbers_within_a_tolerance():
    assert answers.same_amount("103", Reference(["100"], tolerance=0.05)) == 1
    assert answers.same_amount("106", Reference(["100"], tolerance=0.05)) == 0


def test_chartqas_numbers_by_hand():
    # 5 % of the answer, 105, are 5.25: 100 is within; by the right one, 100, 105 is at the limit.
    assert texts.relaxed_accuracy("105", ["100"]) == texts.careful_relaxed_accuracy("105", ["100"])
    # 5.26 are within 5 % of 105.26, and not of 100.
    assert texts.relaxed_accuracy("105.26", ["100"]) == 1
    assert texts.careful_relaxed_accuracy("105.26", ["100"]) == 0
    assert texts.relaxed_accuracy("50%", ["0.5"]) == 1
    assert texts.relaxed_accuracy("12 km", ["12"]) == 0


def test_vqas_agreement_by_hand():
    people = ["cat"] * 3 + ["dog"] * 7
    # Without each of the three that said so: 2 of 3; without one of the seven others: all.
    assert texts.soft_accuracy("cat", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert texts.soft_accuracy("A dog.", people) == 1
    assert texts.soft_accuracy("bird", people) == 0


def test_anls_by_hand():
    assert texts.anls("hallo", ["hello"]) == pytest.approx(1 - 1 / 5)
    assert texts.anls("hxxxo", ["hello"]) == 0  # 3 of 5 differ: below the threshold
    assert texts.anls("", ["hello"]) == 0


def test_an_answer_from_mmmus_key_is_right():
    choose = random.Random(2)
    for _ in range(100):
        number = str(round(choose.uniform(-1000, 1000), 2))
        assert mmmu.open_correct(number, mmmu.parse_open(f"The answer is {number}"))
    assert not mmmu.open_correct("12.5", mmmu.parse_open("The answer is 13"))


def test_two_scores_of_a_review():
    assert reviews.score_pair("8 9\nAssistant 1 …") == [8, 9]
    assert reviews.score_pair("7.5, 6") == [-1, -1]  # two spaces where the comma was
    assert reviews.score_pair("8,9") == [8, 9]
    assert reviews.score_pair("Both are good") == [-1, -1]
    assert reviews.score_pair(None) == [-1, -1]


def test_counts_in_buckets_and_areas_never_stop(drawn):
    for answer in drawn:
        for expected in ("3", "120m2", "between 10 and 100", ""):
            for score in (domains.same_bucket, domains.same_area):
                assert score(answer, expected) in (True, False)


@pytest.mark.parametrize("key", ["scienceqa", "refcoco-val", "vqa-chartqa-test-human", "pope"])
def test_a_score_of_one_answer_is_in_its_row(key, drawn):
    (dataset,) = tasks()[key].sets.values()
    fields = {
        **FIELDS,
        "letter_of_answer": "B",
        "hw": [60, 90],
        "gt_bbox": [0, 0, 45, 60],
        "annotation": "12",
        "category": "random",
        "label": "yes",
    }
    outcomes = [Outcome(Item(fields), "", answer, answer) for answer in drawn]
    result = SCORES[dataset.score](outcomes, dataset)
    assert len(result.per_question) == len(drawn)
    assert {value for value in result.per_question if value is not None} <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        *(("Not sure", ""), ("I don't know.", ""), ("It cannot be determined", ""), ("不知道", "")),
        *(("No, I am not sure", "no"), ("It is not visible", "no"), ("I see none", "no")),
    ],
)
def test_who_does_not_know_says_neither_yes_nor_no(answer, label):
    assert yes_no.careful_yes_no(answer) == label
