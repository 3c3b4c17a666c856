"""Every optimizer through each of its implementations."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from torsh_optim import AdamW

Implement = Callable[[type[Any]], type[Any]]


@cache
def triton_of(kind: type[Any]) -> type[Any]:
    """The class through its kernels on any device; on the CPU that is Triton's interpreter."""
    return type(f"Triton{kind.__name__}", (kind,), {"_implementations": ("triton", "reference")})


@cache
def reference_of(kind: type[Any]) -> type[Any]:
    """The class as a plain loop."""

    def init(self: Any, params: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, params, *args, **{**options, "fused": False})

    return type(f"Reference{kind.__name__}", (kind,), {"__init__": init})


@pytest.fixture
def triton() -> Implement:
    """Gives a class through its kernels."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        import triton

        assert triton.knobs.runtime.interpret, "the root conftest sets TRITON_INTERPRET=1"
    return triton_of


@pytest.fixture
def triton_adamw(triton: Implement) -> type[AdamW]:
    return triton(AdamW)


@pytest.fixture(params=["cpu-fused", "triton", "reference"])
def implement(request: pytest.FixtureRequest) -> Iterator[Implement]:
    """Each implementation on the CPU; the kernels on the GPU, if there is one.

    "cpu-fused" stands for what a class takes by itself, "cpu-chunked" where torch has no kernel.
    """
    if request.param != "triton":
        yield reference_of if request.param == "reference" else lambda kind: kind
        return
    through_kernels = request.getfixturevalue("triton")
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield through_kernels
    torch.set_default_device(None)


@pytest.fixture
def adamw(implement: Implement) -> type[AdamW]:
    return implement(AdamW)
