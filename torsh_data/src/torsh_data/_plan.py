"""Where the rows of a file lie, found by one look at the file and kept in the store.

A plan is a few arrays and an Arrow schema, as a NumPy archive (which has a checksum for each array
and, read with `allow_pickle=False`, holds numbers alone).
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torsh_data._files import DataFile
from torsh_data._index import hash_bytes
from torsh_data._store import Sink, Store

_VERSION = 2
_SCHEMA = "schema"
_DIGEST = "digest"
_SAMPLED = 1 << 16


@dataclass(frozen=True)
class Plan:
    """What one look at a file found."""

    schema: pa.Schema
    digest: str
    """Changes with the contents that were hashed."""
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def make(
        cls, schema: pa.Schema, digest: str, **arrays: Sequence[int] | npt.NDArray[Any]
    ) -> "Plan":
        """A plan of arrays; lists become int64."""
        held = {
            name: value if isinstance(value, np.ndarray) else np.array(value, np.int64)
            for name, value in arrays.items()
        }
        return cls(schema, digest, held)

    @classmethod
    def of(
        cls, file: DataFile, store: Store | None, kind: str, look: Callable[[], "Plan"]
    ) -> "Plan":
        """The plan of a file: from the store if one process of this node has looked before."""
        if store is None:
            return look()
        found: list[Plan] = []

        def make(sink: Sink) -> None:
            found.append(look())
            sink.write(found[-1]._packed())

        key = f"{file.identity}:{kind} plan {_VERSION}"
        content = store.view(key, make, 1 << 12, keep=True).content
        return found[-1] if found else cls._unpacked(content.to_pybytes())

    def _packed(self) -> bytes:
        file = io.BytesIO()
        schema = np.frombuffer(self.schema.serialize(), np.uint8)
        digest = np.frombuffer(self.digest.encode(), np.uint8)
        np.savez(file, **cast("Any", {**self.arrays, _SCHEMA: schema, _DIGEST: digest}))
        return file.getvalue()

    @classmethod
    def _unpacked(cls, content: bytes) -> "Plan":
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = dict(archive)
        schema = pa.ipc.read_schema(pa.py_buffer(arrays.pop(_SCHEMA)))
        return cls(schema, arrays.pop(_DIGEST).tobytes().decode(), arrays)


def sample_bytes(content: pa.Buffer) -> str:
    """A hash of 64 kB at the start, in the middle and at the end of a file.

    To read all of it would take as long as an epoch.
    """
    data, size = memoryview(content), content.size
    if size <= 3 * _SAMPLED:
        return hash_bytes(data)
    starts = (0, (size - _SAMPLED) // 2, size - _SAMPLED)
    return hash_bytes(b"".join(data[start : start + _SAMPLED] for start in starts))
