"""A model of lmms-eval: every InternVL chat model, run or adapter that `internvl.load` opens.

    python integrations/lmms_eval_internvl.py --model internvl_load \\
        --model_args pretrained=runs/mine --tasks pope

takes all options of lmms-eval. `--model_args` are those of `InternVL`, separated by commas. Under
`torchrun` or `accelerate launch` every process has a model of its own and a share of the questions.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

import internvl

NAME = "internvl_load"
_CHUNK = 256
"""Questions of one call: their images are in memory together."""
_DEFAULT_STOP = "\n\n"
"""What lmms-eval writes into `until` unless the task says otherwise; no chat model stops there."""


class InternVL(lmms):
    """Answers the questions of a task many at once; greedy, unless the task samples."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        max_tiles: int | None = None,
        num_frames: int = 8,
        max_new_tokens: int = 1024,
        batch_size: int | str = 1,
        **more: Any,
    ) -> None:
        """Loads the model.

        Args:
            pretrained, device, dtype, device_map: see `internvl.load`.
            max_tiles: most tiles of the images of a question; by default the checkpoint's.
            num_frames: frames of a video.
            max_new_tokens: longest answer of a task that does not say it.
            batch_size: changes nothing: the engine fills the memory that there is.
        """
        super().__init__()
        # lmms-eval hands on options of its own, such as max_batch_size, mostly None.
        unknown = sorted(key for key in more if key not in ("max_batch_size", "system_prompt"))
        if unknown:
            raise ValueError(f"{NAME} has no option {unknown[0]!r}; see InternVL in {__file__}")
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank is not None and device in (None, "cuda"):
            device = f"cuda:{local_rank}"
        self.chat = internvl.load(pretrained, device=device, dtype=dtype, device_map=device_map)
        self.max_tiles, self.num_frames = max_tiles, num_frames
        self.max_new_tokens = max_new_tokens

    @property
    def device(self) -> Any:
        """Device on which lmms-eval gathers numbers of its processes."""
        return self.chat.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns the answer to every request, in order."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            # Tasks differ in their settings; a call has one set of them.
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(index)
        answers: dict[int, str] = {}
        for indices in groups.values():
            settings, stops = self._settings(requests[indices[0]].args[2])
            for start in range(0, len(indices), _CHUNK):
                chunk = indices[start : start + _CHUNK]
                questions = [self._question(requests[index]) for index in chunk]
                texts = self.chat.answer(questions, **settings)
                answers |= {i: _cut(text, stops) for i, text in zip(chunk, texts, strict=True)}
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuses tasks that compare the probabilities of given answers."""
        raise NotImplementedError(f"{NAME}: tasks of loglikelihood are not answered; choose others")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuses tasks of several rounds."""
        raise NotImplementedError(f"{NAME}: tasks of several rounds are not answered")

    def _settings(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns the settings of `Chat.answer`, and the texts that an answer ends at."""
        samples = options.get("do_sample", True) and (options.get("temperature") or 0) > 0
        settings = {
            "max_new_tokens": options.get("max_new_tokens") or self.max_new_tokens,
            "num_beams": options.get("num_beams") or 1,
            "temperature": options["temperature"] if samples else None,
        }
        if samples and options.get("top_p"):
            settings["top_p"] = options["top_p"]
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return settings, [stop for stop in stops if stop and stop != _DEFAULT_STOP]

    def _question(self, request: Instance) -> internvl.Request:
        """Returns a request of ours: the messages of the task's row, its media in order."""
        _, to_messages, _, row, task, split = request.args
        messages = to_messages(self.task_dict[task][split][row])
        turns = [
            {"role": turn["role"], "content": [_part(part) for part in turn["content"]]}
            for turn in messages
        ]
        return internvl.Request(turns, num_frames=self.num_frames, max_tiles=self.max_tiles)


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part of a message as `internvl.Request` takes it."""
    if part["type"] == "text":
        # In the text of a question <image> is a word.
        text = part["text"].replace("<image>", "\\<image>").replace("<video>", "\\<video>")
        return {"type": "text", "text": text}
    if part["type"] in ("image", "video"):
        return {"type": part["type"], part["type"]: part["url"]}
    raise ValueError(f"{NAME}: a question has {part['type']}, which InternVL does not take")


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


def main() -> None:
    """Registers the model and runs lmms-eval's command line."""
    from lmms_eval.__main__ import cli_evaluate

    # By the file's own name: lmms-eval imports the class from it.
    sys.path.insert(0, str(Path(__file__).parent))
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest(model_id=NAME, chat_class_path=f"{Path(__file__).stem}.InternVL")
    )
    cli_evaluate()


if __name__ == "__main__":
    main()
