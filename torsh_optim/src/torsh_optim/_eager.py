"""Running compiled models as they are written, so that hooks on modules see every call."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def run_eagerly() -> AbstractContextManager[object]:
    """Return a context in which compiled models run uncompiled.

    Where nothing has been compiled it does nothing: it would import the compiler.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
