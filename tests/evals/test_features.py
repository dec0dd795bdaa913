"""Features that are kept between evaluations."""

from pathlib import Path

import pytest
import torch

from internvl.errors import UserError
from internvl.evals import features


def test_features_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    rows = torch.ones(3, 2)
    rows[1, 0] = torch.nan
    with pytest.raises(UserError, match="of texts hold no finite number in row 2"):
        features.FeatureCache(tmp_path).encode("texts", 3, lambda part: rows)
    assert not [*tmp_path.iterdir()]


def test_kept_features_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    features.FeatureCache(tmp_path).encode("texts", 3, lambda part: torch.ones(len(part), 2))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
