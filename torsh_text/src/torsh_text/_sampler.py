"""Batches for training, planned by tokens: a batch sampler and the collate function beside it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ._classify import Classifier
from ._labels import number_of
from ._packing import plan_batches
from ._token_model import TokenModel

_FORMAT = "torsh-text-sampler"
_VERSION = 2
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_POOL = 64  # batches whose rows are sorted together: 1 to 4 % padding, and still well mixed


class TokenBudgetSampler(Sampler[list[int]]):
    """Batch sampler that fills batches up to a number of tokens, not of rows.

    Rows are shuffled, sorted by length within pools of about 64 batches, cut into batches and the
    batches shuffled. The order depends on the seed and the epoch only, so ranks agree without
    talking and a run can go on in the middle of an epoch. All ranks get equally many batches;
    where they do not divide, the first ones are used once more, as ``DistributedSampler`` does.

    Give it to a ``DataLoader`` as ``batch_sampler``. A loader with workers asks for batches ahead
    of the training loop: save ``state_dict(done)`` with the number of batches trained on in this
    epoch, which :meth:`state_dict` without a number only knows without workers.

    Args:
        lengths: Tokens of each row.
        max_tokens: Most tokens in a batch; a longer row gets a batch of its own.
        shuffle: Whether to shuffle; otherwise the longest rows come first.
        seed: Seed of all epochs.
        rank: Number of this process.
        world_size: Number of processes.
        max_rows: Most rows in a batch.
        padded: Whether batches will be padded, so that padding counts.

    Raises:
        TypeError: If ``lengths`` are no numbers.
        ValueError: If an argument is out of range.

    Example:
        >>> sampler = TokenBudgetSampler([5, 2, 9, 3], max_tokens=10, shuffle=False)
        >>> list(sampler)
        [[2], [0, 3, 1]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Tensor,
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_rows: int = 8192,
        padded: bool = False,
    ) -> None:
        try:
            self.lengths = np.asarray(lengths, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                "lengths has to be a list of the numbers of tokens of each row, such as"
                " [len(ids) for ids in tokenizer(texts)['input_ids']]"
            ) from error
        if self.lengths.ndim != 1 or not len(self.lengths) or self.lengths.min() < 1:
            raise ValueError("lengths has to be a list of positive numbers of tokens, not empty")
        if max_tokens < 1 or max_rows < 1:
            raise ValueError(f"max_tokens={max_tokens} and max_rows={max_rows} have to be positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not between 0 and world_size={world_size} - 1")
        self.max_tokens, self.max_rows, self.padded = max_tokens, max_rows, padded
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._start = 0
        self._given = 0
        self._plan: tuple[int, list[list[int]]] | None = None

    def _batches(self) -> list[list[int]]:
        """All batches of this epoch, the same in every process."""
        if self._plan is None or (self.shuffle and self._plan[0] != self.epoch):
            self._plan = (self.epoch, self._planned())
        return self._plan[1]

    def _planned(self) -> list[list[int]]:
        limits: dict[str, Any] = {"max_tokens": self.max_tokens, "max_rows": self.max_rows}
        limits["padded"] = self.padded
        if not self.shuffle:
            return [batch.tolist() for batch in plan_batches(self.lengths, **limits)]
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        rows_of_a_batch = min(self.max_rows, max(1, int(self.max_tokens / self.lengths.mean())))
        pool = _POOL * rows_of_a_batch
        batches = [
            order[start : start + pool][batch].tolist()
            for start in range(0, len(order), pool)
            for batch in plan_batches(self.lengths[order[start : start + pool]], **limits)
        ]
        return [batches[i] for i in random.permutation(len(batches))]

    def __len__(self) -> int:
        """Return the number of batches this process gets in this epoch."""
        return -(-len(self._batches()) // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield row numbers of each batch, from where a loaded state left off."""
        batches = self._batches()
        start, self._start = self._start, 0
        self._given = start
        for step in range(start, len(self)):
            self._given = step + 1
            yield batches[(step * self.world_size + self.rank) % len(batches)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs through, from its beginning."""
        if epoch != self.epoch:
            self.epoch, self._start, self._given = epoch, 0, 0

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Return what continues this run, with any number of processes that divides the same way.

        Args:
            done: Batches of this epoch that this process has trained on; None for those handed out.
        """
        done = self._given if done is None else done
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "done": done * self.world_size,
            **self._planned_from(),
        }

    def _planned_from(self) -> dict[str, Any]:
        """What decides, beside seed and epoch, which rows the batches hold."""
        content = np.ascontiguousarray(self.lengths, "<i8").data
        return {
            "rows": len(self.lengths),
            "max_tokens": self.max_tokens,
            "max_rows": self.max_rows,
            "padded": self.padded,
            "shuffle": self.shuffle,
            "lengths": hashlib.blake2b(content, digest_size=16).hexdigest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: If the state is of another kind, of other data or options, or cannot be
                divided.
        """
        if state.get("format") != _FORMAT or state.get("version") != _VERSION:
            raise ValueError(
                f"this is no state of a TokenBudgetSampler of version {_VERSION}: format="
                f"{state.get('format')!r}, version={state.get('version')!r}"
            )
        for key, own in self._planned_from().items():
            if state[key] != own:
                what = "other lengths" if key == "lengths" else f"{key}={state[key]}"
                raise ValueError(f"the state was taken with {what}, here it is {own}")
        if state["done"] % self.world_size:
            raise ValueError(
                f"{state['done']} batches are done, which world_size={self.world_size} does not"
                " divide; go on with a divisor of the old number of processes"
            )
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._plan = None
        self._start = self._given = state["done"] // self.world_size


class Collator:
    """Collate function: texts to a batch for ``model(batch)``, with labels if there are any.

    Batches are those of ``model.pack``: with the model's default prompt, if it has one, and with a
    warning where texts beyond ``max_length`` are cut. Holds the tokenizer only, so workers of a
    ``DataLoader`` do not copy the model.

    A label is a number, a tensor or list of numbers, or the name of one of a classifier's labels.

    Args:
        model: Encoder or classifier. A tagger's sentences are made into batches by
            :meth:`Tagger.collate`.
        packed: Give a :class:`torsh_text.PackedBatch`; otherwise a padded dictionary of tensors.

    Returns:
        For texts the batch; for ``(text, label)`` pairs the batch and a tensor of the labels.

    Raises:
        TypeError: If an item is neither a string nor such a pair, or labels make no tensor.
        ValueError: If there are no items, or a label's name or number is none of the model's.
    """

    def __init__(self, model: TokenModel, *, packed: bool = True) -> None:
        if not isinstance(model, TokenModel):
            raise TypeError(
                f"model is a {type(model).__name__}; pass an Encoder or Classifier, such as"
                " Encoder.from_pretrained(name)"
            )
        self._pack = model.packer
        self._pad_id = model.pad_id
        self._packed = packed
        names = model.labels if isinstance(model, Classifier) else []
        self._places = {name: number for number, name in enumerate(names)}

    def __call__(self, items: Sequence[Any]) -> Any:
        labelled = bool(items) and not isinstance(items[0], str)
        for index, item in enumerate(items):
            if labelled and (not isinstance(item, (tuple, list)) or len(item) != 2):
                raise TypeError(
                    f"items[{index}] is {item!r}, neither a string nor a (text, label) pair"
                )
        batch: Any = self._pack([item[0] for item in items] if labelled else items)
        if not self._packed:
            batch = batch.padded(self._pad_id)
        if not labelled:
            return batch
        return batch, self._stacked([item[1] for item in items])

    def _stacked(self, labels: list[Any]) -> Tensor:
        if all(isinstance(label, Tensor) for label in labels):
            return self._checked(torch.stack(labels), labels)
        for index, label in enumerate(labels):
            if isinstance(label, str) and not self._places:
                raise TypeError(
                    f"items[{index}] has the label {label!r}; names are for classifiers, which know"
                    " them, so pass numbers"
                )
            if isinstance(label, str):
                labels[index] = number_of(label, self._places, f"items[{index}] has")
        try:
            stacked = torch.tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"labels such as {labels[0]!r} make no tensor ({error}); pass a name or number for"
                " each text, or equally long lists of numbers"
            ) from error
        return self._checked(stacked, labels)

    def _checked(self, stacked: Tensor, labels: Sequence[Any]) -> Tensor:
        """Refuse numbers that are no place among the labels of a classifier with several."""
        count = len(self._places)
        if count < 2 or stacked.ndim != 1:
            return stacked
        for index, label in enumerate(labels):
            whole = not isinstance(label, bool) and hasattr(label, "__index__")
            whole &= not isinstance(label, Tensor) or label.dtype in _WHOLE
            if not whole or not 0 <= int(label) < count:
                raise ValueError(
                    f"items[{index}] has the label {label!r}; the model has {count} labels, so"
                    f" pass a name or a whole number from 0 to {count - 1}"
                )
        return stacked
