"""Words of a command line cut into flags."""

import pytest

from internvl.compat.translation import take_flags
from internvl.errors import ConfigError

VALUED = {"out": "a folder", "k": "numbers"}


def test_words_and_flags():
    words = ["a", "--out", "x", "b", "--dry", "--k", "1", "2", "--out=y"]
    positional, flags = take_flags(words, VALUED, ("dry",), several=("k",))
    assert positional == ["a", "b"]
    assert flags == {"out": ["y"], "dry": [], "k": ["1", "2"]}


def test_a_flag_of_ours_names_our_command():
    line = "internvl evaluate X --limit N"
    with pytest.raises(ConfigError, match=f"type `{line}`, or remove it"):
        take_flags(["--limit", "3"], VALUED, ours={"limit": line})


@pytest.mark.parametrize(
    ("words", "message"), [(["--no"], "--no: the original"), (["--out"], "a folder is missing")]
)
def test_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        take_flags(words, VALUED)
