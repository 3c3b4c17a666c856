"""The ways of sending a gradient that :func:`torsh_dist.compress` knows."""

from dataclasses import dataclass

import torch

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Int8:
    """Send 8-bit integers with one fp32 scale per group: 0.254x of the fp32 bytes.

    Each group of consecutive values is divided by its largest magnitude over 127 and rounded to
    the nearest integer. What the rounding lost stays with the sender and is added to the next
    gradient (error feedback), so nothing is lost for good: over many steps the sum of what was
    received equals the sum of what was meant. The integers are never summed: each rank decodes
    its share of all ranks' messages, averages in fp32 and sends the average as integers again.

    Attributes:
        group_size: values per scale, a power of 2 from 32 to 4096. Smaller groups round more
            finely and send more scales: 32 costs 0.281x, 256 0.254x, 4096 0.250x of fp32.

    Example:
        >>> Int8().group_size
        256

    Reference:
        Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015, arXiv 1511.04561
        (8-bit gradients; there without error feedback). Karimireddy et al., "Error Feedback Fixes
        SignSGD and other Gradient Compression Schemes", 2019, arXiv 1901.09847. We also feed back
        the error of the second rounding, that of the average.
    """

    group_size: int = 256

    def __post_init__(self) -> None:
        size = self.group_size
        if not (32 <= size <= 4096 and size & (size - 1) == 0):
            raise ValueError(f"group_size={size} is not a power of 2 from 32 to 4096; use 256")


@dataclass(frozen=True)
class Cast:
    """Send a narrower floating-point type: 0.5x of the fp32 bytes, no state.

    Unlike a hook that casts and lets the ring sum in the narrow type, the average is computed in
    fp32 and rounded once.

    Attributes:
        dtype: ``torch.bfloat16`` (keeps the range of fp32) or ``torch.float16`` (three more bits,
            but gradients above 65504 become infinite and those below 6e-8 zero).

    Example:
        >>> Cast().dtype
        torch.bfloat16
    """

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype} is not one of {_DTYPES}")
