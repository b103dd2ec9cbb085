"""What ties a worker to the process that started it, and to nothing else."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def put_on() -> None:
    """Ignore the signals that are meant for the server, and die with it.

    A terminal and a service manager signal every process of the group; the server first lets running work
    finish. When it dies, however that comes, its socket closes, and the thread that reads it ends this
    process. On Linux the system also kills this process, whatever any of its threads does then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def take_channel() -> int:
    """The socket that came as standard input, in a descriptor of its own, so that nobody else reads it."""
    channel = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return channel
