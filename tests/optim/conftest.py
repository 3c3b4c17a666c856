"""AdamW through each of its implementations."""

from typing import Any

import pytest

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
    import torch

    if not torch.cuda.is_available():
        import triton

        assert triton.knobs.runtime.interpret, "the root conftest sets TRITON_INTERPRET=1"
    return TritonAdamW


@pytest.fixture(params=["cpu-fused", "triton", "reference"])
def adamw(request: pytest.FixtureRequest) -> type[AdamW]:
    if request.param == "triton":
        return request.getfixturevalue("triton_adamw")
    return AdamW if request.param == "cpu-fused" else ReferenceAdamW
