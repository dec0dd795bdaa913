"""Errors of our own are one family."""

import importlib
from pathlib import Path

import internvl
from internvl.errors import BadImage, BadSample, UnknownModel, UserError


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_errors_of_our_own_are_one_family():
    """Every exception class of the package is a UserError, which the command line prints as it
    is."""
    for file in sorted(Path(internvl.__file__).parent.rglob("*.py")):
        names = file.relative_to(Path(internvl.__file__).parent).with_suffix("").parts
        if not names[-1].endswith("_triton") and names[-1] not in ("__main__", "flash4"):
            importlib.import_module(".".join(("internvl", *names)))
    ours = {kind for kind in subclasses(BaseException) if kind.__module__.startswith("internvl.")}
    assert {BadImage, BadSample, UnknownModel} <= ours
    assert {kind.__name__ for kind in ours if not issubclass(kind, UserError)} == set()
