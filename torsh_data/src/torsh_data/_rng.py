"""Random numbers that are a pure function of (seed, epoch, sample, draw).

A generator with a state would make results depend on who draws first, that is on the number of
workers, ranks and the batch size. Here every sample owns a 64-bit key, and draw number `d` of a
sample is a hash of (key, d): the finalizer of SplitMix64 over a Weyl sequence. NumPy computes it in
uint64, torch in int64, whose products wrap to the same 64 bits; both give identical draws.

Reference:
    Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
"""

from contextvars import ContextVar
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch

Keys: TypeAlias = npt.NDArray[np.int64]

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1

# (seed, epoch) of the batch being read. A loader sets it around the read, so that a transform draws
# the same numbers through Subset, ConcatDataset or any other wrapper between loader and data set.
stream: ContextVar[tuple[int, int]] = ContextVar("stream", default=(0, 0))


def mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64: a bijection of 64 bits whose outputs look independent."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return bits ^ (bits >> np.uint64(31))


def mix_int(bits: int) -> int:
    """`mix` of one Python integer."""
    bits &= _MASK
    bits = ((bits ^ (bits >> 30)) * _MULTIPLIERS[0]) & _MASK
    bits = ((bits ^ (bits >> 27)) * _MULTIPLIERS[1]) & _MASK
    return bits ^ (bits >> 31)


def fold(*parts: int) -> int:
    """One well-mixed 64-bit number for several integers, sensitive to their order."""
    state = 0
    for part in parts:
        state = mix_int(state + _GAMMA + mix_int(part + _GAMMA))
    return state


def sample_keys(seed: int, epoch: int, ids: npt.NDArray[np.int64]) -> Keys:
    """The key of each sample in an epoch.

    Args:
        seed: Any integer.
        epoch: Any integer.
        ids: Sample ids `(n,)`, int64.

    Returns:
        Keys `(n,)`, int64, all 64 bits in use.

    Example:
        >>> a = sample_keys(0, 3, np.array([5, 6]))
        >>> b = sample_keys(0, 3, np.array([6]))
        >>> bool(a[1] == b[0]), bool(a[0] == a[1])
        (True, False)
    """
    base = np.uint64(fold(seed, epoch))
    return mix(mix(ids.astype(np.uint64) + np.uint64(_GAMMA)) + base).view(np.int64)


def _logical_shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


@overload
def uniform(keys: Keys, draw: int) -> npt.NDArray[np.float64]: ...
@overload
def uniform(keys: torch.Tensor, draw: int) -> torch.Tensor: ...
def uniform(keys: Keys | torch.Tensor, draw: int) -> npt.NDArray[np.float64] | torch.Tensor:
    """Draw number `draw` of each key, uniform in [0, 1) with 53 random bits.

    Args:
        keys: `(n,)` int64, NumPy or torch on any device.
        draw: Which number of the key's own sequence.

    Returns:
        `(n,)` float64, of the same kind as `keys` and equal for both.

    Example:
        >>> keys = np.arange(3)
        >>> bool((uniform(keys, 7) == uniform(torch.from_numpy(keys), 7).numpy()).all())
        True
    """
    step = _GAMMA * (2 * draw + 1) & _MASK  # odd multiples: no draw leaves the key as it is
    if isinstance(keys, np.ndarray):
        high = mix(keys.view(np.uint64) + np.uint64(step)) >> np.uint64(11)
        return high.astype(np.float64) * 2.0**-53
    bits = keys + _signed(step)
    bits = (bits ^ _logical_shift(bits, 30)) * _signed(_MULTIPLIERS[0])
    bits = (bits ^ _logical_shift(bits, 27)) * _signed(_MULTIPLIERS[1])
    bits = bits ^ _logical_shift(bits, 31)
    return _logical_shift(bits, 11).double() * 2.0**-53


def generator(key: int) -> np.random.Generator:
    """A NumPy generator for one sample's transform, started from the sample's key."""
    return np.random.Generator(np.random.Philox(key=key & _MASK))


def _log_gamma_variates(keys: Keys, alpha: float, draw: int) -> npt.NDArray[np.float64]:
    # Marsaglia and Tsang (2000) for alpha + 1, brought down to alpha by a power of a uniform; in
    # logarithms, because for small alpha the variates themselves underflow.
    d = alpha + 1 - 1 / 3
    c = 1 / np.sqrt(9 * d)
    result = np.empty(len(keys))
    waiting = np.arange(len(keys))
    attempt = draw + 1
    while len(waiting):
        k = keys[waiting]
        radius = np.sqrt(-2 * np.log1p(-uniform(k, attempt)))
        x = radius * np.cos(2 * np.pi * uniform(k, attempt + 1))
        v = (1 + c * x) ** 3
        log_v = np.log(np.maximum(v, 1e-300))
        log_u = np.log1p(-uniform(k, attempt + 2))
        accepted = (v > 0) & (log_u < 0.5 * x * x + d - d * v + d * log_v)
        result[waiting[accepted]] = np.log(d) + log_v[accepted]
        waiting = waiting[~accepted]
        attempt += 3
    return result + np.log1p(-uniform(keys, draw)) / alpha


def beta(keys: Keys, alpha: float, draw: int) -> npt.NDArray[np.float64]:
    """A Beta(alpha, alpha) variate of each key, from the draws `draw` to `draw` + 2000.

    NumPy alone: its elementary functions give an element the same bits wherever it stands in the
    array, which torch's do not promise (the tail of a vectorised loop takes another path).

    Args:
        keys: `(n,)` int64.
        alpha: Above 0; 1 is the uniform distribution.
        draw: First number of the key's sequence to use.

    Returns:
        `(n,)` float64 in [0, 1].
    """
    difference = _log_gamma_variates(keys, alpha, draw + 1000) - _log_gamma_variates(
        keys, alpha, draw
    )
    return 1 / (1 + np.exp(np.minimum(difference, 700.0)))


def dirichlet(keys: Keys, alpha: float, count: int, draw: int) -> npt.NDArray[np.float64]:
    """Dirichlet(alpha, ..., alpha) weights of each key, from `count` times 1000 draws on `draw`.

    Args:
        keys: `(n,)` int64.
        alpha: Above 0; 1 is the uniform distribution on the simplex.
        count: Number of weights.
        draw: First number of the key's sequence to use.

    Returns:
        `(n, count)` float64 in [0, 1]; each row sums to 1.
    """
    logs = np.stack([_log_gamma_variates(keys, alpha, draw + 1000 * k) for k in range(count)], 1)
    shares = np.exp(np.maximum(logs - logs.max(1, keepdims=True, initial=-np.inf), -700.0))
    return shares / shares.sum(1, keepdims=True)
