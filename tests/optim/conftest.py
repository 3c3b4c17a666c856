"""AdamW through each of its implementations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torsh_optim import AdamW


class TritonAdamW(AdamW):
    """AdamW through its kernel on any device; on the CPU that is Triton's interpreter."""

    _implementations = ("triton", "reference")


class ReferenceAdamW(AdamW):
    """AdamW as a plain loop."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{**options, "fused": False})


@pytest.fixture
def triton_adamw() -> type[AdamW]:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        import triton

        assert triton.knobs.runtime.interpret, "the root conftest sets TRITON_INTERPRET=1"
    return TritonAdamW


@pytest.fixture(params=["cpu-fused", "triton", "reference"])
def adamw(request: pytest.FixtureRequest) -> Iterator[type[AdamW]]:
    """Each implementation on the CPU; the kernel on the GPU, if there is one."""
    if request.param != "triton":
        yield AdamW if request.param == "cpu-fused" else ReferenceAdamW
        return
    kind = request.getfixturevalue("triton_adamw")
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield kind
    torch.set_default_device(None)
