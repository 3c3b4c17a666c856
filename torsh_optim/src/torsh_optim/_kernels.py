"""Triton kernels: one launch updates every tensor of a launch table."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program per block of BLOCK elements. On an H100 larger blocks lose bandwidth: AdamW in
# float32 moves 98 % of what a copy moves at 1024, 88 % at 2048 and 54 % at 8192.
BLOCK = 1024
NUM_WARPS = 4
MAX_REGISTERS = 48  # the fewest without spills (sm_90), so that more blocks wait for memory at once
TAIL = 128


@triton.jit
def _adamw_block(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    x_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    hyper: tl.tensor,
    AMSGRAD: tl.constexpr,
):
    lr = tl.load(hyper)
    weight_decay = tl.load(hyper + 1)
    w1 = tl.load(hyper + 2)
    w2 = tl.load(hyper + 3)
    eps = tl.load(hyper + 4)
    inv_bias1 = tl.load(hyper + 5)
    inv_sqrt_bias2 = tl.load(hyper + 6)
    sign = tl.load(hyper + 7)

    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * sign
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask).to(tl.float32)

    p -= lr * weight_decay * p
    m += w1 * (g - m)
    v = (1.0 - w2) * v + w2 * g * g
    largest = v
    if AMSGRAD:
        # maximum, not where: a NaN must stay visible in the state, as in torch
        x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
        largest = tl.maximum(x, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x_ptr + offsets, largest, mask=mask)
    p -= lr * inv_bias1 * m / (tl.sqrt(largest) * inv_sqrt_bias2 + eps)

    tl.store(p_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)


@triton.jit
def _at(address: tl.tensor, T: tl.constexpr) -> tl.tensor:
    return address.to(tl.pointer_type(T))  # pyrefly: ignore[bad-argument-type]


@triton.jit
def adamw(
    table: tl.tensor,
    hypers: tl.tensor,
    blocks: tl.tensor,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    X: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Update the block of the tensor that ``blocks`` gives this program.

    Args:
        table: int64 ``(tensors, 8)``: addresses of parameter, gradient, exp_avg, exp_avg_sq and
            max_exp_avg_sq, number of elements, row in ``hypers``, unused. Gradient 0 means none.
        hypers: float32 ``(rows, 8)``: lr, weight_decay, 1 - beta1, 1 - beta2, eps,
            1 / bias correction 1, 1 / sqrt(bias correction 2), sign of the gradient.
        blocks: int32 ``(programs, 2)``: tensor and block inside it.
        P: Element type of the parameters.
        G: Element type of the gradients.
        M: Element type of exp_avg.
        V: Element type of exp_avg_sq.
        X: Element type of max_exp_avg_sq.
        AMSGRAD: Whether max_exp_avg_sq is kept.
        BLOCK: Elements in a block, a power of two, at least 16.
        TAIL: Elements taken at once where 16-byte accesses are not possible.
    """
    entry = blocks + 2 * tl.program_id(0).to(tl.int64)
    row = table + 8 * tl.load(entry).to(tl.int64)
    base = tl.load(entry + 1).to(tl.int64) * BLOCK
    g_address = tl.load(row + 1)
    if g_address != 0:
        p_address = tl.load(row)
        m_address = tl.load(row + 2)
        v_address = tl.load(row + 3)
        x_address = tl.load(row + 4)
        n = tl.minimum(tl.load(row + 5) - base, BLOCK).to(tl.int32)
        hyper = hypers + 8 * tl.load(row + 6)

        p_ptr = _at(p_address, P) + base
        g_ptr = _at(g_address, G) + base
        m_ptr = _at(m_address, M) + base
        v_ptr = _at(v_address, V) + base
        x_ptr = _at(x_address, X) + base

        offsets = tl.arange(0, BLOCK)
        start = 0
        if ((p_address | g_address | m_address | v_address | x_address) & 15) == 0:
            # 16-byte accesses need both: the hint on the pointer, after the cast from integer
            # (before it, the hint is lost), and a bound that is visibly a multiple of 16.
            start = n // 16 * 16
            _adamw_block(
                tl.multiple_of(p_ptr, 16),
                tl.multiple_of(g_ptr, 16),
                tl.multiple_of(m_ptr, 16),
                tl.multiple_of(v_ptr, 16),
                tl.multiple_of(x_ptr, 16),
                offsets,
                offsets < start,
                hyper,
                AMSGRAD,
            )
        # Element by element: up to 15 left over, or a whole block that is not aligned. As a loop,
        # this rare path does not set the number of registers of the whole kernel.
        if start < n:
            for first in range(0, BLOCK, TAIL):
                rest = first + tl.arange(0, TAIL)
                mask = (rest >= start) & (rest < n)
                _adamw_block(p_ptr, g_ptr, m_ptr, v_ptr, x_ptr, rest, mask, hyper, AMSGRAD)


def launch_adamw(
    programs: int,
    table: Tensor,
    hypers: Tensor,
    blocks: Tensor,
    types: list[torch.dtype],
    block: int,
) -> None:
    """Start ``adamw`` once.

    Args:
        programs: Rows of ``blocks``.
        table: Addresses and sizes, as the kernel describes them.
        hypers: Hyper-parameters.
        blocks: Block map.
        types: Of parameters, gradients, exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.
        block: Elements in a block.
    """
    elements = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in types]
    start: Any = adamw[(programs,)]
    start(
        table,
        hypers,
        blocks,
        P=elements[0],
        G=elements[1],
        M=elements[2],
        V=elements[3],
        X=elements[-1],
        AMSGRAD=len(elements) == 5,
        BLOCK=block,
        TAIL=TAIL,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=True,
    )
