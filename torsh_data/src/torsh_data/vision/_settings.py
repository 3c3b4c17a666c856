"""What the settings of a transform may be: whole numbers, finite numbers, series of these."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch


def check_whole(**settings: object) -> None:
    """Refuse what is no whole number: floats, texts, and True for 1."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} must be a whole number, not {_kind(value)}")


def check_finite(**settings: object) -> None:
    """Refuse what is no number, infinite or not a number."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} must be a number, not {_kind(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be finite")


def as_series(name: str, values: object) -> tuple[float, ...]:
    """Finite numbers from a tuple, a list, an array or a tensor of one dimension."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}={values!r} must be a sequence of numbers, not {_kind(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={values!r} must hold numbers, not {_kind(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{name}={values!r} must be finite")
    return tuple(float(value) for value in values)


def as_pair(name: str, values: object) -> tuple[float, float]:
    """Two finite numbers, the smaller first."""
    pair = as_series(name, values)
    if len(pair) != 2 or pair[0] > pair[1]:
        raise ValueError(f"{name}={values!r} must be two numbers, the smaller first")
    return pair[0], pair[1]


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
