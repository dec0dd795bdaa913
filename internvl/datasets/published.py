"""Published evaluation sets: paths, forms and URLs of their files.

Original layout: `data/` of the chat and captioning code, `--dataset_root` of CLIP_benchmark.
Imports nothing heavy: `internvl evaluate --help` lists these.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl.config import EvalSection, eval_config
from internvl.datasets import labelled, tasks
from internvl.errors import ConfigError, counted

OPENGVLAB = "https://github.com/OpenGVLab/InternVL/releases/download/data/"
KARPATHY = "https://github.com/mehdidc/retrieval_annotations/releases/download/1.0.0/"
COCO = "http://images.cocodataset.org/zips/"
FLICKR = "https://bryanplummer.com/Flickr30kEntities/ (on request)"
NOCAPS = "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
NOCAPS_IMAGES = "https://nocaps.org/download"
XTD = "https://raw.githubusercontent.com/adobe-research/Cross-lingual-Test-Dataset-XTD10/main/"
_SHIPPED = "https://raw.githubusercontent.com/OpenGVLab/InternVL/main/clip_benchmark/data/"
_COCO_IMAGES = f"{COCO}{{train2014,val2014}}.zip"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A published evaluation set: TASK of `internvl evaluate MODEL TASK`."""

    type: Literal["caption", "retrieval", "classify"]
    about: str
    num_images: int
    """Images of the whole test split, on which results are published."""
    num_texts: int
    dataset: str
    """Name in result files."""
    root: str
    """Folder below `--root`."""
    annotations: str
    """Path below `root`; `{split}` and `{language}` are filled in."""
    annotations_from: str
    """URL of the annotations."""
    images: str
    """Folder of the images below `root`."""
    images_from: str
    image_list: str = ""
    """See EvalConfig."""
    flat: bool = False
    form: str = "auto"
    clean: bool = True
    languages: tuple[str, ...] = ("en",)
    """As CLIP_benchmark writes them; the first is the default."""
    prepared_by: str = ""
    """Name of `internvl data prepare` that fetches its files."""


TASKS: dict[str, Task] = {
    "caption-coco": Task(
        type="caption",
        about="COCO captions, Karpathy's test split",
        num_images=5_000,
        num_texts=25_010,
        dataset="coco",
        root="coco",
        annotations="annotations/coco_karpathy_test_gt.json",
        annotations_from=f"{OPENGVLAB}coco_karpathy_test_gt.json",
        # The references have ids only; the list has the names.
        image_list="annotations/coco_karpathy_test.json",
        images=".",
        images_from=f"{COCO}val2014.zip",
        prepared_by="coco-caption",
    ),
    "caption-flickr30k": Task(
        type="caption",
        about="Flickr30K captions, Karpathy's test split",
        num_images=1_000,
        num_texts=5_000,
        dataset="flickr30k",
        root="flickr30k",
        annotations="flickr30k_test_karpathy.json",
        annotations_from=f"{OPENGVLAB}flickr30k_test_karpathy.json",
        images="Images",
        images_from=FLICKR,
        # The JSON names a folder that the images do not lie in.
        flat=True,
        prepared_by="flickr30k",
    ),
    "caption-nocaps": Task(
        type="caption",
        about="NoCaps validation captions",
        num_images=4_500,
        num_texts=45_000,
        dataset="nocaps",
        root="nocaps",
        # The test split's captions are not published.
        annotations="nocaps_val_4500_captions.json",
        annotations_from=NOCAPS,
        images="images",
        images_from=NOCAPS_IMAGES,
        flat=True,
        prepared_by="nocaps",
    ),
    "retrieval-flickr30k": Task(
        type="retrieval",
        about="Flickr30K",
        num_images=1_000,
        num_texts=5_000,
        dataset="flickr30k",
        root="flickr30k",
        annotations="flickr30k_{split}_karpathy.txt",
        annotations_from=f"{KARPATHY}flickr30k_{{split}}_karpathy.txt",
        images="Images",
        images_from=FLICKR,
        form="flickr",
        prepared_by="flickr30k",
    ),
    "retrieval-flickr30k-cn": Task(
        type="retrieval",
        about="Flickr30K-CN, Chinese texts of the same images",
        num_images=1_000,
        num_texts=5_000,
        dataset="flickr30k",
        root="flickr30k",
        annotations="flickr30k_cn_{split}.txt",
        annotations_from=f"{OPENGVLAB}flickr30k_cn_{{split}}.txt",
        images="Images",
        images_from=FLICKR,
        form="flickr",
        # CLIP_benchmark calls Chinese `cn` here and `zh` in XTD.
        languages=("cn",),
        prepared_by="flickr30k-cn",
    ),
    "retrieval-coco": Task(
        type="retrieval",
        about="COCO",
        num_images=5_000,
        num_texts=25_010,
        dataset="mscoco_captions",
        root="mscoco_captions",
        annotations="coco_{split}_karpathy.json",
        annotations_from=f"{KARPATHY}coco_{{split}}_karpathy.json",
        images=".",
        images_from=_COCO_IMAGES,
    ),
    "retrieval-coco-cn": Task(
        type="retrieval",
        about="COCO-CN, Chinese texts",
        num_images=1_000,
        num_texts=1_053,
        dataset="mscoco_captions",
        root="mscoco_captions",
        # Not downloaded by CLIP_benchmark but shipped with the original's code.
        annotations="coco-cn_{split}.json",
        annotations_from=f"{_SHIPPED}mscoco_captions/coco-cn_test.json",
        images=".",
        images_from=_COCO_IMAGES,
        form="coco",
        languages=("cn",),
    ),
    "retrieval-xtd": Task(
        type="retrieval",
        about="XTD10, in ten languages",
        num_images=1_000,
        num_texts=1_000,
        dataset="multilingual_mscoco_captions",
        root="mscoco_captions",
        # Line n is the caption of line n of test_image_names.txt.
        annotations="test_1kcaptions_{language}.txt",
        annotations_from=f"{XTD}XTD10/ (jp: STAIR/, fr: MIC/), with test_image_names.txt",
        images=".",
        images_from=_COCO_IMAGES,
        form="xtd",
        # CLIP_benchmark gives these texts to the model as they are.
        clean=False,
        languages=("en", "es", "it", "ko", "pl", "ru", "tr", "zh", "jp", "fr"),
    ),
}
"""By name, as `internvl evaluate` calls them."""

USER_TASKS = {
    "qa-file": "your own questions with their answers, chat JSONL (--annotations FILE)",
    "caption-file": "captions of your own images (--annotations FILE --images DIR)",
    "retrieval-folder": "your own images and texts (--annotations FILE-OR-FOLDER --images DIR)",
    "classify-folder": "a folder of images for each class (--annotations FOLDER)",
}
"""Tasks on files that the user names."""


def no_such(name: str, others: Iterable[str] = ()) -> str:
    """Returns the error message for an unknown task; `others`: further names that exist."""
    names = [*others, *TASKS, *USER_TASKS, *labelled.entries(), *tasks.tasks()]
    # Below difflib's 0.6: people leave out the prefix, as in "flickr30k".
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
    return f"there is no task {name!r}; {hint}"


def list_tasks() -> str:
    """Lists all tasks, one per line."""
    rows = {
        name: f"{task.about}: {task.num_images:,} images, {task.num_texts:,} texts"
        for name, task in TASKS.items()
    } | USER_TASKS
    sets = {
        name: f"{entry.about}: {entry.images:,} images, {entry.classes:,} classes"
        for name, entry in labelled.entries().items()
    }
    benchmarks = {name: task.about for name, task in tasks.tasks().items()}
    lines = [f"  {name:27}{about}" for name, about in (rows | sets | benchmarks).items()]
    return "\n".join(lines)


def configs(
    name: str,
    root: Path,
    *,
    languages: Sequence[str] | str = (),
    split: str = "test",
    **more: Any,
) -> dict[str, EvalSection]:
    """Builds the evaluations of a published set: name -> config, one per language.

    Args:
        name: a key of TASKS.
        root: the set's own folder.
        languages: by default the task's first.
        more: keys of the evaluation's section.

    Raises:
        ConfigError: no such language, or files that are not there, each with its address.
    """
    task = TASKS[name]
    # Results are published per language. A lone name is wrapped: it would be read by letters.
    chosen = ([languages] if isinstance(languages, str) else languages) or task.languages[:1]
    unknown = [language for language in chosen if language not in task.languages]
    if unknown:
        languages_text = ", ".join(task.languages)
        raise ConfigError(f"{name} has no language {unknown[0]!r}; it has {languages_text}")
    paths = {
        language: root / task.annotations.format(split=split, language=language)
        for language in chosen
    }
    # All files at once, so that they are fetched at once.
    required = [(path, task.annotations_from.format(split=split)) for path in paths.values()]
    # Task.images is "." if the annotations name images with their folder.
    images, image_list = root / task.images, root / task.image_list if task.image_list else None
    if image_list is not None:
        required.append((image_list, OPENGVLAB + image_list.name))
    required.append((images, task.images_from))
    # Not `is_file`: images are folders.
    missing = [f"{path}: from {address}" for path, address in required if not path.exists()]
    if missing:
        absent = counted(len(missing), "file or folder is", "files or folders are")
        usual = Path("data", task.root)
        remedy = ""
        # A folder that is called otherwise is none that the command fills.
        if task.prepared_by and root.parts[-len(usual.parts) :] == usual.parts:
            remedy = f"; {tasks.fetching(task.prepared_by, root.parents[len(usual.parts) - 1])}"
        raise ConfigError("\n".join([f"{name}: {absent} missing{remedy}", *missing]))
    fields: dict[str, Any] = {"type": task.type, "images": images}
    if task.type == "retrieval":
        fields |= {"form": task.form, "clean": task.clean, "split": split, "batch_size": 64}
    else:
        # The original generates at least 8 tokens of a caption.
        fields |= {"image_list": image_list, "flat": task.flat, "min_new_tokens": 8}
    return {
        _named(name, language): eval_config(**{**fields, "annotations": path, **more})
        for language, path in paths.items()
    }


def published_set(evaluation: str) -> Task | None:
    """Returns the published set of an evaluation name of `configs`, or None."""
    for name, task in TASKS.items():
        if any(evaluation == _named(name, language) for language in task.languages):
            return task
    return None


def _named(name: str, language: str) -> str:
    return name if language == TASKS[name].languages[0] else f"{name}-{language}"
