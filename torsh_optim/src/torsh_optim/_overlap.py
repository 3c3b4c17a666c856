"""Parameters that share memory: one launch would write it twice, in no particular order."""

from itertools import pairwise

import torch
from torch import Tensor


def check_apart(params: list[Tensor]) -> None:
    """Raise RuntimeError if elements of a parameter share memory with others.

    Args:
        params: All parameters, of DTensors the local part. Between parameters only those without
            gaps are compared: views with gaps can lie in each other without sharing anything.
    """
    spans: list[tuple[str, int, int, Tensor]] = []
    for param in params:
        if param.numel() == 0 or param.layout is not torch.strided:
            continue
        reach = 0
        for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has "
                    "elements that share memory; give the optimizer a contiguous() copy"
                )
            reach += stride * (size - 1)
        if reach + 1 == param.numel() and param.data_ptr():
            begin = param.data_ptr()
            spans.append((str(param.device), begin, begin + param.nbytes, param))
    spans.sort(key=lambda span: span[:2])
    for (device, _, end, first), (other, begin, _, second) in pairwise(spans):
        if device == other and begin < end:
            raise RuntimeError(
                f"two parameters of shapes {tuple(first.shape)} and {tuple(second.shape)} share "
                "memory; tie modules by giving them the same Parameter"
            )
