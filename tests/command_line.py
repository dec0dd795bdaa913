"""The command line in this process or on a terminal, for tests."""

import fcntl
import os
import pty
import struct
import subprocess
import termios

import pytest

from internvl import cli


def call(capsys, *words):
    """(exit code, standard output, standard error) of a command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def on_terminal(command, folder):
    """What a command writes on a terminal of 80 columns that it has to itself, in `folder`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, cwd=folder, **ends) as process:
        os.close(theirs)
        written = b""
        # EIO instead of an end of the file: the last process has closed the terminal.
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:
                break
            if not block:
                break
            written += block
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()
