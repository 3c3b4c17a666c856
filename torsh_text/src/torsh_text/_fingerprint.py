"""What tells, without reading all weights, that a model is the one seen before."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

_SAMPLES = 8


def weights_seen(module: nn.Module) -> Hashable | None:
    """Return a value that changes when a parameter or buffer does; None if that cannot be told.

    It holds the address, dtype, shape and version counter of each tensor, and eight of its
    entries. The counter notices every change in place that autograd could notice; the entries
    notice most others, such as a copy into ``.data`` or memory that is used again. A change of a
    few entries through ``.data`` is not noticed.

    Args:
        module: Its tensors are looked at where they are; on a GPU this waits once.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    signs: list[Hashable] = []
    samples: list[Tensor] = []
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_inference() or type(tensor) not in (Tensor, nn.Parameter):
                return None  # the former count no versions, subclasses may keep data elsewhere
            signs.append(
                (name, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor._version)
            )
            step = max(1, tensor.numel() // _SAMPLES)
            samples.append(tensor.detach().reshape(-1)[::step][:_SAMPLES].double())
        if not samples:
            return None
        # as bytes, because a NaN equals nothing
        values = torch.cat(samples).cpu().numpy().tobytes()
    return (tuple(signs), values)


def arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """Name what decides, beside the weights, how exactly a model computes here."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    exact = torch.get_float32_matmul_precision() if dtype == torch.float32 else ""
    return f"{dtype} {exact}".strip()
