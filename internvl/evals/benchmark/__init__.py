"""Benchmarks: the questions of a key of tasks.yaml, asked, scored and written as the original's."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl import dist
from internvl.config import BenchmarkEval
from internvl.datasets import tasks
from internvl.datasets.tasks import Dataset, Places
from internvl.errors import BadSample, ConfigError, DataError, UserError
from internvl.evals import asking
from internvl.evals.asking import Answer, Question, Shown, Tiling, cut_tiles
from internvl.evals.benchmark import readers, results
from internvl.evals.benchmark.judged import JUDGED
from internvl.evals.benchmark.readers import Item
from internvl.evals.benchmark.results import Outcome, Scored, Written
from internvl.evals.benchmark.scores import PARSERS, SCORES, mean, row_score
from internvl.evals.benchmark.shown import described
from internvl.evals.judges import Judge
from internvl.evals.scores import EvalScores, raise_or_log, skipped_rows, version
from internvl.inference.chat import Chat
from internvl.inference.requests import Request
from internvl.inference.settings import Settings

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"
_MARK = "<image>"


@dataclass(frozen=True)
class _AskedSet:
    """A data set of a key, as it is asked."""

    prefix: str
    """Before the names of its metrics."""
    dataset: Dataset
    places: Places
    items: list[Item]
    corrected: bool = False
    """The second version of a set, with the original's mistakes mended."""


@dataclass
class _Total:
    """Results of all parts."""

    values: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str | bytes] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Benchmark:
    """The scores of a benchmark, the original's rows, and its result files.

    Data, prompt and metrics: the key's entry in datasets/tasks.yaml.

    Raises:
        ConfigError: an unknown key, or missing files, with their addresses.
        UserError: data that cannot be used.
    """

    def __init__(self, config: BenchmarkEval) -> None:
        self.config = config
        task = tasks.find(config.task)
        if task is None or not task.sets:
            raise ConfigError(f"task: there is no benchmark {config.task!r} of questions")
        self.task = task
        self.asked_sets = self._asked_sets()
        for asked_set in self.asked_sets:
            _check_references(asked_set)
        self.problems = self._missing_images()
        raise_or_log(self.problems, config.on_bad_sample, _REMEDY)

    def _asked_sets(self) -> list[_AskedSet]:
        asked_sets = []
        for prefix, entry in self.task.sets.items():
            dataset = _chosen(entry, self.config)
            # Recipes name the folder of the sets as every evaluation names its files.
            places = Places(Path(self.config.annotations), dataset)
            # Of each set: a key's mean over sets needs all of them.
            items = readers.read(places)[: self.config.limit]
            if not items:
                raise UserError(f"{dataset.name} has no question; fetch it again")
            joined = f"{prefix}_" if prefix else ""
            asked_sets.append(_AskedSet(joined, dataset, places, items))
            if self.config.corrected and dataset.corrected:
                mended = dataset.replaced({"corrected": {}, **dataset.corrected})
                name = f"corrected_{joined}"
                asked_sets.append(_AskedSet(name, mended, places, items, corrected=True))
        return asked_sets

    def _missing_images(self) -> list[BadSample]:
        """Lists the image files that do not exist; they are decoded when they are shown."""
        return [
            BadSample(path, "there is no such image")
            for path in self.images()
            if not Path(path).is_file()
        ]

    def images(self) -> Sequence[str]:
        """Returns every image file that will be opened."""
        paths = (
            path for asked_set in self.asked_sets for item in asked_set.items for path in item.paths
        )
        return list(dict.fromkeys(paths))

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"questions": sum(len(p.items) for p in self.asked_sets if not p.corrected)}
        return counts | ({"left out": len(self.problems)} if self.problems else {})

    def table(self) -> None:
        """See `Evaluator.table`."""

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Asks a Chat and scores its answers; keeps them in `folder`, if any."""
        chat = handle.as_chat(f"the benchmark {self.config.task}")
        judge = Judge.of(self.config)
        # All sets are asked before any is scored: a judge's failure costs no answer.
        answered = [self._answers(chat, asked_set, folder) for asked_set in self.asked_sets]
        return dist.main_alone(lambda: self._score(chat, answered, judge))

    def _score(
        self, chat: Chat, answered: Sequence[list[Answer]], judge: Judge | None
    ) -> EvalScores:
        """Computes the metrics, rows and files of all parts from their answers."""
        total = _Total()
        shown: dict[int, Item] = {}
        for asked_set, answers in zip(self.asked_sets, answered, strict=True):
            outcomes, bad = self._outcomes(asked_set, answers)
            checkpoint = self.config.checkpoint or str(chat.folder)
            written = Written(asked_set.dataset, asked_set.places, checkpoint)
            scored, notes, files = self._scored(asked_set, outcomes, written, judge)
            prefix = asked_set.prefix
            total.values |= {f"{prefix}{metric}": v for metric, v in scored.values.items()}
            # Rows and files are the original's, so of its own version alone.
            if asked_set.corrected:
                continue
            # After the scores, for some rows and files hold them.
            original_rows, original_files = results.result_files(outcomes, written, scored)
            total.files |= {**original_files, **files}
            total.settings[asked_set.dataset.name] = self._described(chat, asked_set)
            # Several sets of a key append to one file, in their order.
            for name, lines in results.summary_lines(written, scored).items():
                total.lines[name] = total.lines.get(name, "") + lines
            first = len(total.rows)
            shown |= {first + index: outcome.item for index, outcome in enumerate(outcomes)}
            total.rows += [
                *self._rows(asked_set, outcomes, original_rows, scored),
                *skipped_rows(bad),
            ]
            total.notes += [f"{asked_set.dataset.name}: {self._tiling(chat, asked_set)}", *notes]
        if self.task.mean:
            name = self.task.mean
            prefixes = [
                asked_set.prefix for asked_set in self.asked_sets if not asked_set.corrected
            ]
            # Of the sets, not of their questions: ChartQA's halves count alike.
            total.values[name] = mean([total.values[f"{prefix}{name}"] for prefix in prefixes])
        total.rows += skipped_rows(self.problems)
        # A set that is scored elsewhere still is measured.
        values = total.values or {"answered": float(sum("answer" in row for row in total.rows))}
        described = json.dumps(total.settings, indent=1, ensure_ascii=False)
        total.files[f"{self.config.task}_settings.json"] = described
        return EvalScores(
            values,
            total.rows,
            total.files,
            total.lines,
            tuple(total.notes),
            lambda index: _images_of(shown[index]),
        )

    def _described(self, chat: Chat, asked_set: _AskedSet) -> dict[str, Any]:
        """Returns how a set was asked and scored, for the reader of its result."""
        dataset = asked_set.dataset
        names = ("template", "prefix", "marks", "budget", "parse", "score", "judge", "submit")
        return {
            "checkpoint": self.config.checkpoint or str(chat.folder),
            "tiles": str(self._tiling(chat, asked_set)),
            "generation": vars(_settings(dataset, self.config)),
            **{name: getattr(dataset, name) for name in names if getattr(dataset, name)},
            "questions": len(asked_set.items),
            "of": dataset.questions,
            "ours": dataset.ours,
            "internvl": version("internvl"),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    def _tiling(self, chat: Chat, asked_set: _AskedSet) -> Tiling:
        dataset = asked_set.dataset
        return asking.tiling(chat, self.config.tiles, dataset.tiles, dataset.tiles_of)

    def _items(self, asked_set: _AskedSet) -> list[Item]:
        """Returns the questions whose image files exist."""
        # A question is left out if any of its images is missing.
        missing = {problem.name for problem in self.problems}
        return [item for item in asked_set.items if not missing & set(item.paths)]

    def _answers(self, chat: Chat, asked_set: _AskedSet, folder: Path | None) -> list[Answer]:
        """Asks the questions of a part; returns their answers on rank 0."""
        items, tiling = self._items(asked_set), self._tiling(chat, asked_set)
        settings = _settings(asked_set.dataset, self.config)
        total_tiles = self.config.total_tiles
        cache = None
        if folder is not None:
            # Not the scores' settings: another metric is computed from the same answers.
            asked = [(_fields_asked(asked_set.dataset), item.fields) for item in items]
            images = asking.key_of_images(
                image for item in items for image in (*item.images, *item.sources)
            )
            # Another limit of tiles is another question.
            key = asking.key_of(asked, images, settings, tiling.most, total_tiles)
            cache = folder / f"answers-{key}"

        def prepare(index: int) -> Question:
            return prepared(chat, asked_set.dataset, items[index], tiling.most, total_tiles)

        return asking.ask(
            chat,
            len(items),
            prepare,
            settings,
            batch_size=self.config.batch_size,
            cache=cache,
            unit=asked_set.dataset.name,
        )

    def _outcomes(
        self, asked_set: _AskedSet, answers: Sequence[Answer]
    ) -> tuple[list[Outcome], list[BadSample]]:
        """Returns the answered questions of a part, and the problems of the others."""
        dataset = asked_set.dataset
        parse = PARSERS.get(dataset.parse, lambda answer, item: answer)
        outcomes, bad = [], []
        for position, (item, row) in enumerate(
            zip(self._items(asked_set), answers, strict=True), 1
        ):
            if "reason" in row:
                bad.append(BadSample(f"{dataset.name} question {position}", row["reason"]))
                continue
            answer = row["answer"]
            outcomes.append(Outcome(item, row["question"], answer, parse(answer, item)))
        # skip_broken is for what could be read at first and then could not: one line, not the run.
        policy = "raise" if self.config.on_bad_sample == "raise" else "skip"
        raise_or_log(bad, policy, _REMEDY)
        if not outcomes:
            raise UserError(f"{dataset.name}: none of its questions can be asked")
        return outcomes, bad

    def _scored(
        self, asked_set: _AskedSet, outcomes: list[Outcome], written: Written, judge: Judge | None
    ) -> tuple[Scored, list[str], dict[str, str | bytes]]:
        """Returns the scores of a part, sentences about them, and files of the judge."""
        dataset = asked_set.dataset
        # A judge's data set may be submitted as well; its own note says where.
        if dataset.judge:
            judged = JUDGED[dataset.judge](outcomes, asked_set.places, written, judge)
            return judged.scored, judged.notes, judged.files
        notes = []
        if dataset.submit:
            notes.append(f"{dataset.name}: its score is given by {dataset.submit}")
        score: Callable[..., Scored] = SCORES.get(
            dataset.score, lambda outcomes, dataset: Scored({})
        )
        scored = score(outcomes, dataset)
        without = sum(value is None for value in scored.per_question)
        # A table for a server has no answers at all, and no score.
        if without and scored.values:
            notes.append(
                f"{dataset.name}: {without} of {len(outcomes)} questions have no reference in "
                f"{_names_of_files(asked_set.places)} and count nowhere"
            )
        return scored, notes, {}

    def _rows(
        self,
        asked_set: _AskedSet,
        outcomes: Sequence[Outcome],
        original_rows: Sequence[Mapping[str, Any]],
        scored: Scored,
    ) -> list[dict[str, Any]]:
        """Returns a row of our own for every question: images, question, answer, references."""
        rows = []
        for index, (outcome, original) in enumerate(zip(outcomes, original_rows, strict=True)):
            # Said once where the parser changes nothing.
            parsed = {} if outcome.parsed == outcome.answer else {"parsed": outcome.parsed}
            rows.append(
                {
                    **({"set": asked_set.dataset.name} if len(self.task.sets) > 1 else {}),
                    "images": outcome.item.paths,
                    **{k: v for k, v in original.items() if k not in ("question", "answer")},
                    "question": outcome.question,
                    "answer": outcome.answer,
                    **parsed,
                    **described(outcome, asked_set.dataset),
                    **row_score(scored.per_question, index),
                }
            )
        return rows


def _check_references(asked_set: _AskedSet) -> None:
    """Scores empty answers: what cannot be scored is found before hours of answers.

    Raises:
        DataError: references that cannot be scored, or none for any question.
    """
    dataset, files = asked_set.dataset, _names_of_files(asked_set.places)
    if dataset.score not in SCORES:
        return
    again = f"fetch it again from {next(iter(dataset.files.values())).address}"
    trial = _trial(asked_set.items, dataset)
    if isinstance(trial, str):
        alone = [_trial([item], dataset) for item in asked_set.items]
        failing = [n for n, scored in enumerate(alone, start=1) if isinstance(scored, str)]
        # Where each fails by itself, as half of a pair does, the first is not the one.
        named = failing and (len(failing) < len(alone) or len(alone) == 1)
        where = f" question {failing[0]}: {alone[failing[0] - 1]}" if named else f": {trial}"
        # A half of MME's pair is no fault of the files.
        remedy = "" if "--limit" in trial else f"; {again}"
        raise DataError(f"{files}{where}{remedy}")
    if trial.values and trial.per_question and all(v is None for v in trial.per_question):
        raise DataError(
            f"{files}: none of the {len(asked_set.items)} questions of {dataset.name} has a "
            "reference; an id must be the same in both files, as a text or as a number; "
            f"{again}"
        )


def _trial(items: Sequence[Item], dataset: Dataset) -> Scored | str:
    """Returns the scores of empty answers, or why questions cannot be scored."""
    parse = PARSERS.get(dataset.parse, lambda answer, item: answer)
    try:
        outcomes = [Outcome(item, "", "", parse("", item)) for item in items]
        for outcome in outcomes:
            described(outcome, dataset)
        return SCORES[dataset.score](outcomes, dataset)
    except UserError as error:
        return str(error)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        return f"its reference cannot be scored ({type(error).__name__}: {error})"


def _names_of_files(places: Places) -> str:
    return ", ".join(str(places.file(role)) for role in places.dataset.files)


def _images_of(item: Item) -> Sequence[Any]:
    """Returns the images of a question, such as bytes of a table's cell or frames."""
    return list(item.images if item.load is None else item.load())


def _chosen(entry: Dataset, config: BenchmarkEval) -> Dataset:
    """Returns the entry with the options of this evaluation."""
    fields: dict[str, Any] = {}
    if config.cot:
        if not entry.cot:
            raise ConfigError(f"cot: {config.task} has no prompt with reasoning")
        fields |= entry.cot
    if config.segments is not None and entry.segments:
        fields["segments"] = config.segments
    if config.subtask is not None:
        if not entry.subtask:
            raise ConfigError(f"subtask: {config.task} has none")
        fields["subtask"] = config.subtask
    chosen = entry.replaced(fields)
    # evaluate_pope.py and its like write into a folder named MODEL_cot.
    if config.cot and "{model}" in chosen.output:
        chosen = chosen.replaced({"output": chosen.output.replace("{model}", "{model}_cot")})
    return chosen


def _settings(dataset: Dataset, config: BenchmarkEval) -> Settings:
    return Settings(
        max_new_tokens=dataset.max_new_tokens,
        min_new_tokens=dataset.min_new_tokens,
        num_beams=config.num_beams,
        temperature=config.temperature,
        top_p=dataset.top_p,
        top_k=dataset.top_k,
    )


def _fields_asked(dataset: Dataset) -> tuple[Any, ...]:
    """Returns what of an entry determines the question and its images."""
    return (
        *(dataset.template, dataset.strip, dataset.prefix, dict(dataset.instructions)),
        *(dataset.marks, dataset.budget, dataset.enlarge_first, dataset.segments),
    )


def tile_limits(dataset: Dataset, count: int, most: int, total_tiles: int) -> list[int]:
    """Returns the most tiles of each of a question's images."""
    # One tile for each: nothing is shared.
    if most == 1:
        return [1] * count
    # evaluate_mmmu.py: the first image is tiled, all further ones are one tile.
    if dataset.budget == "first":
        return [most] + [1] * (count - 1)
    if dataset.budget == "each":
        return [most] * count
    share = (total_tiles if dataset.budget == "total" else most) // max(1, count)
    return [max(1, min(most, share))] * count


def prepared(chat: Chat, dataset: Dataset, item: Item, most: int, total_tiles: int) -> Question:
    """Decodes and tiles the images of a question, and writes it out.

    Raises:
        BadImage: an image cannot be decoded.
    """
    images = item.images if item.load is None else item.load()
    doubled = dataset.enlarge_first and most > 1
    # As the original, which shows the first image alone where it does not tile.
    if dataset.enlarge_first and not doubled:
        images = images[:1]
    limits = tile_limits(dataset, len(images), most, total_tiles)
    merge = dataset.marks in ("block", "literal")
    shown = cut_tiles(chat, images, limits, merge=merge, double_first=doubled)
    text = question_text(dataset, item, shown.num_images, shown.num_tiles)
    return Question(text, Request(_marked(text, dataset, shown), list(shown.blocks)))


def _marked(text: str, dataset: Dataset, shown: Shown) -> str:
    """Returns the question with the mark of a lone image, as the original's `chat` adds it."""
    if dataset.marks == "literal":
        # LMDeploy, which MMMU-Pro's script calls, puts images first: marks are words to it.
        text = text.replace(_MARK, f"\\{_MARK}")
    if shown.blocks and (dataset.marks == "literal" or _MARK not in text):
        return f"{_MARK}\n{text}"
    return text


def question_text(dataset: Dataset, item: Item, num_images: int, num_tiles: int) -> str:
    """Writes out a question: its template filled with the item's fields and the texts."""
    values = {**tasks.texts(), **item.fields}
    instruction = _instruction(dataset, item)
    if instruction is not None:
        values["instruction"] = instruction
    values["image_lines"] = _image_lines(dataset, num_images, num_tiles)
    values["frame_lines"] = "".join(f"Frame{n}: {_MARK}\n" for n in range(1, num_images + 1))
    text = dataset.template.format_map(values)
    text = text.strip() if dataset.strip else text
    return f"{tasks.texts()[dataset.prefix]}{text}" if dataset.prefix else text


def _instruction(dataset: Dataset, item: Item) -> str | None:
    """Returns the instruction for the type of a question, None if the entry has none."""
    if not dataset.instructions:
        return None
    # "other" of Mantis, "open" of MMMU: what a type without an entry gets.
    named = dataset.instructions
    text = named.get(item.fields["question_type"], named.get("other", named.get("open", "")))
    return tasks.texts().get(text, text).format_map(tasks.texts())


def _image_lines(dataset: Dataset, num_images: int, num_tiles: int) -> str:
    """Returns the lines with marks before a question about several images."""
    lines = "".join(f"Image-{n}: {_MARK}\n" for n in range(1, num_images + 1))
    if dataset.marks == "numbered":
        return f"{_MARK}\n" if num_images == 1 else lines
    if dataset.marks == "several":
        return "" if num_images == 1 else lines
    # By tiles, not by pages: a lone page of several tiles gets its line.
    return lines if dataset.marks == "tiles" and num_tiles > 1 else ""
