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
        pa.array([["a", "b"], []]),
        pa.array([[[1], [2, 3]], []]),
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
    ("first", "second"),
    [(1, 1.5), (1, True), ("a", b"a"), (b"a", "a"), (1.0, "x"), ([1], 1), ([1], [0.5])],
)
def test_a_change_of_type_names_the_sample(first, second):
    field = infer_schema({"x": first}).field(0)
    with pytest.raises(TypeError, match=r"sample 41: column 'x' holds [\w ]+, but the column is"):
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


def stored(values, kind=None):
    field = infer_schema({"x": values[0]}).field(0) if kind is None else pa.field("x", kind)
    return field, encode(field, values, 0)


@pytest.mark.parametrize(
    ("values", "kind", "dtype"),
    [
        ([[1, 2, 3], [], [4]], None, torch.int64),
        ([[1, 0.5], [2], []], None, torch.float64),
        ([[1], torch.tensor([2, 3]), np.array([4], np.uint8)], pa.list_(pa.int32()), torch.int32),
        ([[0.5], torch.ones(2, dtype=torch.bfloat16)], pa.large_list(pa.float32()), torch.float32),
        ([[2**63], [1]], pa.list_(pa.uint64()), torch.uint64),
    ],
)
def test_lists_of_numbers_come_back_as_tensors_of_any_length(values, kind, dtype):
    field, array = stored(values, kind)
    for part, wanted in ((array, values), (array.slice(1), values[1:])):
        get, rows = getter(field, part)
        assert rows is None
        for n, value in enumerate(wanted):
            assert get(n).dtype == dtype
            assert get(n).tolist() == list(value)


def test_lists_of_other_things_come_back_as_lists():
    for values in ([["a"], []], [[True], [False, True]], [[b"x", b""]]):
        field, array = stored(values)
        get, _ = getter(field, array)
        assert [get(n) for n in range(len(values))] == values


def test_nulls_in_lists_need_a_schema():
    field, array = stored([[1, None], None, [2]], pa.list_(pa.int64()))
    get, _ = getter(field, array)
    assert (get(0), get(1), get(2).tolist()) == ([1, None], None, [2])
    with pytest.raises(TypeError, match="sample 1: column 'x' holds lists of NoneType, but"):
        stored([[1], [None]])


@pytest.mark.parametrize("other", [[0.5], [True], ["a"], np.array([0.5]), torch.ones(2, 2), 3])
def test_what_a_list_of_whole_numbers_cannot_hold_is_never_cut(other):
    with pytest.raises(TypeError, match=r"sample 1: column 'x' holds .* but the column is list<"):
        stored([[1], other])
    for number in (2**70, 2**63):
        with pytest.raises(ValueError, match="column 'x', samples from 0 on"):
            stored([[1], [number, -1]])


def test_lists_without_one_type_are_refused():
    with pytest.raises(TypeError, match="column 'x' holds lists of int and str; a list holds"):
        infer_schema({"x": [1, "a"]})
    with pytest.raises(ValueError, match=r"column 'x' holds empty lists alone .* give schema="):
        infer_schema({"x": []})


def test_ragged_tensors_are_told_how():
    field = infer_schema({"x": torch.arange(3)}).field(0)
    with pytest.raises(
        ValueError, match=r"for rows of any length give schema=.*pa.list_\(pa.int64"
    ):
        encode(field, [torch.arange(3), torch.arange(2)], 0)


def test_half_a_surrogate_pair_and_none_name_sample_and_column():
    field = infer_schema({"x": "a"}).field(0)
    with pytest.raises(ValueError, match=r"sample 8: column 'x' holds text with '\\ud800', half"):
        encode(field, ["a", "\ud800"], 7)
    with pytest.raises(TypeError, match="sample 8: column 'x' is None, but the column is string"):
        encode(field, ["a", None], 7)
    with pytest.raises(TypeError, match=r"column 'x' is None in the first sample.* give schema="):
        infer_schema({"x": None})


def test_json_comes_back_as_its_value():
    values = [{"a": 1}, [1, "b"], "c", None]
    get, _ = getter(pa.field("x", pa.json_()), stored(values, pa.json_())[1])
    assert [get(n) for n in range(4)] == values
