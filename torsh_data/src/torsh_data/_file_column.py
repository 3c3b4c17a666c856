"""Hugging Face's columns of pictures and sounds, a file's bytes and its path, read as the bytes."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from torsh_data._columns import Getter


def as_read(schema: pa.Schema) -> pa.Schema:
    """The columns as they are read: those of files hold their bytes."""
    fields = [
        pa.field(field.name, pa.binary()) if _holds_files(field.type) else field for field in schema
    ]
    return pa.schema(fields, metadata=schema.metadata)


def _holds_files(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.num_fields != 2:
        return False
    held = {kind.field(n).name: kind.field(n).type for n in range(2)}
    return held == {"bytes": pa.binary(), "path": pa.string()}


def file_getter(array: pa.Array, *, is_local: bool) -> Getter | None:
    """A function row -> bytes over one block's column, None if it is not one of files.

    Args:
        array: The column.
        is_local: Whether a path without bytes is one of this machine and may be read.
    """
    if not _holds_files(array.type):
        return None
    names = [array.type.field(n).name for n in range(2)]
    held = dict(zip(names, array.flatten(), strict=True))

    def get(row: int) -> Any:
        content = held["bytes"][row].as_py()
        path = held["path"][row].as_py() if content is None and is_local else None
        return content if path is None else Path(path).read_bytes()

    return get
