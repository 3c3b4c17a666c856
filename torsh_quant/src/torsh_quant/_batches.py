"""What a batch of calibration data is, and how a model runs on one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def run_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on one batch.

    Args:
        model: Any module.
        batch: A tensor, a tuple or list whose first item is the input, or a dictionary of keyword
            arguments, of which ``labels`` is left out.

    Returns:
        What the model returns.
    """
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def first_tensor(out: Any) -> Tensor:
    """Return the tensor to compare: ``logits`` where there are any, or else the first one.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):
        out = list(out.values()) if out.get("logits") is None else out["logits"]
        return first_tensor(out)
    if isinstance(out, (tuple, list)) and out:
        return first_tensor(out[0])
    raise TypeError(f"the model returned {type(out).__name__}; it must return or contain a tensor")


def token_mask(batch: Any) -> Tensor | None:
    """Return which tokens of a batch are real, bool ``(batch, length)``; None if all are.

    Padding must not count where statistics of activations are taken.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Leave padded tokens out of activations ``(batch, length, features)``.

    Returns:
        ``(tokens, features)``, or ``x`` itself if it has no such dimensions.
    """
    if mask is None or x.shape[: mask.ndim] != mask.shape:
        return x
    return x[mask]
