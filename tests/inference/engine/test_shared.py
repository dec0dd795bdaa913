"""Calls that share a scheduler, of InternVL-14B; chat models' are in test_generate.py."""

import numpy as np
import pytest
from dual_folders import dual_folder, small_tokenizer

import internvl
from internvl.errors import BadImage
from internvl.inference import engine


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    folder = small_tokenizer(dual_folder(tmp_path_factory.mktemp("dual")))
    return internvl.load(folder, device="cpu", dtype="float32")


@pytest.fixture
def made(monkeypatch):
    """The schedulers that are built."""
    schedulers, build = [], engine.captions
    monkeypatch.setattr(
        engine, "captions", lambda *a, **k: schedulers.append(build(*a, **k)) or schedulers[-1]
    )
    return schedulers


def test_calls_of_one_engine_and_after_it(dual, made):
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (50, 60, 3), dtype=np.uint8) for _ in range(4)]
    settings = {"max_new_tokens": 5, "min_new_tokens": 0, "num_beams": 3}
    alone = [dual.caption(image, **settings)[0] for image in images]
    assert len(made) == 4
    with engine.one_engine(dual.model, 4):
        assert [dual.caption(image, **settings)[0] for image in images] == alone
        assert len(made) == 5
        with pytest.raises(BadImage):
            dual.caption([images[0], b"no image"], **settings)
        assert dual.caption(images, **settings) == alone
        # After a request that failed the engine may hold others of its call.
        assert len(made) == 6
        dual.caption(images[0], **settings | {"num_beams": 1})
        dual.caption(images[0], batch_size=2, **settings)
        dual.caption(images[1], **settings)
        assert [scheduler.num_beams for scheduler in made[6:]] == [1, 3]
    assert dual.caption(images, **settings) == alone
    assert len(made) == 9
