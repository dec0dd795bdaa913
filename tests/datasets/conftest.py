"""What the tests of prepared data sets share."""

import pytest

from internvl.datasets import checklist
from internvl.datasets import download as fetch


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing published has the size of these trees; nothing may use the network."""
    monkeypatch.setattr(checklist, "EXPECTED", {})

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(fetch, "fetch", refuse)
    monkeypatch.setattr(fetch, "fetch_snapshot", refuse)
