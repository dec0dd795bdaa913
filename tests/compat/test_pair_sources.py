"""Data sets of InternVL-14B's training entry."""

import pytest

from internvl.compat import pair_sources
from internvl.errors import ConfigError

TABLE = """
import torch
ds_collections = {
    'my_coco_format': {'root': './data/my/', 'annotation': './data/my/a.json'},
    'mine': {'root': 'r', 'annotation': 'a'},
}
"""


def test_a_set_of_the_original(tmp_path):
    source = pair_sources.find("flickr30k_cn_train", tmp_path / "gone.py")
    assert source["type"] == "flickr_format"
    assert source["annotations"] == "data/flickr30k/flickr30k_cn_train.txt"


def test_a_set_that_the_user_has_added_is_read_not_run(tmp_path):
    file = tmp_path / "entry.py"
    file.write_text(TABLE + "raise SystemExit")
    assert pair_sources.find("my_coco_format", file) == {
        "name": "my_coco_format",
        "type": "coco_format",
        "annotations": "./data/my/a.json",
        "images": "./data/my/",
    }
    with pytest.raises(ConfigError, match="flickr_format or coco_format"):
        pair_sources.find("mine", file)
    with pytest.raises(ConfigError, match="no such set; known: flickr30k_en_train"):
        pair_sources.find("other_coco_format", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ds_collections = dict(a=open('x'))", "is computed"), ("x = (", "no Python file")],
)
def test_a_table_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "entry.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        pair_sources.find("coco_karpathy_train", tmp_path / "entry.py")
