"""Worker processes that end with the process that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(worker: int = 0) -> None:
    """Let the kernel end this worker process when its parent ends, even by `kill -9`.

    Also what a `DataLoader` needs as `worker_init_fn`: its workers look every five seconds whether
    their parent has changed, and one whose parent was killed before its first look lives forever.
    """
    del worker
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    own_child = multiprocessing.get_start_method() != "forkserver"  # else the server's child
    if parent is not None and own_child and os.getppid() != parent.pid:  # it was too late to ask
        os._exit(1)
