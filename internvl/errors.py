"""The family of errors that a user can put right, and the sentence for every other exception.

Imports nothing of the package: every part may use it.
"""

import errno
import os
from collections.abc import Mapping
from typing import Any

_LONGEST_LINE = 300  # characters of a foreign exception that are shown


class UserError(ValueError):
    """Something a user can put right; its text is the whole message, remedy included."""


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Formats a count with its noun in the singular or plural: "1 problem", "1,066 problems".

    Args:
        nouns: the plural if it is not `noun` with an s.
    """
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def one_line(text: str) -> str:
    """Escapes control characters, with which a file's name could steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def explain(error: BaseException) -> str:
    """Returns the message for an exception to somebody who does not read tracebacks.

    Files that cannot be read or written are named with a remedy, and memory that ran out with what
    to lower. What is none of these is a bug, and said to be one.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _explain_os(error)
    if isinstance(error, MemoryError):
        reason = _bracketed(error)
        return f"memory ran out{reason}; close other programs, or lower what is held at once"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return (
            f"the GPU's memory ran out{_bracketed(error)}; lower the batch size or the number of "
            "tiles, choose bfloat16, or use another GPU"
        )
    if isinstance(error, ImportError):
        reason = _bracketed(error)
        return f"a package is missing or broken{reason}; `internvl doctor` says how to get it"
    # Last: torch's OutOfMemoryError is a RuntimeError too. This rank is only the messenger.
    if lost_peer(error):
        if _PEER_HANGS in str(error):
            return (
                "another process of this run does not get on; the log tells which one, and the "
                "folder `watchdog` of the run what it did. The same command goes on from the last "
                "checkpoint"
            )
        return "another process of this run ended; its own last line, above or in its log, says why"
    return _explain_bug(error)


_PEER_HANGS = "Timed out waiting"
_PEER_GONE = ("by peer", "Broken pipe", _PEER_HANGS, "Connection refused")
"""Words of gloo, NCCL and torch's store: "Connection closed by peer [127.0.0.1]:3124"."""


def lost_peer(error: BaseException) -> bool:
    """True if an exception only says that another process of the run ended or hangs."""
    if isinstance(error, OtherRankFailed):
        return True
    text = str(error)
    is_torch = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    return is_torch and any(words in text for words in _PEER_GONE)


_REMEDIES = {
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.EACCES: "permission denied; allow it (`ls -l` shows who may) or choose another place",
    errno.EPERM: "the operation is not permitted; choose another place or ask its owner",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOSPC: "the disk is full; free some space and start the same command again",
    errno.EDQUOT: "your quota is used up; free some space and start the same command again",
    errno.EFBIG: "the file grows too large for this disk or your limits (`ulimit -f`); raise them",
    errno.EISDIR: "this is a folder, and a file is expected; check the path",
    errno.ENOTDIR: "this is a file or lies below one, and a folder is expected; check the path",
    errno.EEXIST: "this is there already; choose another name or move it away",
    errno.ENOTEMPTY: "this is not empty; choose another folder or move its files away",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "this links to itself; remove the link",
    errno.EMFILE: "too many files are open at once; raise the limit (`ulimit -n 65536`) or lower "
    "data.workers",
    errno.ENFILE: "too many files are open on this machine; close other programs",
    errno.ENOMEM: "memory ran out; close other programs, or lower what is held at once",
    errno.EIO: "the disk or network drive cannot be read or written; check it, then start again",
    errno.ESTALE: "the network drive has lost this file; mount it again, then start again",
    errno.ETXTBSY: "this is in use by another program; close it",
    errno.EBUSY: "this is in use by another program; close it",
    errno.EXDEV: "this cannot be moved to another disk; choose a folder on the same one",
    errno.EADDRINUSE: "the port is in use; choose another one",
    errno.ECONNREFUSED: "nothing answers there; check the address, the network and the proxy",
    errno.ENETUNREACH: "the network cannot be reached; check it and the proxy",
    errno.EPIPE: "what reads at the other end is gone; look why it ended and start again",
    errno.ETIMEDOUT: "no answer in time; check the network and start the same command again",
}
"""What an error number of the operating system means here, and what to do."""


def _explain_os(error: OSError) -> str:
    """Returns path, meaning and remedy."""
    path = error.filename
    meaning = _REMEDIES.get(error.errno or 0)
    # Libraries raise OSErrors of their own, which have a text but no error number.
    if meaning is None:
        meaning = f"{error.strerror or _first_line(error) or type(error).__name__}; check the file"
    if path is None:
        return f"a file cannot be read or written: {meaning} (--debug shows where)"
    return f"{os.fsdecode(path) if isinstance(path, str | bytes) else path}: {meaning}"


def _explain_bug(error: BaseException) -> str:
    """Returns the message for an unforeseen exception, with the sample it was about if noted."""
    # A note of several lines would not fit into the one line of this message.
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
    summary = ": ".join(filter(None, (type(error).__name__, _first_line(error))))
    summary = ", ".join([summary, *notes[:1]])
    return f"{summary}. This is a bug in internvl: --debug shows where; please report it"


def _bracketed(error: BaseException) -> str:
    text = _first_line(error)
    return f" ({text})" if text else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:_LONGEST_LINE] if lines else ""


class ConfigError(UserError):
    """Everything that is wrong with a recipe, one line each."""


class DataError(UserError):
    """Data that cannot be used at all, such as a missing annotation file."""


class BadSample(UserError):
    """A sample that cannot be trained on: its name (file and line), the reason, the remedy."""

    def __init__(self, name: str, reason: str, needs: Mapping[str, int] | None = None) -> None:
        """
        Args:
            needs: a recipe's keys -> the smallest values with which the sample would be good.
        """
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.needs = dict(needs or {})

    def __reduce__(self) -> tuple[Any, ...]:  # loader workers send it through a pipe
        return BadSample, (self.name, self.reason, self.needs)


class BadImage(UserError):
    """An image or video that cannot be read: the reason, in words a user can act on."""


class ImageTooLarge(BadImage):
    """An image of more pixels than are decoded."""


class WorkerDied(DataError):
    """A process that reads data is gone; the text says why, most likely, and what to do."""


class ModelFolderError(UserError):
    """A model folder that cannot be used: which file, why, and what to do."""


class RunError(UserError):
    """A run that cannot start or go on; its text says what to do."""


class CheckpointError(UserError):
    """A checkpoint that could not be written or read; earlier ones are untouched."""


class ExportError(UserError):
    """An export that cannot be written, or that does not compute what the model does."""


class Interrupted(UserError):
    """Stopped by the user; what was reached is saved."""


class OtherRankFailed(UserError):
    """Another rank of the same command failed, with this text, and says so itself."""


class RanksFailed(RunError):
    """Processes that were started together have failed; the text names the first and its reason."""

    def __init__(self, sentence: str, code: int) -> None:
        """
        Args:
            code: exit code of that process.
        """
        super().__init__(sentence)
        self.code = code


class UnknownModel(UserError):
    """No released model has this name; the message names the nearest ones."""


class UnknownGpu(UserError):
    """No GPU of this name is in the table; the message lists those that are."""
