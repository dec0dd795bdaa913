"""One's own questions: conversations as training reads them, every answer generated and scored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from internvl import dist
from internvl.config import QaEval, SourceConfig
from internvl.data.images import FileSlice, as_rgb
from internvl.data.messages import IMAGE_MARK, VIDEO_MARK, count_marks
from internvl.data.records import Message, Sample
from internvl.data.sources import open_source
from internvl.data.video import read_video
from internvl.errors import BadSample, UserError, counted
from internvl.evals import asking
from internvl.evals.asking import Answer, Question
from internvl.evals.judges import Judge, rubrics
from internvl.evals.scores import EvalScores, raise_or_log, skipped_rows
from internvl.evals.scoring import reviews
from internvl.evals.scoring.answers import METRICS, Reference, metric_of
from internvl.inference.chat import Chat
from internvl.inference.requests import Request
from internvl.inference.settings import Settings
from internvl.models import configs

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"
_MOST_RATING = 10


@dataclass(frozen=True)
class _Turn:
    """A question of a conversation, with all before it."""

    sample: Sample
    position: int
    """Number of the question in its conversation, from 1."""
    messages: tuple[Message, ...]
    reference: Reference

    @property
    def name(self) -> str:
        """Sample and question, for messages."""
        return f"{self.sample.name} question {self.position}"

    def media(self, mark: str, media: Sequence[Any]) -> Sequence[Any]:
        """Returns the images or videos whose marks stand in these messages."""
        marks = sum(count_marks(m.content, mark) for m in self.messages if m.role == "user")
        return media[:marks]


@dataclass
class _Scores:
    """Scores of all questions by metric and category."""

    by_metric: dict[str, list[float]] = field(default_factory=dict)
    by_category: dict[str, list[float]] = field(default_factory=dict)

    def add(self, metric: str, score: float, category: Any) -> None:
        """Counts a question."""
        self.by_metric.setdefault(metric, []).append(score)
        if category is not None:
            self.by_category.setdefault(str(category), []).append(score)

    def values(self) -> dict[str, float]:
        """Returns the mean of all, of every metric, and of every category."""
        everything = [v for scores in self.by_metric.values() for v in scores]
        values = {"score": _mean(everything)} if everything else {}
        values |= {name: _mean(scores) for name, scores in self.by_metric.items()}
        groups = sorted(self.by_category.items())
        return values | {f"category_{name}": _mean(scores) for name, scores in groups}


class QuestionAnswers:
    """Scores of generated answers against those of the file, each by a metric that suits it.

    Data: chat JSONL as training reads it; prompt: the questions, with the file's own answers
    before later ones; metrics: scoring/answers.py, or a judge. `answers` of a line are further
    reference answers of its last question, and `category` groups the scores.

    Raises:
        UserError: the file is missing, holds no question with an answer, or has bad samples.
    """

    def __init__(self, config: QaEval) -> None:
        self.config = config
        is_table = config.annotations.suffix in (".parquet", ".arrow")
        form: Literal["parquet", "chat"] = "parquet" if is_table else "chat"
        source = open_source(
            SourceConfig(
                name="held out",
                type=form,
                annotations=config.annotations,
                images=config.images,
                # As the original's data does; without it such a sample would be a bad one.
                insert_image_mark=True,
            )
        )
        lines = range(min(len(source), config.limit or len(source)))
        self.problems: list[BadSample] = []
        self.turns: list[_Turn] = []
        for sample in source.samples(lines):
            if isinstance(sample, BadSample):
                self.problems.append(sample)
                continue
            self.turns += _turns(sample, config.tolerance)
        absent = self._missing()
        self.problems += absent
        raise_or_log(self.problems, config.on_bad_sample, _REMEDY)
        if not self.turns:
            raise UserError(self._no_questions(len(absent)))

    def _no_questions(self, num_absent: int) -> str:
        """Returns the sentence about a file of which no question is left."""
        config = self.config
        if not self.problems:
            return f"{config.annotations} holds no question with an answer"
        first = self.problems[-1] if num_absent else self.problems[0]
        head = f"{config.annotations}: none of its questions can be asked"
        if num_absent:
            return (
                f"{head}; files are missing for {counted(num_absent, 'sample')}, such as "
                f"{first.name}: {first.reason}; --images names the folder that their paths are "
                f"below, now {config.images}"
            )
        form = '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
        return f"{head}, such as {first.name}: {first.reason}; a row is a chat: {form}"

    def _missing(self) -> list[BadSample]:
        """Lists the samples whose files do not exist; they are decoded when they are shown."""
        absent = {}
        for turn in self.turns:
            videos = [video.path for video in turn.sample.videos]
            for path in [*turn.sample.images, *videos]:
                if isinstance(path, str) and "://" not in path and not Path(path).exists():
                    absent[turn.sample.name] = BadSample(turn.sample.name, f"there is no {path}")
        self.turns = [turn for turn in self.turns if turn.sample.name not in absent]
        return list(absent.values())

    def images(self) -> Sequence[str | FileSlice]:
        """Returns every image that will be opened."""
        images = (image for turn in self.turns for image in turn.sample.images)
        return list(dict.fromkeys(i for i in images if isinstance(i, str | FileSlice)))

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"questions": len(self.turns)}
        return counts | ({"left out": len(self.problems)} if self.problems else {})

    def table(self) -> None:
        """See `Evaluator.table`."""

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Asks a Chat and scores its answers; keeps them in `folder`, if any."""
        chat = handle.as_chat("an evaluation of type qa")
        config = self.config
        # Its own tiles: there are no published scores to compare with.
        tiling = asking.tiling(chat, config.tiles or "checkpoint", chat.tiles.max)
        settings = Settings(
            max_new_tokens=config.max_new_tokens,
            num_beams=config.num_beams,
            temperature=config.temperature,
        )
        cache = None
        if folder is not None:
            asked = [(turn.messages, turn.sample.videos) for turn in self.turns]
            # Of cells and videos too: an answer on disk is of this very content.
            images = asking.key_of_images(i for turn in self.turns for i in turn.sample.media)
            key = asking.key_of(asked, images, settings, tiling.most, config.frames)
            cache = folder / f"answers-{key}"
        answers = asking.ask(
            chat,
            len(self.turns),
            lambda index: self._question(chat, self.turns[index], tiling.most),
            settings,
            batch_size=config.batch_size,
            cache=cache,
        )
        return dist.main_alone(lambda: self._score(answers))

    def _question(self, chat: Chat, turn: _Turn, most: int) -> Question:
        """Decodes images and frames of a question. Raises BadImage."""
        exif = configs.chat_settings(chat.model.config)["exif"]
        images = [as_rgb(i, exif) for i in turn.media(IMAGE_MARK, turn.sample.images)]
        videos = [
            read_video(video, self.config.frames, turn.name, exif)
            for video in turn.media(VIDEO_MARK, turn.sample.videos)
        ]
        request = Request(list(turn.messages), images, videos, self.config.frames, most)
        return Question(turn.messages[-1].content, request)

    def _score(self, answers: Sequence[Answer]) -> EvalScores:
        """Computes the scores of all answers."""
        answered = [
            (t, a["answer"]) for t, a in zip(self.turns, answers, strict=True) if "answer" in a
        ]
        bad = [
            BadSample(turn.name, row["reason"])
            for turn, row in zip(self.turns, answers, strict=True)
            if "reason" in row
        ]
        policy = "raise" if self.config.on_bad_sample == "raise" else "skip"
        raise_or_log(bad, policy, _REMEDY)
        if not answered:
            raise UserError(f"{self.config.annotations}: none of its questions can be asked")
        names = [self._metric(turn) for turn, _ in answered]
        free = [pair for pair, name in zip(answered, names, strict=True) if name == "judge"]
        ratings = self._ratings(free)
        scores, rows = _Scores(), []
        for (turn, answer), name in zip(answered, names, strict=True):
            score = next(ratings) if name == "judge" else METRICS[name](answer, turn.reference)
            if score is not None:
                scores.add(name, score, turn.sample.extra.get("category"))
            rows.append(_row(turn, answer, name, score))
        exact = [METRICS["exact"](answer, turn.reference) for turn, answer in answered]
        for row, value in zip(rows, exact, strict=True):
            row["exact"] = bool(value)
        values = scores.values() | {"exact": _mean(exact)}
        return EvalScores(
            values,
            [*rows, *skipped_rows([*self.problems, *bad])],
            notes=tuple(self._notes(names)),
        )

    def _metric(self, turn: _Turn) -> str:
        return metric_of(turn.reference) if self.config.metric == "auto" else self.config.metric

    def _notes(self, names: Sequence[str]) -> list[str]:
        shares = {name: names.count(name) for name in dict.fromkeys(names)}
        shown = ", ".join(f"{name} {count}" for name, count in shares.items())
        notes = [f"questions by metric: {shown}"]
        if "judge" in shares and self.config.judge is None:
            free = counted(shares["judge"], "long answer is", "long answers are")
            notes.append(f"{free} not scored; name a judge with --judge URL, or a --metric")
        return notes

    def _ratings(self, free: Sequence[tuple[_Turn, str]]) -> Iterator[float | None]:
        """Returns the judge's scores, from 0 to 1; None for each without one."""
        judge = Judge.of(self.config)
        if judge is None or not free:
            return iter([None] * len(free))
        rubric = rubrics()["qa"]
        prompts = [
            rubric.filled(
                question=turn.messages[-1].content,
                expected="\n".join(turn.reference.texts),
                answer=answer,
            )
            for turn, answer in free
        ]
        replies = judge.ask_all(rubric, prompts, "ratings")
        ratings = [reviews.careful_rating(reply, _MOST_RATING) for reply in replies]
        return iter([None if rating is None else rating / _MOST_RATING for rating in ratings])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _turns(sample: Sample, tolerance: float) -> Iterator[_Turn]:
    """Yields every question of a conversation that has an answer."""
    further = sample.extra.get("answers")
    last = max((i for i, m in enumerate(sample.messages) if m.role == "assistant"), default=-1)
    position = 0
    for index, message in enumerate(sample.messages):
        if message.role != "assistant" or index == 0:
            continue
        position += 1
        texts = [message.content]
        if index == last and isinstance(further, list) and further:
            texts = [str(text) for text in further]
        question = sample.messages[index - 1].content
        reference = Reference(texts, question, tolerance)
        yield _Turn(sample, position, sample.messages[:index], reference)


def _row(turn: _Turn, answer: str, metric: str, score: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample": turn.sample.name,
        "turn": turn.position,
        "images": [str(i) for i in turn.media(IMAGE_MARK, turn.sample.images) if _is_named(i)],
        "question": turn.messages[-1].content,
        "answer": answer,
        "references": list(turn.reference.texts),
        "metric": metric,
    }
    return row | ({} if score is None else {"score": score}) | _category(turn.sample.extra)


def _is_named(image: Any) -> bool:
    return isinstance(image, str | FileSlice)


def _category(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {"category": extra["category"]} if "category" in extra else {}
