import numpy as np
import pyarrow as pa
import pytest
import torch

from torsh_data._columns import encode, getter, infer_schema

VALUES = [
    True,
    -(2**63),
    1.5,
    "grün",
    b"\x00\xff",
    torch.arange(6, dtype=torch.uint8).view(1, 2, 3),
    torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
    torch.tensor([[True], [False]]),
    torch.tensor([0.5, 2.0], dtype=torch.float16),
    torch.tensor([7], dtype=torch.uint32),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: str(getattr(v, "dtype", type(v).__name__)))
def test_a_value_comes_back_as_it_was(value):
    schema = infer_schema({"x": value})
    array = encode(schema.field(0), [value, value, value], 0)
    for part in (array, array.slice(1)):
        get, rows = getter(schema.field(0), part)
        back = get(len(part) - 1)
        if isinstance(value, torch.Tensor):
            assert back.dtype == value.dtype
            assert torch.equal(back, value)
            assert rows is None or len(rows) == len(part)
        else:
            assert back == value
            assert type(back) is type(value)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (np.int32(3), int),
        (np.float32(0.5), float),
        (torch.tensor(3), int),
        (np.bool_(True), bool),
        (bytearray(b"ab"), bytes),
    ],
)
def test_scalars_of_all_sorts_become_plain_numbers(given, kind):
    schema = infer_schema({"x": given})
    get, _ = getter(schema.field(0), encode(schema.field(0), [given], 0))
    assert get(0) == given
    assert type(get(0)) is kind


def test_arrays_that_are_not_contiguous_are_stored_by_value():
    value = np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::-2]
    schema = infer_schema({"x": value})
    get, _ = getter(schema.field(0), encode(schema.field(0), [value], 0))
    np.testing.assert_array_equal(get(0).numpy(), value)


def test_arrays_that_must_not_be_written_to_are_stored():
    value = np.arange(3.0)
    value.flags.writeable = False
    schema = infer_schema({"x": value})
    get, _ = getter(schema.field(0), encode(schema.field(0), [value], 0))
    assert get(0).tolist() == [0, 1, 2]


def test_a_tensor_read_can_be_written_to():
    schema = infer_schema({"x": torch.zeros(3)})
    array = encode(schema.field(0), [torch.zeros(3)], 0)
    get, _ = getter(schema.field(0), array)
    get(0).add_(1)
    assert get(0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.large_binary(), pa.string(), pa.binary()])
def test_offsets_of_both_widths_and_of_slices(kind):
    text = ["a", "", "ccc", "dd"]
    values = (
        text
        if pa.types.is_string(kind) or kind == pa.large_string()
        else [t.encode() for t in text]
    )
    array = pa.array(values, kind).slice(1)
    get, _ = getter(pa.field("x", kind), array)
    assert [get(row) for row in range(3)] == values[1:]


def test_nulls_lists_and_structs_of_foreign_files():
    for array in (
        pa.array([1, None, 3]),
        pa.array([[1, 2], []]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([None, "x"]),
        pa.FixedSizeListArray.from_arrays(pa.array(["a", "b"]), 1),
    ):
        get, _ = getter(pa.field("x", array.type), array)
        assert [get(row) for row in range(len(array))] == array.to_pylist()


def test_fixed_lists_of_foreign_files_are_tensors():
    array = pa.FixedSizeListArray.from_arrays(pa.array(range(6), pa.int16()), 2)
    get, rows = getter(pa.field("x", array.type), array.slice(1))
    assert torch.equal(get(0), torch.tensor([2, 3], dtype=torch.int16))
    assert rows is not None


def test_a_type_without_a_column_is_refused():
    with pytest.raises(TypeError, match="column 'x' holds dict; a column holds tensors"):
        infer_schema({"x": {}})
    with pytest.raises(TypeError, match=r"column 'x': tensors of torch.complex64 cannot be stored"):
        infer_schema({"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(TypeError, match=r"column 'x': arrays of object cannot be stored"):
        infer_schema({"x": np.array([None, {}])})
    with pytest.raises(ValueError, match=r"column 'x': tensors of shape \(2, 0\) hold nothing"):
        infer_schema({"x": torch.zeros(2, 0)})
    with pytest.raises(ValueError, match="first sample has no columns"):
        infer_schema({})


@pytest.mark.parametrize(
    ("first", "second"), [(1, 1.5), (1, True), ("a", b"a"), (b"a", "a"), (1, None), (1.0, "x")]
)
def test_a_change_of_type_names_the_sample(first, second):
    field = infer_schema({"x": first}).field(0)
    with pytest.raises(TypeError, match=r"sample 41: column 'x' holds \w+, but the column is"):
        encode(field, [first, second], 40)


def test_a_whole_number_fits_a_column_of_floats():
    field = infer_schema({"x": 1.5}).field(0)
    assert encode(field, [1.5, 2], 0).to_pylist() == [1.5, 2.0]


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), [0.0, 0.0]])
def test_a_change_of_shape_or_dtype_names_the_sample(other):
    field = infer_schema({"x": torch.zeros(2)}).field(0)
    with pytest.raises(ValueError, match=r"sample 8: column 'x' holds .* of shape \(2,\)"):
        encode(field, [torch.zeros(2), other], 7)


def test_numbers_beyond_the_column_are_refused():
    field = pa.field("x", pa.int8())
    with pytest.raises(ValueError, match="column 'x', samples from 0 on"):
        encode(field, [1, 300], 0)
