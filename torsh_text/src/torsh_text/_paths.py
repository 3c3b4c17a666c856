"""The best path of tags through each of many sequences of scores, of any lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the tag of what has none, as in torch.nn.functional.cross_entropy


class Paths(NamedTuple):
    """The best tags of each sequence and their score.

    Attributes:
        tags: Tag indices, int64, shaped like the scores without their last dimension; -100 in
            padding.
        scores: Score of each path ``(rows,)``.
    """

    tags: Tensor
    scores: Tensor


@dataclass(frozen=True)
class TimeSteps:
    """Ragged sequences step by step: rows sorted by length, so that no step computes padding.

    Attributes:
        order: Rows that are not empty, the longest first.
        sizes: Rows still running at each step.
        where: Index of each step's rows in the sequences laid end to end, step after step.
    """

    order: np.ndarray
    sizes: list[int]
    where: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "TimeSteps":
        """Lay out sequences of these lengths."""
        sizes = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
        longest = int(sizes.max(initial=0))
        # how many rows are longer than each step
        running = len(order) - np.searchsorted(np.sort(sizes[order]), np.arange(longest), "right")
        starts = (np.cumsum(sizes) - sizes)[order]
        steps = np.repeat(np.arange(longest), running)
        rows = np.arange(len(steps)) - np.repeat(np.cumsum(running) - running, running)
        return cls(order, running.tolist(), starts[rows] + steps)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Cut ``(tokens, ...)`` into one tensor for each step."""
        where = torch.from_numpy(self.where).to(flat.device, non_blocking=True)
        return flat.index_select(0, where).split(self.sizes)


def checked_lengths(scores: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """Return the length of each sequence of packed or padded scores.

    Raises:
        ValueError: If the lengths do not fit the scores.
    """
    if scores.ndim not in (2, 3):
        raise ValueError(
            f"emissions has shape {tuple(scores.shape)}; use (rows, length, tags) if padded or"
            " (tokens, tags) if packed"
        )
    if lengths is None:
        if scores.ndim == 2:
            raise ValueError("packed emissions (tokens, tags) need lengths, one for each row")
        return [scores.shape[1]] * scores.shape[0]
    found = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if any(not isinstance(n, int) or n < 0 for n in found):
        raise ValueError(f"lengths={found[:5]} holds what is no length; use mask.sum(1) of a mask")
    if scores.ndim == 2 and sum(found) != len(scores):
        raise ValueError(f"lengths add up to {sum(found)}, emissions has {len(scores)} tokens")
    if scores.ndim == 3 and (len(found) != len(scores) or max(found, default=0) > scores.shape[1]):
        raise ValueError(
            f"lengths has {len(found)} rows of up to {max(found, default=0)} tokens, emissions is"
            f" {tuple(scores.shape)}"
        )
    return found


def real_places(shape: torch.Size, lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Where the tokens lie in a flattened padded batch; None if nothing is padded."""
    if all(length == shape[1] for length in lengths):
        return None
    mask = np.arange(shape[1]) < np.asarray(lengths).reshape(-1, 1)
    return torch.from_numpy(np.flatnonzero(mask)).to(device, non_blocking=True)


def packed(x: Tensor, lengths: Sequence[int], dims: int) -> Tensor:
    """Lay sequences end to end: ``(rows, length, ...)`` without its padding, or as it is.

    Args:
        x: The sequences, padded or already packed.
        lengths: Length of each.
        dims: Dimensions of ``x`` if it is packed.
    """
    if x.ndim == dims:
        return x
    places = real_places(x.shape, lengths, x.device)
    flat = x.flatten(0, 1)
    return flat if places is None else flat.index_select(0, places)


def best_paths(
    emissions: Tensor,
    lengths: Sequence[int],
    transitions: Tensor,
    first: Tensor,
    last: Tensor,
) -> Paths:
    """Find the tags of highest total score of each sequence (Viterbi), without gradients.

    Args:
        emissions: Score of each tag for each token, packed ``(tokens, tags)``.
        lengths: Tokens of each sequence; 0 is legal.
        transitions: Score of tag j behind tag i ``(tags, tags)``.
        first: Score of each tag at the beginning ``(tags,)``.
        last: Score of each tag at the end ``(tags,)``.

    Returns:
        Tags ``(tokens,)`` and scores ``(rows,)``.
    """
    steps = TimeSteps.of(lengths)
    tags = torch.empty(len(emissions), dtype=torch.int64, device=emissions.device)
    scores = emissions.new_zeros(len(lengths))
    if not steps.sizes:
        return Paths(tags, scores)
    pointers: list[Tensor] = []
    running: Tensor | None = None
    ended: list[Tensor] = []
    for emission in steps.split(emissions):
        if running is None:
            running = first + emission
            continue
        if len(emission) < len(running):
            ended.append(running[len(emission) :])
        paths = running[: len(emission)].unsqueeze(2) + transitions
        best, pointer = paths.max(1)
        pointers.append(pointer)
        running = best + emission
    assert running is not None
    totals, final = (torch.cat([running, *reversed(ended)]) + last).max(1)
    order = torch.from_numpy(steps.order).to(emissions.device)
    scores[order] = totals
    tag = final[: steps.sizes[-1]]
    backwards = [tag]
    for size, pointer in zip(reversed(steps.sizes[:-1]), reversed(pointers), strict=True):
        tag = torch.cat([pointer.gather(1, tag.unsqueeze(1)).squeeze(1), final[len(tag) : size]])
        backwards.append(tag)
    where = torch.from_numpy(steps.where).to(emissions.device)
    tags[where] = torch.cat(backwards[::-1])
    return Paths(tags, scores)
