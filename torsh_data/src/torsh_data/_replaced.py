"""Samples that were replaced: the data sets that know them, and their ids in a loader's state."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch.utils.data import Dataset

from torsh_data._dataset import ShardedDataset

_BEFORE = "replaced before the state was saved"


def sharded_in(dataset: Dataset[Any]) -> list[ShardedDataset]:
    """The sharded data sets that a data set reads, each once, in the order of its parts.

    Looks through what torch's `Subset`, `ConcatDataset` and `StackDataset` and a `Mixture` or
    `SampleCache` are made of: their `dataset` or `datasets`.
    """
    found: list[ShardedDataset] = []
    seen: set[int] = set()

    def walk(part: object) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part, ShardedDataset):
            found.append(part)
            return
        inner: Any = getattr(part, "datasets", None)
        inner = list(inner.values()) if isinstance(inner, Mapping) else inner
        for each in inner if isinstance(inner, Sequence) and not isinstance(inner, str) else ():
            walk(each)
        if hasattr(part, "dataset"):
            walk(part.dataset)

    walk(dataset)
    return found


def pack_errors(datasets: Sequence[ShardedDataset]) -> str:
    """The ids of what was replaced, as runs, data set by data set; empty if there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> pack_errors([SimpleNamespace(errors={9: "", 4: "", 3: "", 5: ""})])
        '3-5,9'
    """
    if not any(dataset.errors for dataset in datasets):
        return ""
    return ";".join(",".join(_runs(sorted(dataset.errors))) for dataset in datasets)


def _runs(ids: list[int]) -> Iterator[str]:
    # places before which a run begins, and the end
    begins = [k for k, n in enumerate(ids) if k == 0 or n != ids[k - 1] + 1]
    for begin, end in pairwise([*begins, len(ids)]):
        first, last = ids[begin], ids[end - 1]
        yield f"{first}" if first == last else f"{first}-{last}"


def add_packed(packed: object, datasets: Sequence[ShardedDataset]) -> None:
    """Let data sets that substitute know, and count, what a state says was replaced.

    Raises:
        ValueError: If it does not say that of these data sets, or it is more than a data set's
            `max_errors`; nothing is changed then.
    """
    if packed == "":
        return
    try:
        texts = packed.split(";") if isinstance(packed, str) else []
        ids = [_unpack(text, len(d)) for text, d in zip(texts, datasets, strict=True)]
    except ValueError:
        raise ValueError(
            f"state_dict has errors={packed!r}, not sample ids of the {len(datasets)} sharded data "
            "set(s) read here; set it to '' to go on without them"
        ) from None
    tolerant = [(d, new) for d, new in zip(datasets, ids, strict=True) if d.on_error != "raise"]
    for dataset, new in tolerant:
        count = len(new.union(dataset.errors))
        if count > dataset.max_errors:
            raise ValueError(
                f"state_dict has errors={packed!r}: that makes {count} bad samples, more than "
                f"max_errors={dataset.max_errors}; allow more, or mend the files and set it to ''"
            )
    for dataset, new in tolerant:
        dataset.errors.update(dict.fromkeys(sorted(new.difference(dataset.errors)), _BEFORE))


def _unpack(text: str, rows: int) -> set[int]:
    ids: set[int] = set()
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        begin, end = int(first), int(last or first)
        if not 0 <= begin <= end < rows:
            raise ValueError(run)
        ids.update(range(begin, end + 1))
    return ids


class Reports:
    """What a worker process has replaced and its parent does not know yet."""

    def __init__(self, datasets: Iterable[ShardedDataset]) -> None:
        self._datasets = list(datasets)
        self._told = [set[int](dataset.errors) for dataset in self._datasets]

    def take(self) -> list[dict[int, str]]:
        """What is new, data set by data set; empty if nothing is."""
        if all(len(d.errors) == len(t) for d, t in zip(self._datasets, self._told, strict=True)):
            return []
        new = []
        for dataset, told in zip(self._datasets, self._told, strict=True):
            new.append({k: why for k, why in dataset.errors.items() if k not in told})
            told.update(new[-1])
        return new
