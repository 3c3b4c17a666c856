"""The columns of a data set of many files."""

from collections.abc import Sequence

import pyarrow as pa

from torsh_data._jsonl_shards import JsonlShard
from torsh_data._shards import IndexedShard, Shard
from torsh_data._tar_shards import TarShard


def shared_schema(shards: Sequence[Shard]) -> pa.Schema:
    """The columns that all shards have; files without a schema of their own may add to them."""
    first = shards[0].schema()
    if all(isinstance(shard, TarShard | JsonlShard) for shard in shards):
        return _united_schema(shards)  # rows without a value have None
    described: set[str] = set()  # shards of one index were written with one schema
    for shard in shards:
        folder = shard.path.rpartition("/")[0]
        if isinstance(shard, IndexedShard) and folder in described:
            continue
        described.add(folder)
        if not shard.schema().equals(first):
            raise ValueError(
                f"{shard.path} has the columns {_describe(shard.schema())}, but {shards[0].path} "
                f"has {_describe(first)}; open them as two data sets"
            )
    return first


def chosen_columns(columns: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The columns that `columns=` chooses out of `names`."""
    if columns is None:
        return list(names)
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"columns={columns!r} must be a list of names, such as {list(names)[:1]}")
    chosen = list(columns)
    if not chosen:
        raise ValueError(f"columns=[] leaves nothing; choose from {list(names)}, or give None")
    for k, name in enumerate(chosen):
        if name not in names:
            raise ValueError(f"columns: no column {name!r}; there are {list(names)}")
        if name in chosen[:k]:
            raise ValueError(f"columns={chosen} has {name!r} twice")
    return chosen


def retyped(schema: pa.Schema, given: pa.Schema | None) -> pa.Schema:
    """A schema with the fields of `given` in place of its own of the same names."""
    wanted = {field.name: field for field in given or ()}
    unknown = [name for name in wanted if name not in schema.names]
    if unknown:
        raise ValueError(f"schema: no column {unknown[0]!r}; there are {schema.names}")
    return pa.schema([wanted.get(field.name, field) for field in schema])


def _united_schema(shards: Sequence[Shard]) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    for shard in shards:
        for field in shard.schema():
            known = fields.setdefault(field.name, field)
            if known.type != field.type:
                numbers = {known.type, field.type} == {pa.int64(), pa.float64()}
                fields[field.name] = pa.field(
                    field.name, pa.float64() if numbers else pa.json_(), metadata=field.metadata
                )
    return pa.schema(list(fields.values()))


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
