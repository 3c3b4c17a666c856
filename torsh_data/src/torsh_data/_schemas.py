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
