"""Data sets with a length and an index, and what is taken for them."""

import os


def require_map_style(dataset: object, argument: str, call: str) -> None:
    """Refuse what is no map-style data set.

    Args:
        dataset: What was given.
        argument: The name under which it was.
        call: What it was given to.

    Raises:
        TypeError: If it has no length or index, or is a path.

    Example:
        >>> require_map_style("shards", "dataset", "SampleCache")
        Traceback (most recent call last):
        TypeError: dataset='shards' is a path; give SampleCache a ShardedDataset('shards')
    """
    if isinstance(dataset, (str, bytes, os.PathLike)):
        path = os.fspath(dataset)
        raise TypeError(f"{argument}={path!r} is a path; give {call} a ShardedDataset({path!r})")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{argument} is a {type(dataset).__name__} without a length and an index; {call} needs "
            "a map-style data set, such as a ShardedDataset"
        )
