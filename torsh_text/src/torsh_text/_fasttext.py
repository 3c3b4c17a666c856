"""fastText's classifier as a module."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._fasttext_file import FastTextModel, read_fasttext
from ._subwords import Subwords

_EPSILON = 1e-5  # fastText adds it before every logarithm
_NOT_YET = 10**15


def _huffman_children(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the left and right child of each inner node of fastText's tree.

    Nodes below ``len(counts)`` are labels; the last inner node is the root. Ties are broken as in
    fastText, which takes the counts as sorted, reads labels from the end and prefers an inner
    node among equals.

    Example:
        >>> _huffman_children([5, 3, 2])
        [(2, 1), (3, 0)]
    """
    size = len(counts)
    weights = [*counts, *[_NOT_YET] * (size - 1)]
    leaf, node = size - 1, size
    children = []
    for made in range(size, 2 * size - 1):
        pair = []
        for _ in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                pair.append(leaf)
                leaf -= 1
            else:
                pair.append(node)
                node += 1
        weights[made] = weights[pair[0]] + weights[pair[1]]
        children.append((pair[0], pair[1]))
    return children


class HuffmanTree(nn.Module):
    """Hierarchical softmax, level by level for the whole batch.

    Args:
        counts: Label frequencies, which shape the tree.
    """

    order: Tensor
    inner: Tensor
    leaves: Tensor

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        size = len(counts)
        children = _huffman_children(counts)
        level = [2 * size - 2]
        seen: list[int] = []
        inner: list[int] = []
        order: list[int] = []
        self.sizes: list[int] = []
        while level:
            seen.extend(level)
            places = [i for i, node in enumerate(level) if node >= size]
            pairs = [children[level[i] - size] for i in places]
            inner.extend(places)
            order.extend(level[i] - size for i in places)
            self.sizes.append(len(places))
            level = [left for left, _ in pairs] + [right for _, right in pairs]
        place = {node: i for i, node in enumerate(seen)}
        leaves = [place[label] for label in range(size)]
        for name, values in (("order", order), ("inner", inner), ("leaves", leaves)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Return log-probabilities ``(batch, labels)``.

        Args:
            hidden: ``(batch, dim)``.
            output: A vector for each inner node, ``(labels, dim)``; the last is not used.
        """
        right = torch.sigmoid(output.index_select(0, self.order) @ hidden.T)
        go_left, go_right = torch.log(1 - right + _EPSILON), torch.log(right + _EPSILON)
        level = hidden.new_zeros(1, len(hidden))
        levels = [level]
        start = 0
        for size in self.sizes[:-1]:
            part = slice(start, start + size)
            above = level.index_select(0, self.inner[part])
            level = torch.cat([above + go_left[part], above + go_right[part]])
            levels.append(level)
            start += size
        return torch.cat(levels).index_select(0, self.leaves).T


class FastText(nn.Module):
    """A supervised fastText model: mean of n-gram vectors, then a linear classifier.

    Gradients flow to both matrices. The losses are fastText's own, down to the 1e-5 that it adds
    before each logarithm: probabilities may miss 1 in sum by a little.

    Args:
        model: What a file holds.

    Attributes:
        labels: Class names without fastText's ``__label__``.
    """

    def __init__(self, model: FastTextModel) -> None:
        super().__init__()
        self.labels = tuple(label.removeprefix("__label__") for label in model.labels)
        self.loss = model.loss
        self.subwords = Subwords(model)
        self.weight = nn.Parameter(torch.tensor(model.weight))
        self.output = nn.Parameter(torch.tensor(model.output))
        self._settings = {
            field.name: getattr(model, field.name)
            for field in fields(model)
            if field.name not in ("weight", "output")
        }
        self.tree = HuffmanTree(model.counts) if model.loss == "hs" else None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a ``.bin`` or ``.ftz`` file; see :func:`read_fasttext`."""
        return cls(read_fasttext(path)).eval()

    def description(self) -> FastTextModel:
        """Return the model as it is now, trained or not, for writing it to a file."""
        weight, output = (x.detach().float().cpu().numpy() for x in (self.weight, self.output))
        return FastTextModel(**self._settings, weight=weight, output=output)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return fastText's log-probabilities.

        Args:
            ids: Rows of the words and n-grams of all texts, int32 or int64 ``(features,)``.
            offsets: Where each text's rows start, of the same type, ``(texts,)``.

        Returns:
            ``(texts, labels)``; a text without features is scored as the zero vector.
        """
        hidden = F.embedding_bag(ids, self.weight, offsets, mode="mean")
        if self.tree is not None:
            return self.tree(hidden, self.output)
        logits = hidden @ self.output.T
        if self.loss == "softmax":
            return torch.log(logits.softmax(1) + _EPSILON)
        return torch.log(_table_sigmoid(logits) + _EPSILON)


def _table_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid as fastText reads it from a table of steps of 1/32; its gradient is the true one."""
    smooth = torch.sigmoid(x)
    stepped = torch.sigmoid((x.detach() * 32).floor() / 32)
    stepped = stepped.masked_fill(x.detach() < -8, 0.0).masked_fill(x.detach() > 8, 1.0)
    return smooth + (stepped - smooth).detach()
