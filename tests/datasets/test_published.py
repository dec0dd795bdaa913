"""Published evaluation sets are read from their documented layouts."""

import json
import re
from pathlib import Path

import pytest
from photos import photo

from internvl import evals
from internvl.datasets import published as published_sets
from internvl.errors import ConfigError
from internvl.evals.retrieval import Retrieval


def test_every_named_set_is_read_from_its_layout(tmp_path: Path) -> None:
    """The documented files and folders, as small as they can be."""
    name = "COCO_val2014_000000000042.jpg"
    coco, flickr, nocaps = (tmp_path / x for x in ("coco", "flickr30k", "nocaps"))
    retrieval = tmp_path / "mscoco_captions"
    for path in (
        *(coco / "val2014" / name, flickr / "Images/7.jpg", nocaps / "images/7.jpg"),
        retrieval / "val2014" / name,
    ):
        photo(path, 1)
    one = [{"image_id": 42, "id": 1, "caption": "A cat."}]
    named = {"images": [{"id": 42, "file_name": "Images/7.jpg"}], "annotations": one}
    files = {
        coco / "annotations/coco_karpathy_test.json": [{"image": f"val2014/{name}"}],
        coco / "annotations/coco_karpathy_test_gt.json": {"images": [], "annotations": one},
        flickr / "flickr30k_test_karpathy.json": named,
        nocaps / "nocaps_val_4500_captions.json": named,
        retrieval / "coco_test_karpathy.json": {
            "images": [{"id": 42, "file_name": name}],
            "annotations": one,
        },
        retrieval / "coco-cn_test.json": {
            "images": [{"id": 42, "file_name": f"val2014/{name}"}],
            "annotations": one,
        },
    }
    for path, tree in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree))
    for path, text in {
        flickr / "flickr30k_test_karpathy.txt": "image,caption\n7.jpg,A cat.\n",
        flickr / "flickr30k_cn_test.txt": "image,caption\n7.jpg,A cat.\n",
        retrieval / "test_1kcaptions_ko.txt": "A cat.\n",
        retrieval / "test_1kcaptions_en.txt": "A cat.\n",
        retrieval / "test_image_names.txt": f"{name}\n",
    }.items():
        path.write_text(text)
    for task, described in published_sets.TASKS.items():
        languages = ("en", "ko") if task == "retrieval-xtd" else ()
        options = {"recall_k": (1,)} if described.type == "retrieval" else {}
        found = published_sets.configs(
            task, tmp_path / described.root, languages=languages, **options
        )
        assert len(found) == max(1, len(languages))
        for config in found.values():
            evaluator = evals.EVALS[config.type](config)
            assert [Path(path).exists() for path in evaluator.images()] == [True], task
            assert evaluator.counts() == {"images": 1, "texts": 1}, task
            if isinstance(evaluator, Retrieval):
                cleaned = "A cat." if task == "retrieval-xtd" else "a cat"
                assert evaluator.pairs.texts == (cleaned,), task
            else:
                assert evaluator.ids == [42]


@pytest.mark.parametrize(
    ("root", "remedy"),
    [
        (Path("data/nocaps"), "; `internvl data prepare nocaps --download` fetches what"),
        (Path("/a b/data/nocaps"), "nocaps --download --root '/a b'` fetches what"),
        # The command fills data/nocaps alone.
        (Path("/a/mine"), "are missing\n"),
    ],
)
def test_the_command_of_missing_files_fetches_them_there(root: Path, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        published_sets.configs("caption-nocaps", root)
