"""Parts of a data set written by processes of their own."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, cast

import torch

from torsh_data._orphans import die_with_parent

if TYPE_CHECKING:
    from torsh_data._writer import Job


def run_parts(job: "Job", parts: int, advance: Callable[[int], None]) -> None:
    """Write all parts, each in a worker process; the first that fails ends the others."""
    context = multiprocessing.get_context()
    workers: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        for part in range(parts):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, part, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a worker's end is seen, and later ones do not inherit it
            workers[ours] = (part, process)
        waiting = dict(workers)
        while waiting:
            for pipe in wait(list(waiting)):
                connection = cast("Connection", pipe)
                part, process = waiting[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    del waiting[connection]
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(_how_it_ended(part, process.exitcode)) from None
                    continue
                if isinstance(message, BaseException):
                    raise message
                advance(message)
    finally:
        for pipe, (_, process) in workers.items():
            process.kill()  # no harm to what is finished
            process.join()
            pipe.close()


def _how_it_ended(part: int, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return (
        f"worker {part} {how}, for instance because memory ran out; the same call goes on behind "
        "the finished shards"
    )


def _work(job: "Job", part: int, pipe: Connection) -> None:
    from torsh_data._writer import write_part

    die_with_parent()
    torch.set_num_threads(1)
    try:
        write_part(job, part, pipe.send)
    except KeyboardInterrupt:  # the main process has got it, too
        return
    except BaseException as error:
        _send_error(pipe, part, error)


def _send_error(pipe: Connection, part: int, error: BaseException) -> None:
    lines = "".join(traceback.format_exception(error)).rstrip()
    error.__traceback__ = error.__cause__ = error.__context__ = None
    error.add_note(f"In worker {part}:\n{lines}")
    try:
        pipe.send(error)
    except Exception:  # an exception that cannot be pickled
        pipe.send(RuntimeError(f"worker {part} failed:\n{lines}"))
