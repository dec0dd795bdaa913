"""What a launcher tells each rank through its environment, and what a rank tells its launcher.

Imports no torch: a rank follows its launcher from the first second on.
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

PARENT = "INTERNVL_LAUNCHER"
"""Variable with the process id of `internvl train`, in the ranks that it starts."""
ERROR_FILE = "TORCHELASTICERROR_FILE"
"""Variable with the file for a rank's last words; torchrun sets it too, and prints them."""
_POLL_S = 0.5
_TIME_TO_SAVE_S = 60.0


def has_parent() -> bool:
    """True in a rank that `internvl train` has started."""
    return PARENT in os.environ


def report(sentence: str, code: int, *, lost_peer: bool = False) -> None:
    """Leaves the sentence that ends this rank to its launcher, if there is one that reads it.

    Args:
        code: exit code.
        lost_peer: another rank's end is the cause.
    """
    file = os.environ.get(ERROR_FILE)
    if not file:
        return
    now_s = time.time()
    # torchrun reads the first two.
    words = {"message": sentence, "timestamp": int(now_s), "time_s": now_s}
    words |= {"code": code, "lost_peer": lost_peer}
    # On a full disk the sentence still stands on standard error.
    with suppress(OSError):
        Path(file).write_text(json.dumps(words), encoding="utf-8")


def host() -> str:
    """Returns this machine's name."""
    return socket.gethostname()


def follow_parent() -> None:
    """Watches the launcher from a thread: when it dies, this rank is asked to stop, then ended.

    Only for ranks of `internvl train` and torchrun, which nothing else would end.
    """
    if PARENT in os.environ:
        parent = int(os.environ[PARENT])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
    else:
        return
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    threading.Thread(target=_follow, args=(parent,), name=_THREAD, daemon=True).start()


_THREAD = "internvl-launcher"


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    # As a scheduler would: a run in its steps saves, anything else ends here.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TIME_TO_SAVE_S)
    os._exit(1)
