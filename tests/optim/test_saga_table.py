"""Rows of the table: rounding, sizes, reading and writing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_optim._saga_table import (
    TABLE_DTYPES,
    allocate,
    check_size,
    decode,
    encode,
    fitted,
    input_sums,
    read,
    row_bytes,
    write,
)

_RELATIVE = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from(TABLE_DTYPES),
)
def test_error_is_that_of_the_type(rows: list[list[float]], dtype: torch.dtype) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    codes, scale = encode(values, dtype)
    assert codes.dtype == dtype
    error = (decode(codes, scale) - values).abs()
    if dtype == torch.int8:
        # half a step of absmax / 127, and the rounding of the scale to float32, down to its
        # smallest number
        bound = values.abs().amax(1, keepdim=True) * (0.5 / 127 + 2.0**-23) + 127 * 2.0**-149
    else:
        info = torch.finfo(dtype)
        bound = values.abs() * _RELATIVE[dtype] + info.smallest_normal * info.eps
    assert bool((error <= bound).all())


def test_int8_by_hand() -> None:
    codes, scale = encode(torch.tensor([[254.0, -2.0, 3.2], [0.0, 0.0, 0.0]]), torch.int8)
    assert codes.tolist() == [[127, -1, 2], [0, 0, 0]]
    assert scale is not None
    assert scale.tolist() == [2.0, 0.0]
    assert decode(codes, scale).tolist() == [[254.0, -2.0, 4.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_rows_come_back_as_encoded(dtype: torch.dtype) -> None:
    state: dict[str, Any] = {}
    allocate(state, "part", (6, 4), dtype, torch.device("cpu"))
    assert sum(t.nbytes for t in state.values()) == 6 * row_bytes(4, dtype)
    where = torch.tensor([4, 1, 5])
    codes, scale = encode(torch.randn(3, 4, dtype=torch.float64), dtype)
    write(state, "part", where, codes, scale)
    assert torch.equal(read(state, "part", where), decode(codes, scale))
    assert not read(state, "part", torch.tensor([0, 2, 3])).any()


def test_bytes_of_a_row() -> None:
    assert [row_bytes(10, dtype) for dtype in TABLE_DTYPES] == [80, 40, 20, 14]


def test_size_is_checked_exactly() -> None:
    check_size("full", 10, [3, 4], torch.int8, 150)  # 10 * (3 + 4 + 4 + 4)
    with pytest.raises(
        ValueError,
        match=r"the full table needs 150 bytes \(10 samples of 7 numbers in torch.int8\), more "
        "than max_table_bytes=149; raise the limit or use table='factored'",
    ):
        check_size("full", 10, [3, 4], torch.int8, 149)


def test_checksums_have_their_bytes() -> None:
    check_size("scalar", 10, [3], torch.float32, 200, checked=True)
    with pytest.raises(ValueError, match="the scalar table needs 200 bytes"):
        check_size("scalar", 10, [3], torch.float32, 199, checked=True)


_FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("width", [1, 2, 7, 64, 1000])
def test_checksums_do_not_depend_on_the_batch(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(40, width).to(dtype)
    sums, tolerance = input_sums(x)
    order = torch.randperm(40)
    for part in order.split([1, 2, 3, 13, 21]):
        for form in (x[part], x[part].T.contiguous().T):
            again, _ = input_sums(form)
            assert bool(((again - sums[part]).abs() <= tolerance[part]).all())


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(_FLOATS),
    width=st.integers(2, 20),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_checksums_see_every_element(
    dtype: torch.dtype, width: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # equal and small next to large, as pixels: the changes below are 5 % of the sum at least
    x = torch.ones(1, width).add_(torch.rand(1, width, generator=generator)).to(dtype)
    sums, tolerance = input_sums(x)
    place = data.draw(st.integers(0, width - 1))
    for change in (0.0, -1.0, 3.0):
        other = x.clone()
        other[0, place] *= change
        assert bool((input_sums(other)[0] - sums).abs() > tolerance)
    assert bool((input_sums(-x)[0] - sums).abs() > tolerance)


def test_checksums_see_places() -> None:
    one_hot = torch.eye(50)
    sums, tolerance = input_sums(one_hot)
    apart = (sums[:, None] - sums).abs() + torch.eye(50)
    assert bool((apart > tolerance).all())
    values = torch.linspace(0, 1, 64).view(1, 64)
    sums, tolerance = input_sums(values)
    for other in (values.flip(1), values.roll(1, 1)):
        assert bool((input_sums(other)[0] - sums).abs() > tolerance)


def test_checksum_of_nothing_is_not_the_mark_of_unseen() -> None:
    sums, tolerance = input_sums(torch.zeros(2, 3))
    assert bool((sums > 0).all())
    assert tolerance.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_sum", torch.zeros(5), r"is \(5,\) in torch.float32, not \(5,\) in torch.float64"),
        ("input", torch.zeros(5, 3), "'input' of parameter 0 does not belong in a scalar table"),
        ("output_grad", torch.zeros(4, 2), r"is \(4, 2\) in torch.float32, not \(5, 2\) in torch."),
        ("output_grad", torch.zeros(5, 2).half(), r"\(5, 2\) in torch.float16, not"),
        ("output_grad", 3, r"is 3, not \(5, 2\)"),
        ("gradient_mean", torch.zeros(2, 3), r"in torch.float32, not \(2, 3\) in torch.float64"),
    ],
)
def test_loaded_parts_are_checked(key: str, value: Any, message: str) -> None:
    options = {"num_samples": 5, "table": "scalar", "table_dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        fitted(key, value, torch.zeros(2, 3), "parameter 0", options)


def test_loaded_parts_are_copied() -> None:
    options = {"num_samples": 5, "table": "full", "table_dtype": torch.int8}
    for key, value in (
        ("gradient", torch.ones(5, 6, dtype=torch.int8)),
        ("gradient_scale", torch.ones(5)),
    ):
        copy = fitted(key, value, torch.zeros(2, 3), "w", options)
        assert torch.equal(copy, value)
        assert copy.data_ptr() != value.data_ptr()
