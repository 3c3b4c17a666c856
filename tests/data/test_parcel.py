import pickle

import pytest
import torch

from torsh_data._parcel import pack, unpack

BATCH = {
    "small": torch.arange(5),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "large": torch.rand(200, 200),
    "empty": torch.zeros(0, 3),
    "column": torch.rand(6, 6).t(),
    "jpeg": [b"a", b"", b"ccc"],
    "long": [b"x" * 700_000, b"y" * 700_000],
    "text": ["a", "b"],
    "mixed": [b"a", "b"],
    "none": [],
    "rows": [torch.arange(3), torch.arange(0), torch.arange(5)],
    "inner": {"x": torch.ones(2)},
}


@pytest.mark.parametrize("name", BATCH)
def test_what_was_packed_comes_back(name):
    value = BATCH[name]
    back = unpack(pickle.loads(pickle.dumps(pack({name: value}))))[name]
    if isinstance(value, torch.Tensor):
        assert back.dtype == value.dtype
        assert torch.equal(back, value)
        back.add_(1)  # the receiver owns it
    elif name == "rows":
        assert [row.tolist() for row in back] == [row.tolist() for row in value]
        assert back[1].dtype == torch.int64
    elif name == "inner":
        assert torch.equal(back["x"], value["x"])
    else:
        assert back == value


def test_small_things_travel_by_value_and_long_ones_in_shared_memory():
    packed = pack(BATCH).items
    assert not isinstance(packed["small"], torch.Tensor)
    assert isinstance(packed["large"], torch.Tensor)
    assert isinstance(packed["jpeg"].content, bytes)
    assert isinstance(packed["long"].content, torch.Tensor)
