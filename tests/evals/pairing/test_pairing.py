"""Preference pairs of a model's own answers: which are made, and what does not change them."""

import json
from pathlib import Path

import pytest
from command_line import call
from data_files import model_folder, picture, write_lines
from ranks import run_ranks

from internvl import train
from internvl.config import recipes
from internvl.errors import BadSample, UserError
from internvl.evals import pairing
from internvl.evals.answers import AnswerFiles
from internvl.evals.pairing import choosing, forms, questions, requests, rules
from internvl.evals.scoring.answers import Reference
from internvl.inference import load as loading
from internvl.inference.opened import open_model
from internvl.inference.requests import Request

PLAIN = forms.form("plain")
CAPTION = "A red gradient that becomes darker and darker towards the lower left corner of it."


def rows() -> list[dict[str, object]]:
    """One image, several, text alone, two turns, and a caption."""
    return [
        {"image": "a.png", "question": "What is this?", "answer": "-"},
        {"image": ["a.png", "b.png"], "question": "<image> or <image>?", "answers": ["-", "="]},
        {"question": "What is 2 + 3?", "answer": 5},
        {
            "image": "b.png",
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "<image>\nHello"},
                {"from": "gpt", "value": "Hi."},
                {"from": "human", "value": "Which color?"},
                {"from": "gpt", "value": "-"},
            ],
        },
        {"image": "a.png", "question": "<image>\nDescribe it.", "chosen": CAPTION},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model, images, and questions whose references are answers that the model gives."""
    folder = tmp_path_factory.mktemp("pairing")
    picture(folder / "a.png")
    picture(folder / "b.png", (200, 90))
    model_folder(folder / "model")
    draft = rows()
    with pytest.raises(UserError, match=r"no pairs: no answer is right 5; see .*first_left_out"):
        make(folder, draft, "first", method="correctness", rule="exact")
    (answers,) = (folder / "first_answers").iterdir()
    given = AnswerFiles(answers).read()
    assert len(given) == 5 * 4
    for number, row in enumerate(draft[:4]):
        reference = given[4 * number]["answer"]
        if "conversations" in row:
            row["conversations"][-1]["value"] = reference
        else:
            row.pop("answer", None)
            row["answers"] = [reference]
    write_lines(folder / "questions.jsonl", draft)
    return folder


def make(folder, samples, name="pairs", model=None, **options):
    if samples is not None:
        write_lines(folder / f"{name}_questions.jsonl", samples)
    defaults = {"samples": 4, "temperature": 3.0, "top_k": 0, "max_new_tokens": 3, "rule": "exact"}
    defaults |= {"annotations": folder / f"{name}_questions.jsonl", "images": folder}
    chosen = pairing.PairOptions(**{**defaults, **options})
    return pairing.run(
        model or str(folder / "model"), folder / f"{name}.jsonl", chosen, device="cpu"
    )


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(folder):
    return make(folder, read(folder / "questions.jsonl"), rule="auto")


def test_right_answers_are_paired_with_wrong_ones_and_images_stay_as_they_lie(folder, made):
    pairs = read(made.file)
    assert (made.num_questions, made.with_pairs) == (5, 5)
    by_correctness = [row for row in pairs if row["made_by"] == "correctness"]
    for row in by_correctness:
        assert row["chosen"] == row["answer_gt"] != row["rejected"]
    first = by_correctness[0]
    assert (first["image"], first["question"]) == ("a.png", "<image>\nWhat is this?")
    lists = [row for row in pairs if isinstance(row.get("image"), list)]
    assert lists[0]["image"] == ["a.png", "b.png"]
    assert lists[0]["question"] == "<image> or <image>?"
    turns = next(row["conversations"] for row in pairs if "conversations" in row)
    assert [turn["from"] for turn in turns] == ["system", "human", "gpt", "human"]
    assert turns[-1]["value"] == "Which color?"
    assert made.pairs == {"correctness": len(by_correctness), "dropout-ntp": 1}
    assert "of 16 answers right" in pairing.render(made)


def test_a_long_reference_is_continued_without_its_image(folder, made):
    (row,) = [row for row in read(made.file) if row["made_by"] == "dropout-ntp"]
    assert row["chosen"] == CAPTION
    assert row["question"] == "<image>\nDescribe it."
    beginning = "A red gradient that becomes darker and"
    chat = loading.load(folder / "model", device="cpu")
    request = Request("Describe it.", prefix=beginning)
    seen = {
        chat.answer(request, temperature=3.0, top_k=0, max_new_tokens=3, seed=seed)[0]
        for seed in seeds_of(folder, 4)
    }
    assert seen == {row["rejected"]}
    assert row["rejected"].startswith(beginning)


def seeds_of(folder, index):
    (question,) = [
        question
        for n, question in enumerate(questions.read(folder / "questions.jsonl", folder))
        if n == index
    ]
    return [requests.seed_of(0, question.key, 0)]


def test_neither_order_nor_batches_nor_a_kill_change_the_pairs(folder, made):
    expected = {json.dumps(row) for row in read(made.file)}
    turned = read(folder / "questions.jsonl")[::-1]
    again = make(folder, turned, "turned", rule="auto", batch_size=3)
    assert {json.dumps(row) for row in read(again.file)} == expected
    # Killed: some answers are there, and half a line.
    for file in again.answers_folder.glob("*.jsonl"):
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:7]) + lines[7][:9])
    before = again.file.read_bytes()
    again.file.unlink()
    assert make(folder, turned, "turned", rule="auto", batch_size=3).file.read_bytes() == before
    other = make(folder, turned, "turned", rule="auto", seed=1, method="dropout-ntp")
    assert {json.dumps(row) for row in read(other.file)}.isdisjoint(expected)


def test_answers_are_kept_for_another_rule(folder, made):
    """Nothing is generated again: a model that cannot answer gives the same pairs."""
    chat = loading.load(folder / "model", device="cpu")
    options = pairing.PairOptions(
        annotations=folder / "questions.jsonl",
        images=folder,
        samples=4,
        temperature=3.0,
        top_k=0,
        max_new_tokens=3,
        rule="auto",
        per_question=1,
    )
    for layer in chat.model.model.language_model.layers:
        del layer.mlp
    weights = open_model(folder / "model").weight_states(), None
    planned = pairing.plan_questions(options)
    fewer = pairing.make(chat, weights, folder / "pairs.jsonl", options, planned)
    assert fewer.answers_folder == made.answers_folder
    assert fewer.pairs == {"correctness": 4, "dropout-ntp": 1}
    make(folder, read(folder / "questions.jsonl"), rule="auto")


def test_the_command_and_a_run_on_its_pairs(folder, made, capsys):
    words = ["--annotations", folder / "questions.jsonl", "--images", folder, "--samples", 4]
    words += ["--temperature", 3, "--top-k", 0, "--max-new-tokens", 3, "--device", "cpu"]
    to = folder / "called.jsonl"
    code, out, err = call(capsys, "data", "make-pairs", folder / "model", "--to", to, *words)
    assert code == 0, err
    assert "of 5 questions: " in out
    assert read(to) == read(folder / "pairs.jsonl")
    tree = {
        "model": {"id": str(folder / "model"), "train": ["language_model"]},
        "data": {
            "sources": [
                {
                    "name": "pairs",
                    "type": "preference",
                    "annotations": str(to),
                    "images": str(folder),
                }
            ],
            "tiles": {"size": 84, "max": 2},
            "max_tokens": 256,
            "row_tokens": 512,
            "workers": 0,
        },
        "objective": {"name": "mpo"},
        "run": str(folder / "run"),
        "global_batch": 4,
        "steps": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    train.run(recipes.resolve(tree))
    (row,) = read(folder / "run/metrics.jsonl")
    assert row["samples"] == 4
    # Nothing is learned yet: the reference is the policy.
    assert row["dpo"] == pytest.approx(0.6931, abs=1e-4)
    # Trained weights lie elsewhere than those of the base, whose answers are others.
    samples = read(folder / "questions.jsonl")
    tuned = make(folder, samples, "tuned", folder / "run", rule="auto", tiles="6")
    assert tuned.answers_folder.name != made.answers_folder.name


@pytest.mark.slow
def test_two_ranks_make_the_same_pairs(folder, made):
    code = f"""
from pathlib import Path
from internvl.evals import pairing

options = pairing.PairOptions(
    annotations=Path({str(folder / "questions.jsonl")!r}), images=Path({str(folder)!r}),
    samples=4, temperature=3.0, top_k=0, max_new_tokens=3, batch_size=2,
)
to = Path({str(folder / "ranks.jsonl")!r})
made = pairing.run({str(folder / "model")!r}, to, options, device="cpu")
print(made is not None)
"""
    assert [text.split()[-1] for text in run_ranks(code)] == ["True", "False"]
    assert read(folder / "ranks.jsonl") == read(folder / "pairs.jsonl")
    (answers,) = (folder / "ranks_answers").iterdir()
    assert len(list(answers.glob("*.jsonl"))) == 2


def test_bad_questions_are_named(folder):
    bad = [
        {"question": "What?", "image": "a.png"},
        {"question": "What?", "image": "a.png", "answer": {"text": "a"}},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"image": "none.png", "question": "What?", "answer": "a"},
    ]
    said = (
        r"4 problems in the data; put them right, or set on_bad_sample \(--on-bad-sample\) to "
        r"skip.*\n.*line 1: there is no reference; write `answer`, `answers` or `chosen`\n"
        r".*line 2: `answer` must be a text or a number, or a list of them\n"
        r".*line 3: it does not end with an answer, which would be the reference\n"
        r".*line 4: there is no .*none.png"
    )
    with pytest.raises(UserError, match=said):
        make(folder, bad, "bad")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:90])
    torn = {**bad[3], "image": "torn.png"}
    with pytest.raises(UserError, match=r"1 problem in the data.*\n.*line 1: .*torn.png"):
        make(folder, [torn], "torn")
    with pytest.raises(UserError, match=r"no pairs: .*it cannot be read 1, it cannot be asked 1"):
        make(folder, [bad[3], torn, rows()[2]], "skipped", on_bad_sample="skip")
    reasons = [row["reason"] for row in read(folder / "skipped_left_out.jsonl")]
    assert "there is no " in reasons[0]
    assert "torn.png" in reasons[1]
    twice = [rows()[2], rows()[2]]
    with pytest.raises(UserError, match="its question is in the file already 1"):
        make(folder, twice, "twice")
    assert not (folder / "skipped.jsonl").exists()
    with pytest.raises(UserError, match="no file of questions .*check --annotations"):
        make(folder, None, "gone")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "numbr"}, "there is no rule 'numbr'.*number"),
        ({"method": "dropout"}, "there is no method 'dropout'.*dropout-ntp"),
        ({"form": "boxes"}, "there is no form 'boxes'.*boxed"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"samples": 1}, "samples must be a whole number of at least 2"),
        ({"tiles": "many"}, "tiles must be one, checkpoint or a number, not 'many'"),
    ],
)
def test_options_that_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        pairing.PairOptions(annotations=Path("q.jsonl"), **options)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--annotations", "gone.jsonl"], "no file of questions gone.jsonl; check --annotations"),
        (["--samples", 1], "samples must be a whole number of at least 2"),
    ],
)
def test_the_command_checks_its_words_first(folder, capsys, words, says):
    words = ["--annotations", folder / "questions.jsonl", "--to", folder / "no.jsonl", *words]
    code, _, err = call(capsys, "data", "make-pairs", folder / "model", *words)
    assert (code, says in err) == (1, True), err


def pairs_of(responses, *references, rule="short", form=PLAIN, most=15):
    reference = Reference(list(references))
    return choosing.by_correctness(responses, reference, rule, form, most, seed=0)


def test_pairs_are_those_of_the_original():
    answers = ["red", "Red.", "blue", "green", "blue", "dark red", ""]
    made = pairs_of(answers, "red")
    assert {(pair.chosen, pair.rejected) for pair in made.pairs} == {
        ("red", "blue"),
        ("red", "green"),
        ("Red.", "blue"),
        ("Red.", "green"),
        # "dark red" contains "red", but not "Red.".
        ("Red.", "dark red"),
    }
    assert (made.num_right, made.num_answers) == (2, 7)
    fewer = pairs_of(answers, "red", most=2)
    assert len(fewer.pairs) == 2
    assert set(fewer.pairs) < set(made.pairs)
    assert pairs_of(["red", "The red"], "red").reason == "no answer is wrong"
    assert pairs_of(["red", "red car"], "red").reason == "every wrong answer contains the right one"
    assert pairs_of(["blue", "green"], "red").reason == "no answer is right"
    assert pairs_of(["", " "], "red").reason == "no answer is in its form"


def test_an_answer_in_another_form_is_rejected():
    boxed = forms.form("boxed")
    right = r"It looks red to me, so Answer: \boxed{red}"
    made = pairs_of([right, "red"], "red", form=boxed)
    assert [(pair.chosen, pair.rejected, pair.made_by) for pair in made.pairs] == [
        (right, "red", "format")
    ]


LONG = "It grows by half each year,\nso there are six.\n"


@pytest.mark.parametrize(
    ("name", "response", "final"),
    [
        ("plain", " red ", "red"),
        ("plain", "  ", None),
        ("reason", LONG + "Final answer: 6", "6"),
        ("reason", LONG + "Final Answer: 6", "6"),
        ("reason-zh", "它每年增长。\n所以有六个。\n答案: 6", "6"),
        ("reason", LONG + "So 6", None),
        ("reason", "Final answer: 6", None),
        ("reason", LONG + "Final answer: 6\nor 7", None),
        ("boxed", LONG + r"Answer: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", LONG + "Answer: 6", LONG + "Answer: 6"),
        ("boxed", r"\boxed{6}", None),
        ("think", f"<think>{LONG}</think>\n\\boxed{{6}}", "6"),
        ("think", f"<think>{LONG}</think>\n6", None),
        ("think", "<think>no</think>\n\\boxed{6}", None),
        ("think", f"{LONG}\n\\boxed{{6}}", None),
    ],
)
def test_the_final_answer_of_every_form(name, response, final):
    assert forms.form(name).final(response) == final


def test_the_instruction_takes_the_place_of_a_shorter_one():
    question = "<image>\nHow many?\nAnswer the question using a single word or phrase."
    asked = forms.form("reason").asked(question)
    assert asked.startswith("<image>\nYour task is to answer the question below.")
    assert asked.endswith("Question:\n\nHow many?")
    assert forms.form("plain").asked(question) == question
    several = forms.form("boxed").asked("<image> or <image>?")
    assert several.startswith("<image> or <image>?\nAnswer the preceding question.")
    for name in forms.NAMES:
        assert "Why?" in forms.form(name).asked("Why?")


@pytest.mark.parametrize(
    ("references", "question", "rule"),
    [
        (["brown dog"], "", "short"),
        (["12 %"], "", "number"),
        (["B"], "Which?\nA. cat\nB. dog", "choice"),
        (["No"], "", "yes-no"),
        (["red"] * 3, "", "soft"),
        ([CAPTION], "", None),
        (["A dog runs on the green grass"] * 5, "", None),
    ],
)
def test_the_rule_follows_from_the_references(references, question, rule):
    assert rules.rule_of(Reference(references, question)) == rule


def test_short_answers_are_compared_as_in_vqa():
    reference = Reference(["two dogs"])
    assert rules.is_right("The 2 dogs.", reference, "short")
    assert not rules.is_right("3 dogs", reference, "short")
    assert not rules.is_right("", Reference(["a"]), "short")
    assert rules.is_right("1,200", Reference(["$1200"]), "short")
    assert not rules.is_right("2 dog", reference, "anls")


def test_a_row_of_the_originals_is_read(tmp_path):
    picture(tmp_path / "a.png")
    file = write_lines(tmp_path / "q.jsonl", [{"image": "a.png", "question": "What?", "answer": 3}])
    (question,) = questions.read(file, tmp_path)
    assert not isinstance(question, BadSample)
    assert question.reference.texts == ["3"]
    assert question.media == {"image": "a.png"}
    assert question.text == "<image>\nWhat?"
