"""Write bitsandbytes_<version>.pt: optimizer states that bitsandbytes made on its CPU backend.

Run it in an environment with bitsandbytes: ``python record_bitsandbytes.py``. Beside each state
lies what bitsandbytes itself decodes it to, or a continuation: the weights before and after two
more steps.
"""

from pathlib import Path
from typing import Any

import torch

SHAPES = ((6, 50), (33,))
STEPS = 3


def gradients() -> list[list[torch.Tensor]]:
    """Gradients of five steps."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES] for _ in range(5)]


def record(make: Any, *, eight_bit: bool = False) -> dict[str, Any]:
    """Make three steps and keep the state; say what comes of it."""
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(params)

    def train(grads: list[list[torch.Tensor]]) -> None:
        for of_step in grads:
            for param, grad in zip(params, of_step, strict=True):
                param.grad = grad.clone()
            optimizer.step()

    train(gradients()[:STEPS])
    state_dict = torch.utils._pytree.tree_map(  # state_dict() hands out the live tensors
        lambda x: x.clone() if isinstance(x, torch.Tensor) and x.numel() != 256 else x,
        optimizer.state_dict(),
    )
    if eight_bit:
        decoded = {}
        for number, values in state_dict["state"].items():
            codes = values["__bnb_optimizer_quant_state__"]
            decoded[number] = [
                functional.dequantize_blockwise(
                    codes[f"state{i}"], absmax=codes[f"absmax{i}"], code=codes[f"qmap{i}"],
                    blocksize=256,
                )
                for i in (1, 2)
                if f"state{i}" in codes
            ]  # fmt: skip
        return {"state_dict": state_dict, "decoded": decoded}
    before = [p.detach().clone() for p in params]
    train(gradients()[STEPS:])
    return {"state_dict": state_dict, "before": before, "after": [p.detach() for p in params]}


def main() -> None:
    """Record all kinds in one file next to this script."""
    import bitsandbytes as bnb

    small = {"min_8bit_size": 1}
    path = Path(__file__).parent / f"bitsandbytes_{bnb.__version__}.pt"
    states = {
        "gradients": gradients()[STEPS:],
        "adam": record(lambda p: bnb.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        "adamw8bit": record(
            lambda p: bnb.optim.AdamW8bit(p, lr=0.01, weight_decay=0.1, **small), eight_bit=True
        ),
        "lamb": record(lambda p: bnb.optim.LAMB(p, lr=0.01)),
        "lion": record(lambda p: bnb.optim.Lion(p, lr=0.01, weight_decay=0.1)),
        "lion8bit": record(lambda p: bnb.optim.Lion8bit(p, lr=0.01, **small), eight_bit=True),
        "rmsprop": record(lambda p: bnb.optim.RMSprop(p, lr=0.01)),
        "sgd": record(lambda p: bnb.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
    }
    # Codes of the portable implementation, which rounds to nearest as the CUDA kernel does; the
    # CPU kernel goes through a table of 65,536 entries and is coarser near zero.
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(300, generator=generator) * torch.logspace(-6, 2, 300)
    values[256:280] = 0
    portable = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for name, signed in (("signed", True), ("unsigned", False)):
        code = bnb.functional.create_dynamic_map(signed=signed)
        source = values if signed else values.abs()
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(
            portable, source, code, 256
        )
        states[name] = {"values": source, "map": code, "codes": codes, "absmax": absmax}
    torch.save(states, path)


if __name__ == "__main__":
    main()
