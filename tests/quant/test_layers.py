import pytest
from torch import nn

from torsh_quant import model_bytes
from torsh_quant._layers import matches, quantizable_layers, replace_modules, require_matches


class Own(nn.Linear):
    pass


def test_subclasses_and_attention_are_left_alone():
    net = nn.ModuleDict(
        {"a": nn.Linear(2, 2), "own": Own(2, 2), "attention": nn.MultiheadAttention(4, 2)}
    )
    net["again"] = net["a"]
    assert [name for name, _ in quantizable_layers(net)] == ["a"]


def test_a_model_may_be_a_layer():
    layer = nn.Conv2d(1, 1, 1)
    assert list(quantizable_layers(layer)) == [("", layer)]
    other = nn.Identity()
    assert replace_modules(layer, {layer: other}) is other


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("head", True),
        ("blocks.1.head", True),
        ("blocks", True),
        ("blocks.1", True),
        ("blocks.*", True),
        ("*.head", True),
        ("h?ad", True),
        ("ead", False),
        ("block", False),
        ("blocks.2", False),
        ("1", False),
    ],
)
def test_patterns(pattern, found):
    assert matches("blocks.1.head", pattern) is found


def test_pattern_without_a_layer():
    message = r"skip names no layer that can be quantized: 'fc9'; there are 'fc1', 'fc2'$"
    with pytest.raises(ValueError, match=message):
        require_matches("skip", ["fc1", "fc9"], ["fc1", "fc2"])


def test_tied_tensors_count_once():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    assert model_bytes(nn.Sequential(embedding, head)) == 160
