"""Zero-shot classification: predicts the class whose texts are nearest to an image.

Original: CLIP_benchmark's `metrics/zeroshot_classification.py`. Class names and templates are those
of a published set, or read from files that the user has.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from internvl import dist
from internvl.config import ClassifyEval
from internvl.data.images import IMAGE_ENDINGS, FileSlice
from internvl.data.json_rows import RepeatedKeys, read_json
from internvl.data.texts import json_type, printable, text_problem
from internvl.datasets import labelled
from internvl.errors import BadSample, UserError, counted
from internvl.evals import probe, sharing
from internvl.evals.features import (
    CHUNK_TEXTS,
    FeatureCache,
    nearest,
    ranks,
    ranks_of_scores,
    scores_of,
)
from internvl.evals.scores import (
    LEFT_OUT,
    EvalScores,
    Table,
    TableRow,
    fingerprint,
    raise_or_log,
    raise_or_log_images,
    skipped_rows,
)
from internvl.parallel import lockstep

_REMEDY = "put them right, or set on_bad_sample (--on-bad-sample) to skip to leave them out"

Measure = Callable[[str, Tensor], tuple[dict[str, float], list[dict[str, Any]]]]
"""Mode, features of the images -> metrics, and columns of each image's row."""


class Classify:
    """acc1, acc5 (of five classes or more) and mean_per_class_recall, from 0 to 1; of a set with
    several classes an image mean_average_precision.

    Data: a folder with a folder of images for each class, whose index is that of its folder, sorted
    by name; or a published set. Images are resized by their shorter side and center-cropped.

    Raises:
        UserError: no images, broken ones, or class names or templates that do not fit.
    """

    def __init__(self, config: ClassifyEval) -> None:
        self.config = config
        self.problems: list[BadSample] = []
        self.names: Sequence[str] = ()
        self.templates: Sequence[str] = ("{c}",)
        self.multilabel = False
        self.train: list[tuple[str | FileSlice, tuple[int, ...]]] = []
        files = self._read_folders() if config.set is None else self._read_set(config.set)
        files = files[: config.limit]
        # Decoded before any model is loaded: a truncated file would end a long run otherwise.
        bad = sharing.broken([image for image, _ in files])
        unreadable = [BadSample(printable(str(files[i][0])), why) for i, why in bad.items()]
        if config.templates is not None:
            self.templates = self._texts(config.templates)
        for index, template in enumerate(self.templates, start=1):
            if "{c}" not in template:
                raise UserError(
                    f"{config.templates or config.annotations} entry {index}: {template!r} has no "
                    "{c} for the class; every template needs one"
                )
        raise_or_log_images(self.problems, unreadable, config.on_bad_sample, _REMEDY)
        self.problems += unreadable
        self.files = [file for index, file in enumerate(files) if index not in bad]
        if not self.files:
            raise UserError(f"{config.annotations} holds no image that can be read")

    def _read_folders(self) -> list[tuple[str | FileSlice, tuple[int, ...]]]:
        """Returns (image, labels) of a folder of folders; sets the names of its classes."""
        root = self.config.annotations
        if not root.is_dir():
            raise UserError(f"{root} is no folder; classify needs a folder for each class in it")
        # Sorted, as torchvision's ImageFolder: a list of class names is in this order.
        self.folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        files: list[tuple[str | FileSlice, tuple[int, ...]]] = [
            (str(file), (index,))
            for index, name in enumerate(self.folders)
            # At any depth, as torchvision's ImageFolder walks a class's folder.
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in IMAGE_ENDINGS
        ]
        if not files:
            raise UserError(f"{root} has no folder with images; classes are folders")
        self.problems = self._empty_classes(root)
        self.names = self._class_names()
        return files

    def _read_set(self, name: str) -> list[tuple[str | FileSlice, tuple[int, ...]]]:
        """Returns (image, labels) of a published set; sets the names of its classes."""
        entry = labelled.find(name)
        if entry is None:
            sets = ", ".join(labelled.entries())
            raise UserError(f"set: there is no set {name!r} of labelled images; known: {sets}")
        config = self.config
        rows = labelled.read(entry, config.annotations, config.split, config.language)
        self.names, self.templates = rows.classes, rows.templates
        self.multilabel = entry.multilabel
        if config.classes is not None:
            self.names = self._texts(config.classes)
            if len(self.names) != len(rows.classes):
                raise UserError(
                    f"{config.classes} has {len(self.names)} class names, but {entry.name} has "
                    f"{len(rows.classes)} classes"
                )
        if config.method == "probe":
            if entry.multilabel:
                raise UserError(
                    f"method: probe is for one class an image; {entry.name} has several"
                )
            train = labelled.read(entry, config.annotations, "train", config.language)
            self.train = list(zip(train.images, train.labels, strict=True))
        return list(zip(rows.images, rows.labels, strict=True))

    def _empty_classes(self, root: Path) -> list[BadSample]:
        """Returns a problem for each folder without an image.

        Raises:
            UserError: a folder's name cannot be encoded.
        """
        problems = []
        for name in self.folders:
            reason = text_problem(name)
            if reason:  # the file system's bytes in another encoding, decoded to half characters
                raise UserError(f"{root}: the name of the folder {printable(name)} {reason}")
            files = (root / name).rglob("*")
            # It remains a class to choose from, but recall is the mean over classes with images.
            if not any(file.suffix.lower() in IMAGE_ENDINGS for file in files):
                endings = ", ".join(IMAGE_ENDINGS)
                problems.append(
                    BadSample(
                        str(root / name), f"this class has no image ({endings}) in its folder"
                    )
                )
        return problems

    def images(self) -> Sequence[str | FileSlice]:
        """Returns every image that will be opened."""
        return [image for image, _ in self.files]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"images": len(self.files), "classes": len(self.names)}
        return counts | ({LEFT_OUT: len(self.problems)} if self.problems else {})

    def table(self) -> Table:
        """See `Evaluator.table`: modes by accuracies."""
        top5 = {"acc5": "top-5"} if len(self.names) >= 5 else {}
        columns = {"acc1": "top-1", **top5, "mean_per_class_recall": "per class"}
        if self.multilabel:
            columns = {"mean_average_precision": "mAP"}
        if self.config.method == "probe":
            columns = {f"lp_{name}": text for name, text in columns.items()}
        rows = tuple(
            TableRow(f"InternVL-{mode.upper()}", tuple(f"{mode}_{name}" for name in columns))
            for mode in self.config.modes
        )
        title = "precision in %" if self.multilabel else "accuracy in %"
        return Table(title, tuple(columns.values()), rows)

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Encodes with `handle` (Dual) and classifies; caches features in `folder`, if any."""
        handle = handle.as_dual("zero-shot classification")
        cache, paths = FeatureCache(self._cache_folder(folder)), self.images()
        batch_size = self.config.batch_size
        if self.config.method == "probe":
            return self._run_probe(handle, cache)
        classes = cache.encode(
            "classes",
            len(self.names),
            lambda rows: self._class_features(handle, rows),
            # A class has a text for every template.
            chunk=max(1, CHUNK_TEXTS // len(self.templates)),
            in_step=lockstep.in_step(handle.model),
        )
        # All modes from one pass of the vision tower, which takes nearly all of the time.
        features = cache.encode_images(
            "crops", handle, paths, self.config.modes, batch_size=batch_size, crop=True
        )
        self._leave_out(features.unread)
        # An image of several classes has no rank of its class.
        measure = self._precision if self.multilabel else self._accuracy
        return dist.main_alone(
            lambda: self._score(features.modes, lambda mode, images: measure(images, classes))
        )

    def _run_probe(self, handle: Any, cache: FeatureCache) -> EvalScores | None:
        """Trains a linear layer for every mode on the training split's features; scores it."""
        options: dict[str, Any] = {"batch_size": self.config.batch_size, "crop": True}
        modes = self.config.modes
        train = cache.encode_images(
            "train", handle, [image for image, _ in self.train], modes, **options
        )
        test = cache.encode_images("crops", handle, self.images(), modes, **options)
        self._leave_out(test.unread)
        # Those that cannot be read teach nothing; the rest is as labelled.
        labels = [row[0] for index, (_, row) in enumerate(self.train) if index not in train.unread]
        return dist.main_alone(
            lambda: self._score(
                test.modes,
                lambda mode, images: self._probed(train.modes[mode], torch.tensor(labels), images),
            )
        )

    def _probed(
        self, train: Tensor, labels: Tensor, images: Tensor
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Trains a linear layer; returns what `_accuracy` does, by its scores."""
        layer = probe.fit(train, labels, len(self.names), self.config)
        scores = layer(images).cpu()
        truth, order = self._labels(), torch.arange(len(self.names))
        # As of class texts: equal scores count alike.
        class_ranks = ranks_of_scores(scores, truth[:, None] == order, order)
        metrics, columns = self._ranked(class_ranks, scores.argmax(dim=1), truth)
        return {f"lp_{name}": value for name, value in metrics.items()}, columns

    def _leave_out(self, unread: Mapping[int, str]) -> None:
        """Leaves out images (indices) that cannot be read any more, from now on."""
        lost = [BadSample(printable(str(self.files[i][0])), why) for i, why in unread.items()]
        raise_or_log(lost, "skip", _REMEDY)
        self.problems += lost
        self.files = [file for index, file in enumerate(self.files) if index not in unread]
        if not self.files:
            raise UserError(f"{self.config.annotations}: none of its images can be read any more")

    def _score(self, features: Mapping[str, Tensor], measure: Measure) -> EvalScores:
        """Measures the images' features of every mode."""
        values: dict[str, float] = {}
        rows: list[dict[str, Any]] = [
            {**_named(image), **self._truth(labels)} for image, labels in self.files
        ]
        for mode, images in features.items():
            metrics, of_images = measure(mode, images)
            values |= {f"{mode}_{name}": value for name, value in metrics.items()}
            for row, columns in zip(rows, of_images, strict=True):
                for name, value in columns.items():
                    row.setdefault(name, {})[mode] = value
        rows += skipped_rows(self.problems)
        return EvalScores(values, rows, images=lambda index: [self.files[index][0]])

    def _truth(self, labels: tuple[int, ...]) -> dict[str, Any]:
        if self.multilabel:
            return {"classes": [self.names[label] for label in labels]}
        return {"class": self.names[labels[0]]}

    def _accuracy(
        self, images: Tensor, classes: Tensor
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Returns the metrics of images with one class, and `rank` and `predicted` of each."""
        truth = self._labels()
        class_ranks = ranks(images, classes, truth, torch.arange(len(classes))).cpu()
        return self._ranked(class_ranks, nearest(images, classes, 1)[:, 0], truth)

    def _labels(self) -> Tensor:
        return torch.tensor([labels[0] for _, labels in self.files])

    def _ranked(
        self, class_ranks: Tensor, best: Tensor, truth: Tensor
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        columns = [
            {"rank": rank, "predicted": self.names[label]}
            for rank, label in zip(class_ranks.tolist(), best.tolist(), strict=True)
        ]
        return accuracies(class_ranks, truth, len(self.names)), columns

    def _precision(
        self, images: Tensor, classes: Tensor
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Returns the metric of images with several classes, and the `predicted` one of each."""
        scores = torch.cat([rows for _, rows in scores_of(images, classes.to(images.device))]).cpu()
        targets = torch.zeros(scores.shape, dtype=torch.bool)
        for row, (_, labels) in enumerate(self.files):
            targets[row, list(labels)] = True
        columns = [{"predicted": self.names[label]} for label in scores.argmax(dim=1).tolist()]
        return {"mean_average_precision": mean_average_precision(scores, targets)}, columns

    def _class_features(self, handle: Any, rows: range) -> Tensor:
        """Features of classes `rows`, float32 (len(rows), E) of unit length."""
        texts = [text.replace("{c}", self.names[i]) for i in rows for text in self.templates]
        features = handle.encode_texts(texts).float()
        # Normalized twice, each text and the mean, as the original: the mean is shorter than 1.
        return normalize(features.view(len(rows), len(self.templates), -1).mean(dim=1), dim=-1)

    def _class_names(self) -> list[str]:
        """Returns the name of each folder's class; an unused name becomes a problem.

        Raises:
            UserError: names that do not fit the folders.
        """
        if self.config.classes is None:
            return self.folders
        path, entry = self.config.classes, self._entry(self.config.classes)
        if isinstance(entry, dict):
            unnamed = [folder for folder in self.folders if folder not in entry]
            if unnamed:
                raise UserError(f"{path} has no name for the folder {unnamed[0]}")
            extra = [name for name in entry if name not in self.folders]
            if extra:  # with fewer classes than meant the task would be an easier one
                some = printable(", ".join(extra[:5])) + (", …" if len(extra) > 5 else "")
                root = self.config.annotations
                reason = f"it names {counted(len(extra), 'folder')} missing from {root}: {some}"
                self.problems.append(BadSample(str(path), reason))
            names = [entry[folder] for folder in self.folders]
        else:
            names = self._texts(path)
        # For the values of a dict: `_texts` has checked a list already.
        for folder, name in zip(self.folders, names, strict=False):
            self._check_text(path, f"the name of {folder}", name)
        if len(names) != len(self.folders):
            raise UserError(
                f"{path} has {len(names)} class names, but "
                f"{self.config.annotations} has {len(self.folders)} folders"
            )
        return names

    def _texts(self, path: Path) -> list[str]:
        """Reads a JSON list of texts, of the entry `key` if there is one."""
        texts = self._entry(path)
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{path}: a JSON list of texts is expected, not {json_type(texts)}")
        for index, text in enumerate(texts, start=1):
            self._check_text(path, f"entry {index}", text)
        return texts

    def _check_text(self, path: Path, where: str, text: Any) -> None:
        reason = text_problem(text)
        # An empty name would leave only the template, the same for every such class.
        if reason is None and not text.strip():
            reason = "is empty; write it"
        if reason:
            raise UserError(f"{path}: a JSON list of texts is expected, but {where} {reason}")

    def _entry(self, path: Path) -> Any:
        """Reads a JSON file, or its entry for the data set that `key` names."""
        tree = read_json(path)
        # CLIP_benchmark's files hold all data sets; a plain list is of one and needs no key.
        if self.config.key is not None and isinstance(tree, dict):
            if self.config.key not in tree:
                keys = printable(", ".join(tree))
                raise UserError(f"{path} has no entry {self.config.key!r}; it has {keys}")
            tree = tree[self.config.key]
        # json.loads would silently take the last of two equal keys.
        if isinstance(tree, RepeatedKeys):
            raise UserError(f"{path}: {tree.repeated!r} is there twice; remove one")
        return tree

    def _cache_folder(self, folder: Path | None) -> Path | None:
        """Returns the cache folder for exactly these files, names and templates."""
        if folder is None:
            return None
        files = [*self.files, *self.train]
        fingerprints = [(image, *fingerprint(image)) for image, _ in files]
        text = repr((fingerprints, self.names, self.templates))
        return folder / blake2b(text.encode(), digest_size=8).hexdigest()


def _named(image: str | FileSlice) -> dict[str, str]:
    """Returns the column of a row that names an image: its path, or its name in a larger file."""
    return {"inside": str(image)} if isinstance(image, FileSlice) else {"image": image}


def accuracies(class_ranks: Tensor, truth: Tensor, num_classes: int) -> dict[str, float]:
    """Computes CLIP_benchmark's metrics.

    Args:
        class_ranks: int64 (num_images,), rank of each image's true class.
        truth: int64 (num_images,), index of that class.
    """
    hits = (class_ranks == 0).double()
    present = truth.unique()  # a class without images has no recall, and would count as NaN
    per_class = [hits[truth == label].mean().item() for label in present.tolist()]
    return {
        "acc1": hits.mean().item(),
        # With fewer than five classes the original writes a bare NaN here, which is no JSON.
        **({"acc5": (class_ranks < 5).double().mean().item()} if num_classes >= 5 else {}),
        "mean_per_class_recall": sum(per_class) / len(per_class),
    }


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Computes CLIP_benchmark's mean over classes of the average precision.

    Args:
        scores: float (num_images, num_classes).
        targets: bool (num_images, num_classes), the classes of each image.
    """
    order = scores.sort(dim=0, descending=True, stable=True)[1]
    truth = targets.gather(0, order)
    precision = truth.float().cumsum(0) / torch.arange(1, len(scores) + 1)[:, None]
    # A class of no image counts as 0, as there.
    average = (precision * truth).sum(dim=0) / truth.sum(dim=0).clamp(min=1)
    return average.mean().item()
