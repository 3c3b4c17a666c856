"""Triton kernels: one launch updates every tensor of a launch table.

The tables are described in ``_launch``. ``update`` is the driver for all rules: it finds the block,
the addresses and the hyper-parameters, and hands them to the rule's block function, which loads,
computes and stores. The others reduce what ``update`` leaves in ``partials``, each in a fixed
order, so that a run can be repeated bit for bit.
"""

import triton
import triton.language as tl

# One program per block of BLOCK elements. On an H100 larger blocks lose bandwidth: AdamW in
# float32 moves 98 % of what a copy moves at 1024, 88 % at 2048 and 54 % at 8192. A pass that only
# reads does not, and leaves fewer partial sums.
BLOCK = 1024
NORM_BLOCK = 4096
NUM_WARPS = 4
# The fewest without spills (sm_90), so that more blocks wait for memory at once.
MAX_REGISTERS = 48
MAX_REGISTERS_OF_MORE = 64  # with a third state, or a mask
MAX_REGISTERS_OF_MOST = 96  # with more of these, or the step size estimate
TAIL = 128

WORDS = tl.constexpr(10)  # int64 in a row of the table
CONSTANTS = tl.constexpr(12)  # float32 in a row of the constants
FACTORS = tl.constexpr(4)  # float32 in a row of the factors
EXPONENTS = tl.constexpr(4)  # float64 in a row of the exponents


@triton.jit
def _adam(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    x_ptr: tl.tensor,
    e_ptr: tl.tensor,
    s_ptr: tl.tensor,
    z_ptr: tl.tensor,
    x_end: tl.tensor,
    e_end: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    ramp: tl.tensor,
    inv_bias1: tl.tensor,
    inv_sqrt_bias2: tl.tensor,
    sums: tl.tensor,
    coefficient: tl.tensor,
    control: tl.tensor,
    COUPLED: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    EMA: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    lr = tl.load(constants) * ramp
    decay = tl.load(constants + 2)
    w1 = tl.load(constants + 4)
    w2 = tl.load(constants + 5)
    eps = tl.load(constants + 6)
    first = 0.0
    second = 0.0

    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * coefficient
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask).to(tl.float32)
    if COUPLED:
        g += tl.load(constants + 3) * p
    if ADAPTIVE:
        d = tl.load(control + 6)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        first = tl.sum(tl.where(mask, g * (z - p), 0.0)) * lr
        weight = tl.where(tl.load(constants + 10) != 0.0, 1.0, lr)
        added = tl.load(constants + 9) * s + weight * tl.load(constants + 11) * d * d * g
        live = tl.where(lr != 0.0, 1.0, 0.0)  # a frozen group has no part in the estimate
        s = tl.where(live != 0.0, added, s)
        second = tl.sum(tl.where(mask, tl.abs(s), 0.0)) * live
        tl.store(s_ptr + offsets, s, mask=mask)
        lr *= d
        g *= d
        eps *= d

    p -= lr * decay * p
    m += w1 * (g - m)
    v = (1.0 - w2) * v + w2 * g * g
    largest = v
    if AMSGRAD:
        # maximum, not where: a NaN must stay visible in the state, as in torch
        x = tl.load(x_ptr + offsets, mask=mask & (offsets < x_end), other=0.0).to(tl.float32)
        largest = tl.maximum(x, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x_ptr + offsets, largest, mask=mask & (offsets < x_end))
    move = inv_bias1 * m / (tl.sqrt(largest) * inv_sqrt_bias2 + eps)
    if CAUTIOUS:
        # the mean of the mask, at least 1e-3, keeps the length of the step
        agreeing = tl.maximum(tl.load(sums) / tl.load(sums + 1), 1e-3)
        kept = tl.where(m * g > 0.0, move / agreeing, 0.0)
        move = tl.where(tl.load(constants + 8) != 0.0, kept, move)
    p -= lr * move
    if EMA:
        e = tl.load(e_ptr + offsets, mask=mask & (offsets < e_end), other=0.0).to(tl.float32)
        e += tl.load(constants + 7) * (p - e)
        tl.store(e_ptr + offsets, e, mask=mask & (offsets < e_end))

    tl.store(p_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    return first, second


@triton.jit
def _agree(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    coefficient: tl.tensor,
    COUPLED: tl.constexpr,
):
    """Count the elements whose new first moment points the way of the gradient."""
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * coefficient
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
    if COUPLED:
        g += tl.load(constants + 3) * tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    m += tl.load(constants + 4) * (g - m)
    return tl.sum(tl.where(mask & (m * g > 0.0), 1.0, 0.0)), tl.sum(tl.where(mask, 1.0, 0.0))


@triton.jit
def _lion(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    ramp: tl.tensor,
    coefficient: tl.tensor,
):
    lr = tl.load(constants) * ramp
    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * coefficient
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)

    c = m + tl.load(constants + 4) * (g - m)
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, c))  # c: zero, or NaN to stay visible
    p -= lr * (tl.load(constants + 2) * p + sign)
    m += tl.load(constants + 5) * (g - m)

    tl.store(p_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    return 0.0, 0.0


@triton.jit
def _sgd(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    m_end: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    ramp: tl.tensor,
    g_weight: tl.tensor,
    coefficient: tl.tensor,
    COUPLED: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    lr = tl.load(constants) * ramp
    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * coefficient
    if COUPLED:
        g += tl.load(constants + 3) * p
    move = g
    if MOMENTUM:
        m = tl.load(m_ptr + offsets, mask=mask & (offsets < m_end), other=0.0).to(tl.float32)
        momentum = tl.load(constants + 4)
        m = momentum * m + g_weight * g
        tl.store(m_ptr + offsets, m, mask=mask & (offsets < m_end))
        nesterov = tl.load(constants + 5)  # 1 with, 0 without; a group without momentum keeps g
        move = tl.where(m_end > 0, tl.where(nesterov != 0.0, g + momentum * m, m), g)
    tl.store(p_ptr + offsets, p - lr * move, mask=mask)
    return 0.0, 0.0


@triton.jit
def _lamb_moments(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    inv_bias1: tl.tensor,
    inv_sqrt_bias2: tl.tensor,
    coefficient: tl.tensor,
    M: tl.constexpr,
    V: tl.constexpr,
):
    """Store the moments; give the squared norms of the parameter and of its update."""
    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * coefficient
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask).to(tl.float32)
    m = (1.0 - tl.load(constants + 4)) * m + tl.load(constants + 7) * g
    w2 = tl.load(constants + 5)
    v = (1.0 - w2) * v + w2 * g * g
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    # what the second pass will read
    m = m.to(M).to(tl.float32)
    v = v.to(V).to(tl.float32)
    root = tl.sqrt(v) * inv_sqrt_bias2 + tl.load(constants + 6)
    u = inv_bias1 * m / root + tl.load(constants + 2) * p
    return tl.sum(tl.where(mask, p * p, 0.0)), tl.sum(tl.where(mask, u * u, 0.0))


@triton.jit
def _lamb(
    p_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    ramp: tl.tensor,
    inv_bias1: tl.tensor,
    inv_sqrt_bias2: tl.tensor,
    sums: tl.tensor,
):
    lr = tl.load(constants) * ramp
    p_norm = tl.sqrt(tl.load(sums))
    u_norm = tl.sqrt(tl.load(sums + 1))
    trust = tl.where(u_norm > 0.0, p_norm / tl.where(u_norm > 0.0, u_norm, 1.0), 1.0)
    trust = tl.where(p_norm > 0.0, trust, 1.0)
    trust = tl.minimum(trust, tl.load(constants + 9))
    trust = tl.where(tl.load(constants + 8) != 0.0, trust, 1.0)
    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask).to(tl.float32)
    root = tl.sqrt(v) * inv_sqrt_bias2 + tl.load(constants + 6)
    u = inv_bias1 * m / root + tl.load(constants + 2) * p
    tl.store(p_ptr + offsets, p - lr * trust * u, mask=mask)
    return 0.0, 0.0


@triton.jit
def _at(address: tl.tensor, T: tl.constexpr) -> tl.tensor:
    return address.to(tl.pointer_type(T))  # pyrefly: ignore[bad-argument-type]


@triton.jit
def _rule(
    p_ptr: tl.tensor,
    g_ptr: tl.tensor,
    s0_ptr: tl.tensor,
    s1_ptr: tl.tensor,
    s2_ptr: tl.tensor,
    s3_ptr: tl.tensor,
    s4_ptr: tl.tensor,
    s5_ptr: tl.tensor,
    end0: tl.tensor,
    end2: tl.tensor,
    end3: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    constants: tl.tensor,
    factors: tl.tensor,
    listed: tl.tensor,
    ramp: tl.tensor,
    factor1: tl.tensor,
    factor2: tl.tensor,
    sums: tl.tensor,
    coefficient: tl.tensor,
    control: tl.tensor,
    S0: tl.constexpr,
    S1: tl.constexpr,
    RULE: tl.constexpr,
    COUPLED: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    USED: tl.constexpr,
):
    ramp = tl.load(factors, mask=listed, other=ramp)
    factor1 = tl.load(factors + 1, mask=listed, other=factor1)
    factor2 = tl.load(factors + 2, mask=listed, other=factor2)
    if RULE == "adam":
        sums_of_block = _adam(
            p_ptr, g_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr, end2, end3,
            offsets, mask, constants, ramp, factor1, factor2, sums, coefficient, control,
            COUPLED, CAUTIOUS, USED // 4 % 2 == 1, USED // 8 % 2 == 1, USED // 16 % 2 == 1,
        )  # fmt: skip
    elif RULE == "agree":
        sums_of_block = _agree(p_ptr, g_ptr, s0_ptr, offsets, mask, constants, coefficient, COUPLED)
    elif RULE == "lion":
        sums_of_block = _lion(p_ptr, g_ptr, s0_ptr, offsets, mask, constants, ramp, coefficient)
    elif RULE == "sgd":
        sums_of_block = _sgd(
            p_ptr, g_ptr, s0_ptr, end0, offsets, mask, constants, ramp, factor1, coefficient,
            COUPLED, USED % 2 == 1,
        )  # fmt: skip
    elif RULE == "lamb_moments":
        sums_of_block = _lamb_moments(
            p_ptr, g_ptr, s0_ptr, s1_ptr, offsets, mask, constants, factor1, factor2, coefficient,
            S0, S1,
        )  # fmt: skip
    elif RULE == "lamb":
        sums_of_block = _lamb(
            p_ptr, s0_ptr, s1_ptr, offsets, mask, constants, ramp, factor1, factor2, sums
        )
    else:
        tl.static_assert(RULE == "norm")
        g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sums_of_block = tl.sum(g * g), 0.0
    return sums_of_block


@triton.jit
def update(
    table: tl.tensor,
    entries: tl.tensor,
    constants: tl.tensor,
    factors: tl.tensor,
    blocks: tl.tensor,
    sums: tl.tensor,
    control: tl.tensor,
    partials: tl.tensor,
    ramp: tl.tensor,
    factor1: tl.tensor,
    factor2: tl.tensor,
    P: tl.constexpr,
    G: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    S4: tl.constexpr,
    S5: tl.constexpr,
    RULE: tl.constexpr,
    USED: tl.constexpr,
    COUPLED: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    CONTROLLED: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Apply a rule to the block of the tensor that ``blocks`` gives this program.

    Args:
        table: int64 ``(tensors, 10)``: addresses of the parameter and of six states (0 means none),
            number of elements, row in ``constants``, first program.
        entries: int64 ``(tensors, 2)``: address of the gradient (0 means none), and row in
            ``factors``, or -1 for ``ramp``, ``factor1`` and ``factor2``.
        constants: float32 ``(groups, 12)``: learning rate, sign of the gradient, decoupled decay,
            coupled decay, and what the rule defines.
        factors: float32 ``(rows, 4)``: warm-up, and what the rule defines for the step.
        blocks: int32 ``(programs, 2)``: tensor and block inside it.
        sums: float32 ``(tensors, 2)``: what ``tensor_sums`` made of an earlier pass.
        control: float32 ``(12,)``: as in ``_control.Control``; only read if CONTROLLED.
        partials: float32 ``(programs, PARTIALS)``: written if PARTIALS is not 0.
        ramp: Warm-up of all tensors without a row in ``factors``.
        factor1: What the rule defines for the step, of these.
        factor2: Likewise.
        P: Element type of the parameters.
        G: Element type of the gradients.
        S0: Element type of the first state.
        S1: Of the second.
        S2: Of the third.
        S3: Of the fourth.
        S4: Of the fifth.
        S5: Of the sixth.
        RULE: Name of the rule.
        USED: Bit i is set if any tensor has state i.
        COUPLED: Whether any group has coupled decay.
        CAUTIOUS: Whether any group masks its updates.
        CONTROLLED: Whether to heed ``control``.
        PARTIALS: Partial sums to keep for each program.
        BLOCK: Elements in a block, a power of two, at least 16.
        TAIL: Elements taken at once where 16-byte accesses are not possible.
    """
    program = tl.program_id(0).to(tl.int64)
    entry = blocks + 2 * program
    tensor = tl.load(entry).to(tl.int64)
    base = tl.load(entry + 1).to(tl.int64) * BLOCK
    row = table + WORDS * tensor
    g_address = tl.load(entries + 2 * tensor)
    proceed = g_address != 0
    coefficient = 1.0
    if CONTROLLED:
        coefficient = tl.load(control)
        if RULE != "norm":
            proceed = proceed & (tl.load(control + 1) != 0.0)
    first = 0.0
    second = 0.0
    if proceed:
        p_address = tl.load(row)
        a0 = tl.load(row + 1)
        a1 = tl.load(row + 2)
        a2 = tl.load(row + 3)
        a3 = tl.load(row + 4)
        a4 = tl.load(row + 5)
        a5 = tl.load(row + 6)
        n = tl.minimum(tl.load(row + 7) - base, BLOCK).to(tl.int32)
        constants += CONSTANTS * tl.load(row + 8)
        factor_row = tl.load(entries + 2 * tensor + 1)
        factors += FACTORS * factor_row
        listed = factor_row >= 0
        sums += 2 * tensor
        coefficient *= tl.load(constants + 1)

        p_ptr = _at(p_address, P) + base
        g_ptr = _at(g_address, G) + base
        s0_ptr = _at(a0, S0) + base
        s1_ptr = _at(a1, S1) + base
        s2_ptr = _at(a2, S2) + base
        s3_ptr = _at(a3, S3) + base
        s4_ptr = _at(a4, S4) + base
        s5_ptr = _at(a5, S5) + base

        # states that not all tensors have are read and written as far as they go: not at all, or
        # up to a number that is visibly a multiple of 16
        end0 = tl.where(a0 != 0, BLOCK, 0)
        end2 = tl.where(a2 != 0, BLOCK, 0)
        end3 = tl.where(a3 != 0, BLOCK, 0)

        offsets = tl.arange(0, BLOCK)
        start = 0
        if ((p_address | g_address | a0 | a1 | a2 | a3 | a4 | a5) & 15) == 0:
            # 16-byte accesses need both: the hint on the pointer, after the cast from integer
            # (before it, the hint is lost), and a bound that is visibly a multiple of 16.
            start = n // 16 * 16
            more, other = _rule(
                tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16),
                tl.multiple_of(s0_ptr, 16), tl.multiple_of(s1_ptr, 16),
                tl.multiple_of(s2_ptr, 16), tl.multiple_of(s3_ptr, 16),
                tl.multiple_of(s4_ptr, 16), tl.multiple_of(s5_ptr, 16),
                end0, end2, end3,
                offsets, offsets < start, constants, factors, listed, ramp, factor1, factor2, sums,
                coefficient, control, S0, S1, RULE, COUPLED, CAUTIOUS, USED,
            )  # fmt: skip
            first += more
            second += other
        # Element by element: up to 15 left over, or a whole block that is not aligned. As a loop,
        # this rare path does not set the number of registers of the whole kernel.
        if start < n:
            for begin in range(0, BLOCK, TAIL):
                rest = begin + tl.arange(0, TAIL)
                more, other = _rule(
                    p_ptr, g_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr,
                    end0, end2, end3,
                    rest, (rest >= start) & (rest < n), constants, factors, listed, ramp, factor1,
                    factor2, sums, coefficient, control, S0, S1, RULE, COUPLED, CAUTIOUS, USED,
                )  # fmt: skip
                first += more
                second += other
    if PARTIALS > 0:
        tl.store(partials + PARTIALS * program, first)
    if PARTIALS > 1:
        tl.store(partials + PARTIALS * program + 1, second)


@triton.jit
def tensor_sums(
    table: tl.tensor,
    partials: tl.tensor,
    sums: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up the two partial sums of each program of a tensor.

    Args:
        table: As for ``update``; one program for each row.
        partials: float32 ``(programs, 2)``.
        sums: float32 ``(tensors, 2)``, written.
        BLOCK: Elements that a program of ``update`` took.
        CHUNK: Partial sums taken at once.
    """
    tensor = tl.program_id(0).to(tl.int64)
    row = table + WORDS * tensor
    count = (tl.load(row + 7) + BLOCK - 1) // BLOCK
    partials += 2 * tl.load(row + 9)
    first = tl.zeros((CHUNK,), tl.float32)
    second = tl.zeros((CHUNK,), tl.float32)
    begin = count * 0
    while begin < count:
        index = begin + tl.arange(0, CHUNK)
        first += tl.load(partials + 2 * index, mask=index < count, other=0.0)
        second += tl.load(partials + 2 * index + 1, mask=index < count, other=0.0)
        begin += CHUNK
    tl.store(sums + 2 * tensor, tl.sum(first))
    tl.store(sums + 2 * tensor + 1, tl.sum(second))


@triton.jit(do_not_specialize=["count"])  # a count of 1 would become a constant
def total(
    partials: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    PARTIALS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up all partial sums in float64, with one program for each of PARTIALS columns.

    Args:
        partials: float32 ``(count, PARTIALS)``.
        result: float64 ``(PARTIALS,)``, written.
        count: Rows of ``partials``.
        PARTIALS: Columns of ``partials``.
        CHUNK: Rows taken at once.
    """
    column = tl.program_id(0)
    found = tl.zeros((CHUNK,), tl.float64)
    begin = count * 0
    while begin < count:
        index = begin + tl.arange(0, CHUNK)
        part = tl.load(partials + PARTIALS * index + column, mask=index < count, other=0.0)
        found += part.to(tl.float64)
        begin += CHUNK
    tl.store(result + column, tl.sum(found))


@triton.jit
def decide(squares: tl.tensor, control: tl.tensor):
    """Turn the sum of squares into the factor of the gradients and the decision to go on.

    Args:
        squares: float64 ``(1,)``: sum of the squared gradients, still scaled.
        control: float32 ``(12,)``: as in ``_control.Control``; changed.
    """
    scale = tl.load(control + 4)
    max_norm = tl.load(control + 8)
    norm = tl.sqrt(tl.load(squares)).to(tl.float32) / scale
    finite = norm < float("inf")
    go_on = (tl.load(control + 5) == 0.0) & (finite | (tl.load(control + 9) == 0.0))
    # where, not minimum, which drops NaN: it must come through where steps are not skipped
    clip = max_norm / (norm + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)
    clip = tl.where((max_norm == float("inf")) & finite, 1.0, clip)
    tl.store(control, clip / scale)
    tl.store(control + 1, tl.where(go_on, 1.0, 0.0))
    tl.store(control + 2, norm)
    tl.store(control + 3, tl.load(control + 3) + tl.where(go_on, 0.0, 1.0))


@triton.jit
def estimate(sums: tl.tensor, control: tl.tensor, inv_d0: tl.tensor):
    """Raise the step size estimate of Prodigy after a step.

    Args:
        sums: float64 ``(2,)``: learning rate times <gradient, way back to the start>, and the sum
            of the absolute values of the accumulated gradients.
        control: float32 ``(12,)``: as in ``_control.Control``; changed.
        inv_d0: 1 / the first estimate, which only scales.
    """
    if tl.load(control + 1) != 0.0:
        d = tl.load(control + 6)
        gain = d * d * inv_d0 * tl.load(sums).to(tl.float32)
        numerator = tl.load(control + 10) * tl.load(control + 7) + gain
        denominator = tl.load(sums + 1).to(tl.float32)
        ratio = numerator / tl.where(denominator > 0.0, denominator, 1.0)
        reached = tl.where(denominator > 0.0, ratio, d)
        tl.store(control + 6, tl.where(reached > d, reached, d))
        tl.store(control + 7, tl.where(denominator > 0.0, numerator, tl.load(control + 7)))


@triton.jit(do_not_specialize=["tensors"])
def advance(
    table: tl.tensor,
    entries: tl.tensor,
    exponents: tl.tensor,
    counts: tl.tensor,
    control: tl.tensor,
    factors: tl.tensor,
    tensors: tl.tensor,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the step of each tensor that has a gradient, and write its factors, in float64.

    Args:
        table: As for ``update``.
        entries: As for ``update``; row i of ``factors`` belongs to tensor i.
        exponents: float64 ``(groups, 4)``: steps of warm-up, and the numbers of KIND: log(beta1)
            and log(beta2), whose bias correction is wanted; or the first weight and the later ones.
        counts: float32 ``(tensors,)``: steps so far.
        control: As for ``decide``.
        factors: float32 ``(tensors, 4)``, written: warm-up and two numbers of KIND.
        tensors: Number of tensors.
        KIND: ``bias``, ``first`` or ``none``.
        CHUNK: Tensors to each program.
    """
    tensor = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = tensor < tensors
    taken = tl.load(entries + 2 * tensor, mask=mask, other=0) != 0
    go_on = tl.load(control + 1)  # 1 or 0
    step = tl.load(counts + tensor, mask=mask, other=0.0) + tl.where(taken, go_on, 0.0)
    tl.store(counts + tensor, step, mask=mask)
    exponents += EXPONENTS * tl.load(table + WORDS * tensor + 8, mask=mask, other=0)
    warmup = tl.load(exponents, mask=mask, other=1.0)
    time = tl.maximum(step, 1.0).to(tl.float64)  # a tensor without a step is not updated either
    ramp = tl.where(time < warmup, time / tl.maximum(warmup, 1.0), 1.0)
    tl.store(factors + FACTORS * tensor, ramp.to(tl.float32), mask=mask)
    a = tl.load(exponents + 1, mask=mask, other=-1.0)
    b = tl.load(exponents + 2, mask=mask, other=-1.0)
    if KIND == "bias":
        bias1 = 1.0 / (1.0 - tl.exp(a * time))
        bias2 = 1.0 / tl.sqrt(1.0 - tl.exp(b * time))
        tl.store(factors + FACTORS * tensor + 1, bias1.to(tl.float32), mask=mask)
        tl.store(factors + FACTORS * tensor + 2, bias2.to(tl.float32), mask=mask)
    elif KIND == "first":
        weight = tl.where(time == 1.0, a, b)
        tl.store(factors + FACTORS * tensor + 1, weight.to(tl.float32), mask=mask)


def registers(used: int, *, cautious: bool) -> int:
    """Most registers for a program of ``update``.

    Args:
        used: States, as for ``update``.
        cautious: Whether any group masks its updates.
    """
    extra = (used >= 4) + (used >= 12) + cautious  # states beyond two, both of them, a mask
    if used >= 16 or extra > 1:
        return MAX_REGISTERS_OF_MOST
    return MAX_REGISTERS_OF_MORE if extra else MAX_REGISTERS
