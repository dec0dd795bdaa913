"""The command line in this process, for tests."""

import pytest

from internvl import cli


def call(capsys, *words):
    """(exit code, standard output, standard error) of a command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err
