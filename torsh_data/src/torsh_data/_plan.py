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
from torsh_data._store import Sink, Store

_VERSION = 1
_SCHEMA = "schema"


@dataclass(frozen=True)
class Plan:
    """What one look at a file found."""

    schema: pa.Schema
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def make(cls, schema: pa.Schema, **arrays: Sequence[int] | npt.NDArray[Any]) -> "Plan":
        """A plan of arrays; lists become int64."""
        held = {
            name: value if isinstance(value, np.ndarray) else np.array(value, np.int64)
            for name, value in arrays.items()
        }
        return cls(schema, held)

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
        np.savez(file, **cast("Any", {**self.arrays, _SCHEMA: schema}))
        return file.getvalue()

    @classmethod
    def _unpacked(cls, content: bytes) -> "Plan":
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = dict(archive)
        return cls(pa.ipc.read_schema(pa.py_buffer(arrays.pop(_SCHEMA))), arrays)
