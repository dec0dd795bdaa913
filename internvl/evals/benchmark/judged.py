"""Benchmarks whose free answers a judge rates; without one their answers are only written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl.data.json_rows import read_json
from internvl.datasets.tasks import Places
from internvl.errors import DataError
from internvl.evals.benchmark.readers import read_lines
from internvl.evals.benchmark.results import Files, Outcome, Scored, Written
from internvl.evals.benchmark.scores import mathvista_scores, mean
from internvl.evals.judges import Judge, rubrics
from internvl.evals.scoring import mathvista, reviews


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a data set."""

    scored: Scored
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""
    files: Files = field(default_factory=dict)


Judging = Callable[[Sequence[Outcome], Places, Written, Judge | None], Verdict]


def _unjudged(written: Written) -> Verdict:
    dataset = written.dataset
    where = f", or give the file to {dataset.submit}" if dataset.submit else ""
    note = f"{dataset.name}: its answers need a judge; name one with --judge URL{where}"
    return Verdict(Scored({}), [note])


def _mmhal(
    outcomes: Sequence[Outcome], places: Places, written: Written, judge: Judge | None
) -> Verdict:
    if judge is None:
        return _unjudged(written)
    rubric = rubrics()["mmhal"]
    prompts = [
        rubric.filled(
            # The judge sees no image, only these names of what is in it.
            contents=", ".join(outcome["row"]["image_content"]),
            question=outcome["row"]["question"],
            expected=outcome["row"]["gt_answer"],
            answer=outcome.parsed,
        )
        for outcome in outcomes
    ]
    replies = judge.ask_all(rubric, prompts, "ratings")
    ratings = [reviews.rating(reply) for reply in replies]
    # By position in the file: a question that was left out moves no other to its type.
    positions = [outcome["position"] for outcome in outcomes]
    values = reviews.hallucination_scores(ratings, positions)
    name = written.name(written.dataset.output).replace(".json", "_gpt4o.json")
    # As a rate of 1: the average is a rating from 0 to 6.
    values["score"] = values.pop("average")
    files: Files = {name: json.dumps(replies, indent=2)}
    failed = sum(not reviews.is_rated(reply) for reply in replies)
    notes = (
        [f"{failed} replies of the judge hold no single rating and count as 0"] if failed else []
    )
    return Verdict(Scored(values, [float(r) for r in ratings]), notes, files)


def _llava_bench(
    outcomes: Sequence[Outcome], places: Places, written: Written, judge: Judge | None
) -> Verdict:
    if judge is None:
        return _unjudged(written)
    folder = places.file("questions").parent
    # The judge sees no image: these captions stand for it.
    contexts = {row["image"]: row["caption"] for row in _beside(folder / "context.jsonl")}
    references = {row["question_id"]: row for row in _beside(folder / "answers_gpt4.jsonl")}
    rubric = rubrics()["llava_bench"]
    prompts = []
    for outcome in outcomes:
        context = contexts[outcome["image_name"]]
        prompts.append(
            rubric.filled(
                context="\n".join(context) if isinstance(context, list) else context,
                question=outcome["text"],
                expected=references[outcome["question_id"]]["text"],
                answer=outcome.answer,
            )
        )
    # Reference first, answer second, never swapped: as the published scores.
    replies = judge.ask_all(rubric, prompts, "reviews")
    rows = [
        {
            "id": index,
            "question_id": outcome["question_id"],
            "answer1_id": references[outcome["question_id"]].get(
                "answer_id", outcome["question_id"]
            ),
            "answer2_id": outcome["question_id"],
            "category": f"llava_bench_{outcome['category']}",
            "content": reply,
            "tuple": reviews.score_pair(reply),
        }
        for index, (outcome, reply) in enumerate(zip(outcomes, replies, strict=True), start=1)
    ]
    table = reviews.review_table(rows)
    values = {name.removeprefix("llava_bench_"): ratio for name, (_, ratio) in table.items()}
    # The published number is that of all questions, in percent of the reference.
    values["score"] = values.pop("all")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # The second score is the model's.
    per_question = [float(row["tuple"][-1]) for row in rows]
    failed = sum(row["tuple"] == [-1, -1] for row in rows)
    notes = [f"{failed} reviews have no two scores and count as -1"] if failed else []
    return Verdict(Scored(values, per_question), notes, {"llava_bench_results_review.jsonl": lines})


def _beside(path: Any) -> Any:
    if not path.is_file():
        raise DataError(
            f"{path} is missing, which the judge needs: from "
            "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
        )
    return read_lines(path)


def _mathvista(
    outcomes: Sequence[Outcome], places: Places, written: Written, judge: Judge | None
) -> Verdict:
    # The judge is asked about these alone: extract_answer.py:42 returns the others before.
    open_ones = [o for o in outcomes if not mathvista.is_settled(o.answer, o["row"])]
    if judge is None or not open_ones:
        note = (
            f"{written.dataset.name}: {len(open_ones)} of {len(outcomes)} answers are more than a "
            "value; without --judge URL they are compared as they are"
        )
        return Verdict(mathvista_scores(outcomes), [note] if open_ones else [])
    rubric = rubrics()["mathvista"]
    # By content: equal responses to a question cost one request.
    prompts = {
        (o["row"]["query"], o.answer): rubric.filled(query=o["row"]["query"], response=o.answer)
        for o in open_ones
    }
    replies = judge.ask_all(rubric, [*prompts.values()], "extractions")
    by_response = dict(zip(prompts, replies, strict=True))
    return Verdict(mathvista_scores(outcomes, ask=lambda *pair: by_response[pair]))


def _mm_vet(
    outcomes: Sequence[Outcome], places: Places, written: Written, judge: Judge | None
) -> Verdict:
    if judge is None:
        return _unjudged(written)
    # Version 2 has its answers in the questions' file, version 1 in another one.
    key = {o["question_id"]: o.get("expected") for o in outcomes}
    if any(value is None for value in key.values()):
        path = places.file("questions").with_name("mm-vet.json")
        if not path.is_file():
            raise DataError(
                f"{path} is missing, which the judge needs: from "
                "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
            )
        answers = read_json(path)
        key = {o["question_id"]: answers[o["v1_id"]]["answer"] for o in outcomes}
    rubric = rubrics()["mm_vet"]
    prompts = [
        rubric.filled(
            question=_one_line(outcome["text"]),
            # As the rubric writes alternatives and elements.
            expected=key[outcome["question_id"]]
            .replace("<AND>", " <AND> ")
            .replace("<OR>", " <OR> "),
            answer=_one_line(outcome.answer),
        )
        for outcome in outcomes
    ]
    replies = judge.ask_all(rubric, prompts, "ratings")
    per_question = [_share(reply) for reply in replies]
    rated = [value for value in per_question if value is not None]
    failed = len(per_question) - len(rated)
    notes = [f"{failed} replies of the judge hold no score and are left out"] if failed else []
    return Verdict(Scored({"score": 100 * mean(rated)}, per_question), notes)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _share(reply: str) -> float | None:
    """Parses a score from 0 to 1 at the beginning of a reply."""
    try:
        value = float(reply.strip().split()[0].strip("|* "))
    except (ValueError, IndexError):
        return None
    return value if 0 <= value <= 1 else None


JUDGED: dict[str, Judging] = {
    "mmhal": _mmhal,
    "llava_bench": _llava_bench,
    "mathvista": _mathvista,
    "mm_vet": _mm_vet,
}
"""By the name in tasks.yaml."""
