"""Zero-shot classification: an image is of the class whose texts are nearest to it.

As CLIP_benchmark (`metrics/zeroshot_classification.py`), whose class names and templates are read
from files that the user has.
"""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from internvl.config import ClassifyEval
from internvl.data.images import IMAGE_ENDINGS
from internvl.data.json_rows import RepeatedKeys, read_json
from internvl.data.pair_files import broken
from internvl.data.texts import json_type, printable, text_problem
from internvl.errors import BadSample, UserError
from internvl.evals.features import Store, ranks, share_within
from internvl.evals.scores import EvalScores, file_state, left_out, settle

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"


class Classify:
    """acc1, acc5 (of five classes or more) and mean_per_class_recall, from 0 to 1.

    Data: a folder with a folder of images for each class; the class of an image is the number of
    its folder, sorted by name. Images are resized by their shorter side and cut in the middle.

    Raises:
        UserError: no images, broken ones, or class names or templates that do not fit.
    """

    def __init__(self, config: ClassifyEval) -> None:
        self.config = config
        root = config.annotations
        if not root.is_dir():
            raise UserError(f"{root} is no folder; classify needs a folder for each class in it")
        self.folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        files = [
            (str(file), number)
            for number, name in enumerate(self.folders)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in IMAGE_ENDINGS
        ][: config.limit]
        if not files:
            raise UserError(f"{root} has no folder with images; classes are folders")
        bad = broken([path for path, _ in files])
        self.problems = [BadSample(printable(files[i][0]), why) for i, why in bad.items()]
        self.problems += self._unnamed(root)
        policy = "raise" if bad and config.on_bad_sample == "keep" else config.on_bad_sample
        self.names = self._names()
        self.templates = ["{c}"] if config.templates is None else self._listed(config.templates)
        for number, template in enumerate(self.templates, start=1):
            if "{c}" not in template:
                raise UserError(
                    f"{config.templates} entry {number}: {template!r} lacks a {{c}} for the class; "
                    "every template needs one"
                )
        settle(self.problems, policy, _REMEDY)
        self.files = [file for number, file in enumerate(files) if number not in bad]
        if not self.files:
            raise UserError(f"{root} holds no image that can be read")

    def _unnamed(self, root: Path) -> list[BadSample]:
        """Folders without an image: classes that nothing is measured of."""
        problems = []
        for name in self.folders:
            reason = text_problem(name)
            if reason:  # what the file system holds in another encoding
                raise UserError(f"{root}: the name of the folder {printable(name)} {reason}")
            files = (root / name).rglob("*")
            if not any(file.suffix.lower() in IMAGE_ENDINGS for file in files):
                endings = ", ".join(IMAGE_ENDINGS)
                problems.append(
                    BadSample(
                        str(root / name), f"this class has no image ({endings}) in its folder"
                    )
                )
        return problems

    def images(self) -> Sequence[str]:
        """Every image that will be opened."""
        return [path for path, _ in self.files]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"images": len(self.files), "classes": len(self.names)}
        return counts | ({"left out": len(self.problems)} if self.problems else {})

    def run(self, handle: Any, folder: Path | None) -> EvalScores:
        """Encodes with `handle` (Dual); keeps features in `folder`, if there is one."""
        handle = handle.as_dual("zero-shot classification")
        store, paths = Store(self._folder(folder)), self.images()
        batch_size = self.config.batch_size
        classes = store.encode("classes", len(self.names), lambda part: self._weights(handle, part))
        truth = torch.tensor([number for _, number in self.files])
        values: dict[str, float] = {}
        listed: dict[str, list[int]] = {}
        looked_at = store.encode_images(
            "crops", handle, paths, self.config.modes, batch_size=batch_size, crop=True
        )
        for mode, images in looked_at.items():
            found = ranks(images, classes, truth, torch.arange(len(classes))).cpu()
            listed[mode] = found.tolist()
            metrics = accuracies(found, truth, len(classes))
            values |= {f"{mode}_{name}": value for name, value in metrics.items()}
        listing = [
            {"image": path, "class": self.names[number], "rank": {m: listed[m][i] for m in listed}}
            for i, (path, number) in enumerate(self.files)
        ]
        return EvalScores(values, [*listing, *left_out(self.problems)])

    def _weights(self, handle: Any, part: range) -> Tensor:
        """(C, E): the direction of the mean of each class's texts."""
        texts = [text.replace("{c}", self.names[i]) for i in part for text in self.templates]
        features = handle.encode_texts(texts).float()
        return normalize(features.view(len(part), len(self.templates), -1).mean(dim=1), dim=-1)

    def _names(self) -> list[str]:
        if self.config.classes is None:
            return self.folders
        path, found = self.config.classes, self._entry(self.config.classes)
        if isinstance(found, dict):
            lacking = [folder for folder in self.folders if folder not in found]
            if lacking:
                raise UserError(f"{path} has no name for the folder {lacking[0]}")
            extra = [name for name in found if name not in self.folders]
            if extra:  # with fewer classes than meant the task would be an easier one
                some = printable(", ".join(extra[:5])) + (", …" if len(extra) > 5 else "")
                lacks = (
                    f"it names {len(extra)} folder(s) that {self.config.annotations} lacks: {some}"
                )
                self.problems.append(BadSample(str(path), lacks))
            names = [found[folder] for folder in self.folders]
        else:
            names = self._listed(path)
        for place, name in zip(self.folders, names, strict=False):
            self._check(path, f"the name of {place}", name)
        if len(names) != len(self.folders):
            raise UserError(
                f"{path} has {len(names)} class names, but "
                f"{self.config.annotations} has {len(self.folders)} folders"
            )
        return names

    def _listed(self, path: Path) -> list[str]:
        found = self._entry(path)
        if not isinstance(found, list) or not found:
            raise UserError(f"{path}: a JSON list of texts is expected, not {json_type(found)}")
        for number, text in enumerate(found, start=1):
            self._check(path, f"entry {number}", text)
        return found

    def _check(self, path: Path, place: str, text: Any) -> None:
        reason = text_problem(text)
        if reason is None and not text.strip():
            reason = "is empty; write it"
        if reason:
            raise UserError(f"{path}: a JSON list of texts is expected, but {place} {reason}")

    def _entry(self, path: Path) -> Any:
        """What a JSON file holds, or its entry for the data set that `key` names."""
        tree = read_json(path)
        if self.config.key is not None and isinstance(tree, dict):
            if self.config.key not in tree:
                known = printable(", ".join(tree))
                raise UserError(f"{path} has no entry {self.config.key!r}; it has {known}")
            tree = tree[self.config.key]
        if isinstance(tree, RepeatedKeys):
            raise UserError(f"{path}: {tree.repeated!r} is there twice; remove one")
        return tree

    def _folder(self, folder: Path | None) -> Path | None:
        """The part of `folder` that is for exactly these files, names and templates."""
        if folder is None:
            return None
        states = [(path, *file_state(path)) for path, _ in self.files]
        text = repr((states, self.names, self.templates))
        return folder / blake2b(text.encode(), digest_size=8).hexdigest()


def accuracies(found: Tensor, truth: Tensor, num_classes: int) -> dict[str, float]:
    """CLIP_benchmark's metrics of the rank of each image's class, int64 (num_images,).

    With fewer than five classes it writes a bare NaN for acc5, which is no JSON; here it is absent.
    """
    hits = (found == 0).double()
    present = truth.unique()
    per_class = [hits[truth == number].mean().item() for number in present.tolist()]
    return {
        "acc1": hits.mean().item(),
        **({"acc5": share_within(found, 5)} if num_classes >= 5 else {}),
        "mean_per_class_recall": sum(per_class) / len(per_class),
    }
