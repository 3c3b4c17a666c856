"""What a server says of a data set, kept for when it cannot be reached."""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from torsh_data._files import UnreachableError
from torsh_data._store import Sink, Store


def ask(store: Store, question: str, server: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """A server's answer, or its last one while it cannot be reached.

    Args:
        store: Where the last answer is kept.
        question: What the answer belongs to.
        server: Gives the answer, which is JSON.

    Raises:
        UnreachableError: If there is no last answer either.
    """
    key = f"answer to {question}"
    try:
        answer = server()
    except UnreachableError as error:
        last = _last(store, key)
        if last is None:
            raise UnreachableError(
                f"{error}; the cache in {store.folder} does not know this data set, so it cannot "
                "be opened without its server"
            ) from error
        warnings.warn(
            f"{error}; going on with the data set as it was opened last, as far as the cache in "
            f"{store.folder} holds it",
            stacklevel=2,
        )
        return json.loads(last)
    content = json.dumps(answer).encode()
    if _last(store, key) != content:
        store.forget(key, keep=True)
        store.prepare(key, partial(_write, content), len(content), keep=True)
    return answer


class _UnknownError(LookupError):
    """There is no last answer."""


def _last(store: Store, key: str) -> bytes | None:
    if not store.has(key, keep=True):
        return None
    try:
        return store.view(key, _refuse, 0, keep=True).content.to_pybytes()
    except _UnknownError:  # it was damaged, or has just made room
        return None


def _refuse(_: Sink) -> NoReturn:
    raise _UnknownError


def _write(content: bytes, sink: Sink) -> None:
    sink.write(content)
