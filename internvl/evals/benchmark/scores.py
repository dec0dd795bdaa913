"""Parsers and scores by the names in tasks.yaml."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internvl.datasets.tasks import Dataset
from internvl.evals.benchmark import video
from internvl.evals.benchmark.readers import Item
from internvl.evals.benchmark.results import Outcome, Scored
from internvl.evals.scoring import (
    boxes,
    domains,
    letters,
    mathvista,
    mmmu,
    reviews,
    texts,
    yes_no,
)

Parser = Callable[[str, Item], str]
Score = Callable[[Sequence[Outcome], Dataset], Scored]


def _by_options(parse: Callable[[str, Any], str]) -> Parser:
    return lambda answer, item: parse(answer, item.fields["options"])


def _careful_open_or_letter(answer: str, item: Item) -> str:
    options = item.fields["options"]
    return letters.careful_letter(answer, options) if options else answer


def _mmmu_response(answer: str, item: Item) -> str:
    """Returns the letter of a response with reasoning, or what follows "Answer:"."""
    options = item.fields["options"]
    return letters.pro_letter(answer, options) if options else letters.final_answer(answer)


def _careful_final_letter(answer: str, item: Item) -> str:
    options = item.fields["options"]
    return letters.careful_letter(letters.final_answer(answer), options)


def _final_science_letter(answer: str, item: Item) -> str:
    final = letters.final_answer(answer).strip()
    return letters.science_letter(final, item.fields["options"])


def _careful_world_letter(answer: str, item: Item) -> str:
    # Choices are written "(A) text".
    options = {choice[1]: choice[3:].strip() for choice in item.fields["choices"]}
    return letters.careful_letter(answer, options)


PARSERS: dict[str, Parser] = {
    "option_letter": _by_options(letters.option_letter),
    "open_or_letter": _by_options(letters.open_or_letter),
    "science_letter": _by_options(letters.science_letter),
    "final_science_letter": _final_science_letter,
    "pro_letter": _by_options(letters.pro_letter),
    "careful_letter": _by_options(letters.careful_letter),
    "careful_open_or_letter": _careful_open_or_letter,
    "careful_final_letter": _careful_final_letter,
    "mmmu_response": _mmmu_response,
    "world_letter": lambda answer, item: letters.world_letter(answer, item.fields["choices"]),
    "careful_world_letter": _careful_world_letter,
    "final_answer": lambda answer, item: letters.final_answer(answer).strip(),
    "answer_after_rationale": lambda answer, item: reviews.answer_after_rationale(answer),
    "mme_reply": lambda answer, item: yes_no.mme_reply(answer),
    "camera_points": lambda answer, item: domains.camera_points(answer),
}
"""What is made of an answer."""


def mean(values: Sequence[float]) -> float:
    """Returns the mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def _rates(
    outcomes: Sequence[Outcome], per_question: Sequence[float], name: str, metric: str = "accuracy"
) -> dict[str, float]:
    """Returns the mean by every value of a field, then that of all."""
    # In the order in which they first stand in the file.
    groups: dict[str, list[float]] = {}
    for outcome, score in zip(outcomes, per_question, strict=True):
        groups.setdefault(str(outcome[name]), []).append(score)
    return {group: mean(scores) for group, scores in groups.items()} | {metric: mean(per_question)}


def _texts(value: Any) -> list[str]:
    """Returns a reference or several as texts: files of some sets have numbers."""
    return [str(text) for text in value] if isinstance(value, list | tuple) else [str(value)]


def _mean_of(
    score: Callable[[str, Sequence[str]], float],
    name: str = "annotation",
    metric: str = "accuracy",
    shown: str = "",
) -> Score:
    """Returns the mean of a score of answer and annotations.

    Args:
        name: field of the annotations.
        shown: name under which the original prints it; empty: the number alone.
    """

    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [
            # A question without annotations, as in a part of the file, counts nowhere.
            None if outcome[name] is None else score(outcome.answer, _texts(outcome[name]))
            for outcome in outcomes
        ]
        value = mean([v for v in per_question if v is not None])
        return Scored({metric: value}, per_question, shown={shown: value} if shown else value)

    return run


def _gqa(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    per_question = [float(texts.gqa_answer(o.answer) == str(o["annotation"])) for o in outcomes]
    predictions = [
        {"questionId": o["question_id"], "prediction": texts.gqa_answer(o.answer)} for o in outcomes
    ]
    shown = f"Accuracy: {mean(per_question) * 100:.2f}%\n"
    return Scored({"accuracy": mean(per_question)}, per_question, shown=shown, details=predictions)


def _boxes(correct: Callable[[Outcome], bool]) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [float(correct(outcome)) for outcome in outcomes]
        # The original's line ends with a space and a line break.
        shown = f"Precision @ 1: {sum(map(int, per_question)) / max(1, len(per_question))} \n"
        return Scored({"precision": mean(per_question)}, per_question, shown=shown)

    return run


def _referred(outcome: Outcome) -> bool:
    # 0.5 itself is right here; DIOR-RSVG wants more.
    box = boxes.referred_box(outcome.answer, *outcome["hw"])
    return boxes.box_iou(box, outcome["gt_bbox"]) >= 0.5


def _careful_referred(outcome: Outcome) -> bool:
    box = boxes.careful_box(outcome.answer, *outcome["hw"])
    return box is not None and boxes.box_iou(box, outcome["gt_bbox"]) >= 0.5


def _remote_box(careful: bool) -> Score:
    def correct(outcome: Outcome) -> bool:
        if not careful:
            return boxes.remote_correct(outcome.answer, outcome["bbox"], outcome["size"])
        width, height = outcome["size"]
        box = boxes.careful_box(outcome.answer, height, width)
        return box is not None and boxes.pixel_iou(box.tolist(), outcome["bbox"]) > 0.5

    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [float(correct(outcome)) for outcome in outcomes]
        right = int(sum(per_question))
        details = {
            # With the colons: caculate.py:59 has them in its keys.
            "correct:": right,
            "incorrect:": len(per_question) - right,
            "Total:": len(per_question),
            "Acc@0.5:": mean(per_question),
        }
        return Scored({"accuracy": mean(per_question)}, per_question, details=details)

    return run


def _mme(label: Callable[[str], str]) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        by_task: dict[str, list[tuple[str, str]]] = {}
        for outcome in outcomes:
            pair = (outcome["expected"], label(outcome.parsed))
            by_task.setdefault(outcome["task"], []).append(pair)
        scores = {task: yes_no.mme_task_score(pairs) for task, pairs in by_task.items()}
        values = {
            # Tasks in the order of the original's table.
            **{t: scores[t] for names in yes_no.MME_TASKS.values() for t in names if t in scores},
            **{
                group: sum(scores.get(task, 0.0) for task in names)
                for group, names in yes_no.MME_TASKS.items()
            },
        }
        per_question = [
            float(yes_no.mme_label(label(o.parsed)) == o["expected"].lower()) for o in outcomes
        ]
        return Scored(values, per_question)

    return run


def _pope(label: Callable[[str], str]) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        groups: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            groups.setdefault(outcome["category"], []).append(outcome)
        values: dict[str, float] = {}
        f1s = []
        for category, members in sorted(groups.items()):
            # A question beyond the label file ends the original's zip, and counts nowhere.
            labelled = [(label(o.parsed), o["label"]) for o in members if o["label"]]
            scores = yes_no.binary_scores([a for a, _ in labelled], [b for _, b in labelled])
            # eval_pope.py:68 averages the three files, not their questions.
            f1s.append(scores.f1)
            values |= {
                f"{category}_{name}": getattr(scores, name)
                for name in ("f1", "accuracy", "precision", "recall", "yes_ratio")
            }
        per_question = [
            None if o["label"] is None else float(label(o.parsed) == o["label"]) for o in outcomes
        ]
        return Scored({**values, "f1": mean(f1s)}, per_question)

    return run


def _option_table(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    # Not the server's number, which asks every question with its options in turn.
    per_question = [
        None if o["letter_of_answer"] is None else float(o.parsed == o["letter_of_answer"])
        for o in outcomes
    ]
    # A test split has no answers: its table goes to the server.
    answered = [value for value in per_question if value is not None]
    return Scored({"plain_accuracy": mean(answered)} if answered else {}, per_question)


def _letter_accuracy(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    per_question = [float(o.parsed == o["letter_of_answer"]) for o in outcomes]
    return Scored({"accuracy": mean(per_question)}, per_question)


def _pairs(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    per_question = [float(o.parsed == o["letter_of_answer"]) for o in outcomes]
    by_pair: dict[int, list[float]] = {}
    for outcome, score in zip(outcomes, per_question, strict=True):
        by_pair.setdefault(outcome["pair"], []).append(score)
    # One without its second, such as one of a missing image, counts nowhere.
    both = [math.prod(scores) for scores in by_pair.values() if len(scores) == 2]
    return Scored({"accuracy": mean(both), "single_accuracy": mean(per_question)}, per_question)


def _seed(careful: bool) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question: list[float | None] = []
        for outcome in outcomes:
            expected = outcome["scored_answer"]
            # calculation.py: the first character; evaluate_seed.py's parser is never called.
            letter = letters.first_letter(outcome.answer)
            if careful:
                options = dict.fromkeys("ABCD", "")
                letter = letters.careful_letter(outcome.answer, options)
            per_question.append(None if expected is None else float(letter == expected))
        scored = [(o, v) for o, v in zip(outcomes, per_question, strict=True) if v is not None]
        # Every type outside 1 to 9 counts as video, as in the original.
        image = [v for o, v in scored if o["type_id"] in range(1, 10)]
        other = [v for o, v in scored if o["type_id"] not in range(1, 10)]
        values = _rates([o for o, _ in scored], [v for _, v in scored], "type")
        values |= {"image": mean(image)} if image else {}
        values |= {"video": mean(other)} if other else {}
        # What evaluate_seed.py prints before: the whole reply equals the letter of its own row.
        whole = [float(o.answer == o["letter_of_answer"]) for o in outcomes]
        return Scored(values | {"exact_reply": mean(whole)}, per_question)

    return run


def _careful_video_choice(answer: str, expected: str) -> bool:
    letter = letters.careful_letter(letters.final_answer(answer), dict.fromkeys("ABCDE", ""))
    return letter == expected[1:2]


def _mvbench(correct: Callable[[str, str], bool]) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [float(correct(o.answer, o["gt"])) for o in outcomes]
        values = _rates(outcomes, per_question, "task_type")
        order = [task.name for task in video.TASKS]
        # In percent, and by the list of tasks, as its result file has them.
        by_task = {name: values[name] * 100 for name in order if name in values}
        details = by_task | {"Avg": values["accuracy"] * 100}
        return Scored(values, per_question, details=details)

    return run


def _world(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    per_question = [float(o.parsed == o["letter_of_answer"]) for o in outcomes]
    return Scored(_rates(outcomes, per_question, "task"), per_question)


def _interleaved(careful: bool) -> Score:
    def correct(outcome: Outcome) -> bool:
        row, answer = outcome["row"], outcome.answer
        is_choice = row["question_type"] == "multi-choice"
        if careful and is_choice:
            # Their texts begin with the letter in brackets.
            options = {text.strip()[1:2]: text.strip()[3:].strip() for text in row["options"]}
            return letters.careful_letter(answer, options) == row["answer"]
        if careful:
            return answer.strip().rstrip(".").lower() == row["answer"].strip().lower()
        # The reply as it came: evaluate_mantis.py:176 strips nothing.
        return letters.interleaved_choice(answer, row["answer"], row["options"], is_choice)

    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [float(correct(outcome)) for outcome in outcomes]
        values: dict[str, float] = {}
        for name in ("multi-choice", "short-answer"):
            scores = [
                v for o, v in zip(outcomes, per_question, strict=True) if o["question_type"] == name
            ]
            values |= {name: mean(scores)} if scores else {}
        fields = [{"correct": int(value)} for value in per_question]
        return Scored({**values, "accuracy": mean(per_question)}, per_question, fields)

    return run


def _mirb(careful: bool) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [
            domains.mirb_score(o.answer, o["answers"], o["task"], careful=careful) for o in outcomes
        ]
        by_task: dict[str, list[float]] = {}
        for outcome, score in zip(outcomes, per_question, strict=True):
            by_task.setdefault(outcome["task"], []).append(score)
        averages = domains.mirb_averages(by_task)
        values = {task: mean(scores) for task, scores in by_task.items()} | averages
        fields = [{"score": value} for value in per_question]
        # All benchmarks call their one number by this name.
        values["accuracy"] = values.pop("mean", 0.0)
        return Scored(values, per_question, fields)

    return run


MMIU_TASKS = (
    *("point_tracking", "ravens_progressive_matrices", "single_object_tracking"),
    *("threed_cad_recognition", "threed_indoor_recognition", "Egocentric_Video_QuestionAnswering"),
    *("Homography_estimation", "Icon_Question_Answering_with_Spatial_Context"),
    *("Image_Captioning_with_Spatial_Context", "Image_Spatial_Transformation_Estimation"),
    *("Image_text_retrieval_with_Spatial_Context", "Multiview_Action_Recognition"),
    *("Multiview_reasoning", "jigsaw_puzzle_solving", "threeD_Depth_Estimation"),
    *("threeD_Object_Detection", "threeD_Object_Tracking", "threeD_Pose_Estimation"),
    *("threeD_Scene_Reconstruction", "threeD_question_answering"),
)
"""Tasks whose mean is the score; others count nowhere."""


def _mmiu(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    per_question = [float(o.parsed == o["gt"]) for o in outcomes]
    rates = _rates(outcomes, per_question, "task")
    values = {task: rates[task] for task in MMIU_TASKS if task in rates}
    return Scored({**values, "accuracy": mean([*values.values()])}, per_question)


def _mmmu(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    correct: dict[str, bool] = {}
    for outcome in outcomes:
        key = outcome["expected"]
        # An id that the key lacks stops the original.
        if key is None:
            continue
        # main_eval_only.py compares letters as they are; its parser of responses is not called.
        if key["question_type"] == "multiple-choice":
            right = mmmu.choice_correct(key["ground_truth"], outcome.parsed)
        else:
            right = mmmu.open_correct(key["ground_truth"], mmmu.parse_open(outcome.parsed))
        correct[outcome["id"]] = right
    table = mmmu.table(correct)
    values = {
        name.removeprefix("Overall-"): float(row["acc"])
        for name, row in table.items()
        if row["num"] and name != "Overall"
    }
    per_question = [float(correct[o["id"]]) if o["id"] in correct else None for o in outcomes]
    accuracy = float(table["Overall"]["acc"])
    return Scored({**values, "accuracy": accuracy}, per_question, details=table)


def _contained(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
    per_question = [texts.contains_answer(o.answer, _texts(o["gt_answers"])) for o in outcomes]
    values = _rates(outcomes, per_question, "task_type", "mean_accuracy")
    groups = {name: value for name, value in values.items() if name != "mean_accuracy"}
    # The sum over the categories, up to 5.
    return Scored({**groups, "overall": sum(groups.values())}, per_question)


def _remote_answers(correct: Callable[[str, Any, str], bool]) -> Score:
    def run(outcomes: Sequence[Outcome], dataset: Dataset) -> Scored:
        per_question = [float(correct(o.answer, o["gt_answer"], o["type"])) for o in outcomes]
        by_type: dict[str, list[float]] = {}
        for outcome, score in zip(outcomes, per_question, strict=True):
            by_type.setdefault(outcome["type"], []).append(score)
        # score.py:32: the second total leaves counts and areas out.
        useful = [
            v for name, scores in by_type.items() if name not in ("count", "area") for v in scores
        ]
        # score.py:32 rounds what it writes; `accuracy` is not rounded.
        types = {name: round(mean(scores), 4) for name, scores in by_type.items()}
        details = {
            "type_scores": types,
            "type_counts": {name: len(scores) for name, scores in by_type.items()},
            "total_score": round(mean(per_question), 4),
            "total_score_useful": round(mean(useful), 4),
        }
        values = {**types, "accuracy": mean(per_question), "useful_accuracy": mean(useful)}
        return Scored(values, per_question, details=details)

    return run


def mathvista_scores(
    outcomes: Sequence[Outcome],
    quick: bool = False,
    ask: Callable[[str, str], str] | None = None,
) -> Scored:
    """Scores MathVista's answers; `ask` is the judge, see `mathvista.extract`."""
    fields, merged = [], []
    for outcome in outcomes:
        row = outcome["row"]
        extraction = mathvista.extract(outcome.answer, row, quick, ask)
        # Of the extraction alone: the response may name several choices.
        prediction = mathvista.normalize(extraction, row)
        correct = prediction == row["answer"]
        fields.append({"extraction": extraction, "prediction": prediction, "true_false": correct})
        merged.append({**row, **row["metadata"], "true_false": correct})
    table = mathvista.scores(merged)
    per_question = [float(field["true_false"]) for field in fields]
    return Scored({"accuracy": mean(per_question)}, per_question, fields, details=table)


SCORES: dict[str, Score] = {
    "soft_accuracy": _mean_of(texts.soft_accuracy, "answers"),
    "anls": _mean_of(texts.anls, "answers", "anls"),
    "careful_anls": _mean_of(texts.careful_anls, "answers", "anls"),
    "relaxed_accuracy": _mean_of(texts.relaxed_accuracy, shown="relaxed_accuracy"),
    "careful_relaxed_accuracy": _mean_of(texts.careful_relaxed_accuracy),
    "exact": _mean_of(texts.exact, shown="accuracy"),
    "gqa": _gqa,
    "referred_box": _boxes(_referred),
    "careful_box": _boxes(_careful_referred),
    "remote_box": _remote_box(careful=False),
    "careful_remote_box": _remote_box(careful=True),
    "mme": _mme(lambda reply: reply),
    "careful_mme": _mme(yes_no.careful_yes_no),
    "pope": _pope(yes_no.pope_label),
    "careful_pope": _pope(yes_no.careful_yes_no),
    "option_table": _option_table,
    "letter_accuracy": _letter_accuracy,
    "pairs": _pairs,
    "seed": _seed(careful=False),
    "careful_seed": _seed(careful=True),
    "mvbench": _mvbench(letters.video_choice),
    "careful_mvbench": _mvbench(_careful_video_choice),
    "world": _world,
    "interleaved_choice": _interleaved(careful=False),
    "careful_interleaved_choice": _interleaved(careful=True),
    "mirb": _mirb(careful=False),
    "careful_mirb": _mirb(careful=True),
    "mmiu": _mmiu,
    "mmmu": _mmmu,
    "contained": _contained,
    "remote_answers": _remote_answers(domains.remote_answer),
    "careful_remote_answers": _remote_answers(domains.careful_remote_answer),
    "mathvista": lambda outcomes, dataset: mathvista_scores(outcomes),
    "mathvista_quick": lambda outcomes, dataset: mathvista_scores(outcomes, quick=True),
}
"""How the answers to a data set are scored."""


def row_score(per_question: Sequence[float | None], index: int) -> Mapping[str, float]:
    """Returns {"score": value} of a question, {} without one."""
    value = per_question[index] if index < len(per_question) else None
    return {} if value is None else {"score": value}
