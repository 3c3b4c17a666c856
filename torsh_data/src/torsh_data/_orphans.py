"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait


def die_with_parent(worker: int = 0) -> None:
    """Kill this worker process when its parent ends, even by `kill -9`.

    Also what a `DataLoader` needs as `worker_init_fn`: its workers look every five seconds whether
    their parent has changed, and one whose parent was killed before its first look lives forever.
    (The kernel's own signal for this, PR_SET_PDEATHSIG, comes when the *thread* ends that started
    the worker.)
    """
    del worker
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    try:
        ends = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # not in this kernel or container
        ends = parent.sentinel
    threading.Thread(target=_follow, args=(ends,), daemon=True, name="torsh_data parent").start()


def _follow(ends: int) -> None:
    wait([ends])
    os.kill(os.getpid(), signal.SIGKILL)
