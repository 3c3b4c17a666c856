import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torsh_quant import Scheme, allocate, measure_latency, quantize, sensitivity
from torsh_quant._allocate import choose_options
from torsh_quant._scores import LayerScore, Sensitivity


def brute_force(options, budget):
    return min(
        (
            math.fsum(loss for _, loss in chosen)
            for chosen in itertools.product(*options)
            if sum(cost for cost, _ in chosen) <= budget
        ),
        default=None,
    )


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 30), st.floats(0, 10, allow_subnormal=False)),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 150),
)
def test_no_other_choice_is_better(options, budget):
    expected = brute_force(options, budget)
    if expected is None:
        return
    numbers = choose_options(options, budget)
    chosen = [one[number] for one, number in zip(options, numbers, strict=True)]
    assert sum(cost for cost, _ in chosen) <= budget
    assert math.fsum(loss for _, loss in chosen) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_large_models_take_seconds():
    generator = torch.Generator().manual_seed(0)
    options = []
    for _ in range(200):
        size = int(torch.randint(10**4, 10**8, (), generator=generator))
        scale = 10 ** (4 * torch.rand((), generator=generator).item())
        options.append(
            [
                (size * bits // 8, scale * 4.0**-bits * (0.5 + noise))
                for bits, noise in zip(
                    (2, 3, 4, 5, 6, 8), torch.rand(6, generator=generator).tolist(), strict=True
                )
            ]
        )  # fmt: skip
    budget = sum(one[2][0] for one in options)
    numbers = choose_options(options, budget)
    chosen = [one[number] for one, number in zip(options, numbers, strict=True)]
    assert sum(cost for cost, _ in chosen) <= budget
    assert sum(loss for _, loss in chosen) < sum(one[2][1] for one in options)


def scores(**layers):
    """`name=(weights, {scheme: score})`."""
    rows = [
        LayerScore(
            name, scheme, value, weights * int(scheme[1]) // 8 + 4, 4, weights * 4 + 4, weights
        )
        for name, (weights, values) in layers.items()
        for scheme, value in values.items()
    ]  # fmt: skip
    return Sensitivity("mse", 10, tuple(rows))


SMALL = scores(
    a=(1000, {"w8a16": 0.0, "w4a16": 1.0, "w2a16": 9.0}),
    b=(1000, {"w8a16": 0.0, "w4a16": 4.0, "w2a16": 5.0}),
    c=(1000, {"w8a16": 0.5, "w4a16": 2.0, "w2a16": 3.0}),
)


def names(chosen):
    return {layer: "float" if one is None else str(one) for layer, one in chosen.items()}


def test_each_budget():
    expected = {"a": "w4a16", "b": "w8a16", "c": "w2a16"}
    assert names(allocate(SMALL, bits=14 / 3)) == expected
    assert names(allocate(SMALL, mbytes=(14 * 125 + 12) / 1e6)) == expected
    seconds = {(row.layer, row.scheme): (row.nbytes - 4) * 1e-6 for row in SMALL.rows}
    assert names(allocate(SMALL, latency=14 * 125e-6, seconds=seconds)) == expected
    assert set(names(allocate(SMALL, bits=8)).values()) == {"w8a16"}
    assert all(isinstance(one, Scheme) for one in allocate(SMALL, bits=8).values())


def test_float_is_a_choice_where_allowed():
    assert names(allocate(SMALL, bits=40, allow_float=True)) == dict.fromkeys("abc", "float") | {
        "a": names(allocate(SMALL, bits=40, allow_float=True))["a"],
        "b": names(allocate(SMALL, bits=40, allow_float=True))["b"],
    }
    assert names(allocate(SMALL, bits=40, allow_float=True))["c"] == "float"


def test_tied_layers_get_one_scheme():
    chosen = allocate(SMALL, bits=14 / 3, tied=[("a", "b")])
    assert chosen["a"] == chosen["b"]
    chosen = allocate(SMALL, bits=14 / 3, tied=[("a", "b"), ("b", "c")])
    assert len(set(names(chosen).values())) == 1
    with pytest.raises(ValueError, match="tied names no layer that was measured: 'q_proj'"):
        allocate(SMALL, bits=4, tied=[("q_proj",)])


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"bits=1.5 cannot be met .*the least is 2$"):
        allocate(SMALL, bits=1.5)
    with pytest.raises(ValueError, match="give one of bits=, mbytes= and latency="):
        allocate(SMALL)
    with pytest.raises(ValueError, match=r"\['bits', 'mbytes'\]"):
        allocate(SMALL, bits=3, mbytes=1)
    with pytest.raises(ValueError, match="latency= and seconds= go together"):
        allocate(SMALL, latency=1)
    with pytest.raises(ValueError, match="bits=-1"):
        allocate(SMALL, bits=-1)
    with pytest.raises(ValueError, match="seconds has no 'a' with 'w8a16'"):
        allocate(SMALL, latency=1, seconds={})


def test_a_real_net_at_mean_bits(digits):
    found = sensitivity(
        digits.net, digits.images[:256].split(64), ["w2a16", "w3a16", "w4a16", "w8a16"], score="kl"
    )
    budget = 8 * sum(r.nbytes - r.nbytes_bias for r in found.rows if r.scheme == "w3a16")
    budget /= sum({r.layer: r.weights for r in found.rows}.values())
    chosen = allocate(found, bits=budget)
    mixed = quantize(digits.net, overrides=chosen)
    even = quantize(digits.net, "w3a16")
    assert mixed.quant_report.bytes_after <= even.quant_report.bytes_after
    even_loss = sum(found.value(layer, "w3a16") for layer in chosen)
    assert sum(found.value(layer, str(one)) for layer, one in chosen.items()) <= even_loss
    assert digits.accuracy(mixed) >= digits.accuracy(even) - 0.01


def test_exact_names_win_over_patterns():
    net = nn.ModuleDict({"fc": nn.Linear(4, 4), "part": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    small = quantize(net.eval(), overrides={"part.fc": "w4a16", "fc": "w2a16"})
    assert {row.layer: row.scheme for row in small.quant_report.rows} == {
        "fc": "w2a16",
        "part.fc": "w4a16",
    }


def test_measured_seconds_fit_in(digits):
    found = measure_latency(digits.net, [digits.images[:8]], ["w8a8-static", "w4a16"], repeats=3)
    assert {scheme for _, scheme in found} == {"float", "w8a8-static", "w4a16"}
    assert len(found) == 15
    assert all(0 < value < 1 for value in found.values())
    with pytest.raises(ValueError, match="data is empty"):
        measure_latency(digits.net, [], ["w8a8"])
