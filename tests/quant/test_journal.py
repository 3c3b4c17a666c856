import json

import pytest
import torch
from torch import nn

from torsh_quant._journal import Journal, data_digest, model_digest

FINGERPRINT = {"model": "a", "data": "b"}


def test_parts_come_back(tmp_path):
    journal = Journal(tmp_path / "run", FINGERPRINT)
    tensors = {"x y": torch.arange(5, dtype=torch.int8), "z": torch.randn(2, 3).bfloat16()}
    assert journal.read("one") is None
    journal.write("one", tensors)
    found = Journal(tmp_path / "run", FINGERPRINT).read("one")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    journal.drop("one")
    assert journal.read("one") is None
    journal.drop("one")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["journal.json"]


def test_other_work_is_refused_by_what_differs(tmp_path):
    Journal(tmp_path, FINGERPRINT)
    with pytest.raises(ValueError, match="of another run: data differ; use another folder"):
        Journal(tmp_path, {**FINGERPRINT, "data": "c"})
    found = json.loads((tmp_path / "journal.json").read_text())
    assert found["format"] == "torsh-quant-journal"
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files, but no journal"):
        Journal(other, FINGERPRINT)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_damaged_parts_are_named(tmp_path, damage):
    journal = Journal(tmp_path, FINGERPRINT)
    journal.write("one", {"x": torch.arange(100)})
    path = tmp_path / "one.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-40]
    elif damage == "flipped":
        content[-9] ^= 1
    else:
        content = b"{}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"one.safetensors is damaged; delete it"):
        journal.read("one")


def test_digests_follow_the_content():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = model_digest(net)
    assert model_digest(net) == before
    net[1].running_mean += 1
    assert model_digest(net) != before
    data = [{"x": torch.ones(2), "n": 3}, (torch.zeros(2, 2), "label")]
    assert data_digest(data) == data_digest([{"x": torch.ones(2), "n": 3}, data[1]])
    for other in (
        [data[0]],
        [{"x": torch.ones(2).half(), "n": 3}, data[1]],
        [{"x": torch.ones(1, 2), "n": 3}, data[1]],
        [{"x": torch.ones(2), "n": 4}, data[1]],
        [{"y": torch.ones(2), "n": 3}, data[1]],
    ):
        assert data_digest(other) != data_digest(data)
    assert data_digest([torch.ones(4)[::2]]) == data_digest([torch.ones(2)])
