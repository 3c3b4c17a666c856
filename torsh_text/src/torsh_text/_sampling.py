"""Sampling of tokens whose noise depends on the seed and the prompt, not on the batch."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03


def _signed(value: int) -> int:
    """The same 64 bits as a number that an int64 tensor takes."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without dragging the sign along."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def stream_key(seed: int, tokens: Sequence[int], stream: int) -> int:
    """Key of the noise for one row: the same on every machine, whatever else is in the batch."""
    content = f"{seed}:{stream}:{','.join(map(str, tokens))}".encode()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform_noise(keys: Tensor, step: int, size: int) -> Tensor:
    """Uniform numbers in (0, 1) from counters: float64 ``(keys, size)``.

    Args:
        keys: int64 ``(rows,)``.
        step: Which draw.
        size: Numbers a row.

    Reference:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (SplitMix64);
        the mixing constants are Stafford's variant 13.
    """
    counter = torch.arange(1, size + 1, device=keys.device) * _signed(_GOLDEN)
    x = _mixed(keys + _signed(_STEP * (step + 1))).unsqueeze(1) + counter
    return (_shift_right(_mixed(x), 11).double() + 0.5) * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


class SeededSampling:
    """Turns greedy search into sampling: a logits processor of transformers.

    The largest of ``scores / temperature + Gumbel noise`` is a sample of
    ``softmax(scores / temperature)``. The noise of a row comes from its key alone, so a prompt's
    sample does not change with the prompts beside it, with their order, or with the device.

    Args:
        keys: One for each row, int64 ``(rows,)``.
        temperature: Above 0; less than 1 prefers likely tokens.
        top_p: Keep the most likely tokens that reach this probability together.

    Reference:
        Gumbel, "Statistical Theory of Extreme Values", 1954; Holtzman et al., "The Curious Case of
        Neural Text Degeneration", 2020, arXiv:1904.09751 (``top_p``).
    """

    def __init__(self, keys: Tensor, *, temperature: float, top_p: float) -> None:
        self._keys = keys
        self._temperature = temperature
        self._top_p = top_p
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return noisy scores ``(rows, vocabulary)``."""
        scores = scores.float() / self._temperature
        if self._top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            drop = torch.zeros_like(before, dtype=torch.bool).scatter(
                -1, order, before >= self._top_p
            )
            scores = scores.masked_fill(drop, -torch.inf)
        noise = uniform_noise(self._keys, self._step, scores.shape[-1])
        self._step += 1
        return scores - (-noise.log()).log().float()


class FiniteGuard:
    """Remembers, without waiting for the device, which rows ever had a score that is no number."""

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` as they are."""
        found = scores.isnan().any(-1)
        self.broken = found if self.broken is None else self.broken | found
        return scores
