"""Cleaned captions equal the original's."""

import json
from pathlib import Path

from internvl.data.pairs import clean_caption

GOLDEN = Path(__file__).parent / "golden/internvl_g_data/captions.json"


def test_cleaned_as_the_original() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(map(clean_caption, golden["raw"])) == golden["processed"]


def test_full_width_marks_commas_and_line_ends() -> None:
    assert clean_caption("A、B,c'd -e? \n") == "a、b,c'd -e?"
    assert clean_caption("...") == ""
