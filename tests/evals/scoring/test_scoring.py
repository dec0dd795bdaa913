"""Every parser and scorer of the original evaluation code, against what it returned.

A table gives, by file and function of `golden/eval_metrics`, what of ours answers its inputs.
"""

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from original_runs import unpacked

from internvl.datasets.tasks import Places, tasks
from internvl.evals.benchmark import question_text, readers, table, video
from internvl.evals.benchmark.readers import Item
from internvl.evals.benchmark.results import Outcome
from internvl.evals.benchmark.scores import SCORES
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

GOLDEN = unpacked("eval_metrics")


def mean(values):
    return sum(values) / len(values)


def soft(pred_list):
    return mean([texts.soft_accuracy(e["pred_answer"], e["gt_answers"]) for e in pred_list])


def soft_of_annotation(annotation, merged_outputs):
    answers = {row["question_id"]: [a["answer"] for a in row["answers"]] for row in annotation}
    scores = [texts.soft_accuracy(r["answer"], answers[r["question_id"]]) for r in merged_outputs]
    return mean(scores)


def listed(annotation):
    return [annotation] if isinstance(annotation, str) else annotation


def anls_file(gt, sub, validate):
    predictions = {row["questionId"]: row["answer"] for row in sub}
    rows = [
        (q["questionId"], texts.anls(predictions[q["questionId"]], q["answers"]))
        for q in gt["data"]
    ]
    return {"score": mean([s for _, s in rows]), "per_sample": [[str(i), s] for i, s in rows]}


def mme_file(files):
    """Lines of four fields, as the original's result files have them."""
    tasks = {}
    for name, text in files.items():
        fields = [line.split("\t") for line in text.splitlines(keepends=True)]
        tasks[name] = yes_no.mme_task_score(
            [(f[2], f[3]) if len(f) == 4 else ("", "") for f in fields]
        )
    totals = [sum(tasks[t] for t in names) for names in yes_no.MME_TASKS.values()]
    return {"totals": totals, "tasks": tasks}


def binary(answers, labels):
    scores = yes_no.binary_scores([yes_no.pope_label(a) for a in answers], labels)
    numbers = (scores.f1, scores.accuracy, scores.precision, scores.recall, scores.yes_ratio)
    return {
        "f1": scores.f1,
        "counts_TP_FP_TN_FN": list(scores.counts),
        "accuracy": scores.accuracy,
        "precision": scores.precision,
        "recall": scores.recall,
        "yes_ratio": scores.yes_ratio,
        "line": ", ".join(f"{number:.3f}" for number in numbers),
    }


def pope_files(questions, answers, annotations):
    categories = {q["question_id"]: q["category"] for q in questions}
    result = {}
    for name, rows in annotations.items():
        category = name[10:-5]
        own = [a["text"] for a in answers if categories[a["question_id"]] == category]
        scores = binary(own, [row["label"] for row in rows])
        result[category] = [len(own), scores["f1"]]
    overall = mean([f1 for _, f1 in result.values()]) * 100
    return {"per_category": result, "overall": f"{overall:.2f}"}


def referred(answer, gt_bbox, hw):
    box = boxes.referred_box(answer, *hw)
    overlap = boxes.box_iou(box, gt_bbox)
    return {"box": box.tolist(), "iou": overlap, "correct": int(overlap >= 0.5)}


def precision(outputs):
    correct = sum(referred(**row)["correct"] for row in outputs)
    shown = f"Precision @ 1: {correct / len(outputs)}"
    return {"correct": correct, "total": len(outputs), "printed": shown}


def all_ious(boxes1, boxes2):
    return {"iou": [[boxes.box_iou(a, b) for b in boxes2] for a in boxes1]}


def remote_metrics(outputs):
    right = sum(
        boxes.remote_correct(r["answer"], r["gt_answers"], r["image_size"]) for r in outputs
    )
    total = len(outputs)
    return {
        "correct:": right,
        "incorrect:": total - right,
        "Total:": total,
        "Acc@0.5:": right / total,
    }


def science_accuracy(merged_outputs):
    correct = sum(row["answer"] == row["gt_answers"] for row in merged_outputs)
    return {"correct": correct, "printed": f"Acc@1: {correct / len(merged_outputs)}"}


def final_then_letter(pred, option, cot):
    return letters.science_letter(letters.final_answer(pred).strip() if cot else pred, option)


def options_of(options):
    return {chr(ord("A") + index): text for index, text in enumerate(options)}


def review_summary(rows, ignore=(), name="review_x"):
    lines = [row for row in rows if row["question_id"] not in ignore]
    return reviews.review_lines("review_x", lines)


def mathvista_normal(extraction, **problem):
    return mathvista.normalize(extraction, problem)


def judged(response, problem, quick_extract):
    return mathvista.extract(response, problem, quick_extract, lambda query, text: "JUDGE")


def open_evaluation(samples):
    right = {
        s["id"]: mmmu.choice_correct(s["answer"], s["parsed_pred"])
        if s["question_type"] == "multiple-choice"
        else mmmu.open_correct(s["answer"], s["parsed_pred"])
        for s in samples
    }
    words = {i: "Correct" if correct else "Wrong" for i, correct in right.items()}
    return [words, {"acc": mean(list(right.values()))}]


def mmmu_file(output, answers):
    correct = {}
    for question_id, answer in output.items():
        row = answers[question_id]
        if row["question_type"] == "multiple-choice":
            correct[question_id] = mmmu.choice_correct(row["ground_truth"], answer)
        else:
            parsed = mmmu.parse_open(answer)
            correct[question_id] = mmmu.open_correct(row["ground_truth"], parsed)
    return {"printed": mmmu.table(correct)}


def mmhal_summary(responses):
    ratings = [reviews.rating(text) for text in responses]
    scores = reviews.hallucination_scores(ratings)
    kinds = [str(round(v, 2)) for name, v in scores.items() if name.startswith("type_")]
    return {
        "scores": ratings,
        "average": f"{scores['average']:.2f}",
        "hallucination_rate": f"{scores['hallucination_rate']:.2f}",
        "per_type": ",".join(kinds),
    }


def tiny_score(data):
    groups: dict[str, list[float]] = {}
    for row in data:
        name = row["image_path"].split("/")[-2]
        groups.setdefault(name, []).append(texts.contains_answer(row["answer"], row["gt_answers"]))
    means = {name: mean(values) for name, values in groups.items()}
    return means | {"Overall": sum(means.values())}


def remote_scores(data):
    by_type: dict[str, list[bool]] = {}
    for row in data:
        right = domains.remote_answer(row["response"], row["gt_answer"], row["question_type"])
        by_type.setdefault(row["question_type"], []).append(right)
    everything = [v for values in by_type.values() for v in values]
    useful = [
        v for name, values in by_type.items() if name not in ("count", "area") for v in values
    ]
    return {
        "type_scores": {name: round(mean(values), 4) for name, values in by_type.items()},
        "total_score": round(mean(everything), 4) if everything else 0.0,
        "total_score_useful": round(mean(useful), 4) if useful else 0.0,
        "type_counts": {name: len(values) for name, values in by_type.items()},
    }


def mirb_groups(merged_outputs):
    scores: dict[str, list[float]] = {}
    for row in merged_outputs:
        scores.setdefault(row["task"], []).append(row["score"])
    averages = domains.mirb_averages(scores)
    return {"mean": averages.pop("mean"), "groups": averages}


def scored(name, rows, key, answer="answer", **renamed):
    """What a score gives for merged rows of the original."""
    outcomes = []
    for row in rows:
        fields = {ours: row[theirs] for ours, theirs in renamed.items()}
        outcomes.append(Outcome(Item(fields), "", row[answer], row[answer]))
    (dataset,) = tasks()[key].sets.values()
    return SCORES[name](outcomes, dataset)


def interleaved_averages(merged_outputs):
    rows = [
        row | {"answer": "yes" if row["correct"] else "no", "expected": "yes"}
        for row in merged_outputs
    ]
    outcomes = [
        Outcome(
            Item(
                {
                    "question_type": row["question_type"],
                    "row": {"question_type": "short-answer", "answer": "yes", "options": []},
                }
            ),
            "",
            row["answer"],
            row["answer"],
        )
        for row in rows
    ]
    (dataset,) = tasks()["mantis"].sets.values()
    values = dict(SCORES["interleaved_choice"](outcomes, dataset).values)
    names = {
        "multi-choice": "Multi-choice Accuracy",
        "short-answer": "Short-answer Accuracy",
        "accuracy": "Overall Accuracy",
    }
    return {names[name]: f"{value:.4f}" for name, value in values.items()}


def interleaved(question, n_images, options, question_type):
    block = ""
    if question_type == "multi-choice":
        block = "\n" + "\n".join(text.strip() for text in options)
    lines = f"{readers.interleaved_question(question, n_images)}{block}\n".lstrip()
    fields = {"question_lines": lines, "question_type": question_type}
    (dataset,) = tasks()["mantis"].sets.values()
    return question_text(dataset, Item(fields), n_images, n_images)


def multi_image(images, question, context):
    (dataset,) = tasks()["mmiu"].sets.values()
    item = Item({"question": question, "context": context})
    return question_text(dataset, item, len(images), len(images))


def mmiu_accuracy(merged_outputs):
    values = dict(scored("mmiu", merged_outputs, "mmiu", "pred", gt="gt", task="task").values)
    return {"overall": values.pop("accuracy"), "per_task": values}


def world_accuracy(outputs):
    names = {"task": "task", "letter_of_answer": "gt_answers"}
    values = scored("world", outputs, "mme-realworld", **names).values
    shown = f"{values['accuracy']:.4f}"
    # Tasks without questions have no rate; the original shows 0.
    by_task = {task: f"{values.get(task, 0):.4f}" for task in ("Reasoning", "Perception")}
    return {"returned": values["accuracy"], "overall": shown, "tasks": by_task}


def seed_file(anno, rows):
    by_id = {row["question_id"]: row for row in anno["questions"]}
    rows = [
        row
        | {
            "type_id": by_id[row["question_id"]]["question_type_id"],
            "type": "x",
            "expected": by_id[row["question_id"]]["answer"],
        }
        for row in rows
    ]
    names = {"type_id": "type_id", "type": "type", "letter_of_answer": "answer"}
    values = scored("seed", rows, "seed", "prediction", scored_answer="expected", **names).values
    shown = {"accuracy": "total", "image": "image", "video": "video"}
    return {name: f"{values[ours] * 100:.2f}" for ours, name in shown.items()}


def seed_exact(merged_outputs):
    rows = [row | {"type_id": 1, "scored": None} for row in merged_outputs]
    names = {"type_id": "type_id", "type": "type_id", "letter_of_answer": "answer"}
    values = scored("seed", rows, "seed", "prediction", scored_answer="scored", **names).values
    return values["exact_reply"]


def pair_accuracy(merged_outputs):
    rows = [row | {"pair": n // 2} for n, row in enumerate(merged_outputs)]
    accuracy = scored("pairs", rows, "mmvp", letter_of_answer="gt_answers", pair="pair").values
    return {"accuracy": accuracy["accuracy"]}


def eye_options(data):
    options = readers.pair_options(data["Options"])
    return {"option": options, "choice_txt": readers.option_fields(options)["option_lines"]}


def video_accuracy(merged_outputs):
    names = {"gt": "gt", "task_type": "task_type"}
    return scored("mvbench", merged_outputs, "mvbench", "pred", **names).details


def option_question(tsv, row, language, pred):
    """The question of a row; an empty one is asked as such, where the original stops."""
    if "\timage" not in tsv:
        head, *lines = tsv.splitlines()
        tsv = "\n".join([f"{head}\timage", *(f"{line}\tx" for line in lines)])
    with TemporaryDirectory() as folder:
        (dataset,) = tasks()[
            "mmbench-dev-cn" if language == "cn" else "mmbench-dev-en"
        ].sets.values()
        places = Places(Path(folder), dataset)
        places.file("questions").parent.mkdir(parents=True)
        places.file("questions").write_text(tsv, encoding="utf-8")
        item = readers.read(places)[row]
    options = item.fields["options"]
    question = question_text(dataset, item, 1, 1)
    return {"question": question, "option": options, "letter": letters.option_letter(pred, options)}


def option_result(tsv, ds_name, merged_outputs):
    (dataset,) = tasks()["ccbench-dev" if "cc" in ds_name else "mmbench-dev-en"].sets.values()
    answers = {row["index"]: row["answer"] for row in merged_outputs}
    columns = table.parse_columns(tsv)
    result = table.result_columns(columns, answers, dataset.drop, dataset.insert_at)
    return {"columns": list(result), "prediction": result["prediction"]}


def segments(bound, fps, max_frame, first_idx=0):
    return video.segment_indices(bound, fps, max_frame, 16, first_idx)


def professional(results):
    options = options_of(ast.literal_eval(str(results["options"])))
    letter = letters.response_letter(results["response"], options, pro=True)
    # The original draws a letter for a response that names none.
    right = {} if letter is None else {"if_right": letter == results["answer"]}
    return {"pred_indexs": letter, **right}


TABLE: dict[str, dict[str, Callable[..., Any]]] = {
    "anls": {
        "levenshtein_distance": lambda s1, s2: texts.distance(s1, s2),
        "score_one": lambda prediction, answers: texts.anls(prediction, answers),
        "evaluate_file": anls_file,
    },
    "vqa_soft_accuracy": {
        "word_tokenize": lambda word: texts.split_possessive(word),
        "process_punctuation": lambda in_text: texts.strip_punctuation(in_text),
        "process_digit_article": lambda in_text: texts.replace_words(in_text),
        "normalise": lambda item: texts.normalize(item),
        "answer_scores": lambda raw_answers: texts.answer_scores(raw_answers),
        "score_one": soft,
        "mean_accuracy": soft,
        "from_annotation": soft_of_annotation,
    },
    "vqa_other": {
        "vizwiz_image_name": lambda question_id: question_id.replace("data/vizwiz/test/", ""),
        "relaxed_correctness": lambda target, prediction, max_relative_change=0.05: texts.relaxed(
            target, prediction, max_relative_change
        ),
        "evaluate_relaxed_accuracy": lambda entries: mean(
            [texts.relaxed_accuracy(e["answer"], listed(e["annotation"])) for e in entries]
        ),
        "evaluate_exact_match_accuracy": lambda entries: mean(
            [texts.exact(e["answer"], listed(e["annotation"])) for e in entries]
        ),
        "convert_gqa": lambda data: [
            {"questionId": d["questionId"], "prediction": texts.gqa_answer(d["answer"])}
            for d in data
        ],
    },
    "mme": {
        "post_processing": lambda response: yes_no.mme_reply(response),
        "parse_pred_ans": lambda pred_ans: yes_no.mme_label(pred_ans),
        "reply_to_label": lambda response: yes_no.mme_label(yes_no.mme_reply(response)),
        "compute_metric": lambda gts, preds: yes_no.binary_metrics(gts, preds),
        "process_result": mme_file,
    },
    "mme_realworld": {
        "post_process": lambda s, choices: letters.world_letter(s, choices),
        "evaluate": world_accuracy,
    },
    "pope": {
        "reply_to_yes_no": lambda text, label: yes_no.pope_label(text),
        "eval_pope": binary,
        "main": pope_files,
    },
    "refcoco": {"score_one": referred, "precision": precision, "box_iou": all_ious},
    "rs_det": {
        "calculate_iou": lambda box1, box2: boxes.pixel_iou(box1, box2),
        "transform_bbox": lambda bbox, image_size: boxes.remote_box(bbox, *image_size),
        "evaluation_metrics": remote_metrics,
    },
    "rsvqa": {
        "is_correct_count": lambda response, answer: domains.same_bucket(response, answer),
        "is_correct_area": lambda response, answer: domains.same_area(response, answer),
        "calculate_scores": remote_scores,
    },
    "option_letter": {"post_process": lambda pred, option: letters.option_letter(pred, option)},
    "scienceqa": {
        "extract_answer": lambda text: letters.final_answer(text),
        "post_process": lambda pred, option: letters.science_letter(pred, option),
        "accuracy": science_accuracy,
        "cot_then_post_process": final_then_letter,
    },
    "mantis": {
        "averages": interleaved_averages,
        "question": interleaved,
        "correct": lambda pred, answer, options, question_type: int(
            letters.interleaved_choice(pred, answer, options, question_type == "multi-choice")
        ),
    },
    "mvbench": {
        "check_ans": lambda pred, gt: letters.video_choice(pred, gt),
        "get_index": segments,
        "accuracy": video_accuracy,
    },
    "mirb": {
        "eval_scores": lambda prediction, answers, task: domains.mirb_score(
            prediction, answers, task
        ),
        "eval_scores_many": lambda rows, task: (
            mean([domains.mirb_score(r["prediction"], r["answers"], task) for r in rows])
            if rows
            else float("nan")
        ),
        "get_task_instruction": lambda dataset: domains.mirb_instruction(dataset),
        "group_averages": mirb_groups,
    },
    "mmhal": {
        "rating": lambda response: reviews.rating(response),
        "summary": mmhal_summary,
        "cot_answer": lambda pred: reviews.answer_after_rationale(pred),
    },
    "llava_bench": {
        "parse_score": lambda review: reviews.score_pair(review),
        "summary": review_summary,
    },
    "drivelm": {"post_process": lambda pred: domains.camera_points(pred)},
    "tiny_lvlm": {
        "has_word": lambda sentence, word: texts.has_word(sentence, word),
        "processPunctuation": lambda inText: texts.strip_punctuation(
            inText, texts.ONE_COMMA_IN_NUMBER
        ),
        "processDigitArticle": lambda inText: texts.replace_words(inText),
        "evaluate": lambda answer, gt_answers: texts.contains_answer(answer, gt_answers),
        "calculate_score": tiny_score,
    },
    "mmmu": {
        "get_multi_choice_info": lambda options: [options_of(options), list(options_of(options))],
        "extract_numbers": lambda string: mmmu.extract_numbers(string),
        "check_is_number": lambda string: mmmu.is_number(string),
        "normalize_str": lambda string: mmmu.normalize(string),
        "parse_open_response": lambda response: mmmu.parse_open(response),
        "parse_multi_choice_response": lambda response, all_choices, index2ans: (
            letters.response_letter(response, index2ans)
        ),
        "eval_multi_choice": lambda gold_i, pred_i: mmmu.choice_correct(gold_i, pred_i),
        "open_reply_correct": lambda gold, response: mmmu.open_correct(
            gold, mmmu.parse_open(response)
        ),
        "eval_open": lambda gold_i, pred_i: mmmu.open_correct(gold_i, pred_i),
        "evaluate": open_evaluation,
        "main_eval_only": mmmu_file,
    },
    "mmmu_pro": {
        "mmmu_process_results": professional,
        "parse_multi_choice_response": lambda response, all_choices, index2ans: (
            letters.response_letter(response, index2ans, pro=True)
        ),
    },
    "mathvista": {
        "extract_answer": judged,
        "normalize_extracted_answer": mathvista_normal,
        "get_most_similar": lambda prediction, choices: mathvista.most_similar(prediction, choices),
    },
    "mmiu": {
        "options": lambda options: readers.listed_options(options),
        "question": multi_image,
        "accuracy": mmiu_accuracy,
    },
    "mmvp": {"options": eye_options, "pair_accuracy": pair_accuracy},
    "seed": {"calculation": seed_file, "acc_at_1": seed_exact},
    "mmbench_table": {"question_and_options": option_question, "result_table": option_result},
}

ELSEWHERE = {
    "anls": {"scores_by_types": "never switched on by a key"},
    "vqa_soft_accuracy": dict.fromkeys(("stvqa_accuracy", "stvqa_anls"), "no key has ST-VQA"),
    "mathvista": {
        "calculate_score": "evals/benchmark",
        "create_test_prompt": "evals/benchmark",
        "verify_extraction": "answers are extracted once",
        "safe_equal": "is ==",
        **dict.fromkeys(
            (
                *("contains_digit", "contains_number_word", "contains_quantity_word"),
                *("is_bool_word", "is_digit_string", "is_float_string"),
            ),
            "used by no score",
        ),
    },
    "tiny_lvlm": dict.fromkeys(("remove_special_chars", "evaluate_MRR"), "used by no score"),
    "misc": {
        "shard": "rows are shared out by evals/sharing",
        "average_caption_length": "evals/caption",
        **dict.fromkeys(("coco_image_id", "mmvetv2_question", "result_row"), "evals/benchmark"),
    },
    "mme_realworld": {"question": "evals/benchmark"},
    "mmmu": {"calculate_ins_level_acc": "part of main_eval_only's table"},
    "mmmu_pro": {
        "extract_subset_name": "its table has no subjects",
        "check_files": "a key measures one setting",
        **dict.fromkeys(
            ("replace_images_tokens", "parse_options", "standard_prompt"), "evals/benchmark"
        ),
    },
    "mvbench": dict.fromkeys(("qa_template", "question"), "evals/benchmark"),
    "seed": {
        "is_integer_string": "part of filter_questions",
        "filter_questions": "its one task takes every question",
    },
}
"""Functions that no key calls, or that the evaluator's own tests call."""


def cases():
    for file, functions in TABLE.items():
        content = json.loads((GOLDEN / f"{file}.json").read_text(encoding="utf-8"))
        for name, function in functions.items():
            yield pytest.param(function, content["functions"][name]["cases"], id=f"{file}-{name}")


def plain(value):
    """A value as JSON has it: lists for tuples and arrays, sets in a fixed order."""
    if isinstance(value, set | frozenset):
        return in_order(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    return value


def in_order(values):
    return sorted(map(plain, values), key=lambda v: (isinstance(v, str), str(v)))


def agrees(ours, theirs):
    if isinstance(theirs, dict) and "$random_choice_of" in theirs:
        return ours is None
    if isinstance(theirs, dict) and "$float" not in theirs:
        shared = [key for key in theirs if isinstance(ours, dict) and key in ours]
        return bool(shared or not theirs) and all(agrees(ours[k], theirs[k]) for k in shared)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(agrees, ours, theirs))
    if isinstance(theirs, float) and isinstance(ours, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9)
    return ours == theirs


@pytest.mark.parametrize(("function", "golden"), [*cases()])
def test_the_originals_results(function, golden):
    wrong = []
    for case in golden:
        if "error" in case:
            continue
        ours = function(**case["in"])
        # The original makes lists of sets, whose order is arbitrary.
        theirs = in_order(case["out"]) if isinstance(ours, set) else case["out"]
        if not agrees(plain(ours), theirs):
            wrong.append((case["n"], case["in"], theirs, ours))
    assert wrong == []


def test_every_function_of_the_original_is_in_a_table():
    missing = [
        f"{file.stem}: {name}"
        for file in sorted(GOLDEN.glob("*.json"))
        for name in json.loads(file.read_text(encoding="utf-8"))["functions"]
        if name not in TABLE.get(file.stem, {}) and name not in ELSEWHERE.get(file.stem, {})
    ]
    assert missing == []
