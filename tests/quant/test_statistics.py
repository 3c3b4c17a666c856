import pytest
import torch
from torch import nn

from torsh_quant._statistics import Collector

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5, bias=False), (3, 4, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, bias=False), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2, bias=False), (3, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, padding="same", groups=2, bias=False), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 6)),
    "reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False),
        (2, 2, 5, 5),
    ),
    "replicate": (
        lambda: nn.Conv1d(4, 6, 3, padding=2, groups=2, padding_mode="replicate", bias=False),
        (2, 4, 7),
    ),
    "circular": (
        lambda: nn.Conv3d(2, 3, 3, padding=(1, 2, 0), padding_mode="circular", bias=False),
        (2, 2, 4, 5, 4),
    ),
    "same": (
        lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2, bias=False),
        (2, 2, 11),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, bias=False), (2, 2, 5, 4, 6)),
}


def gathered(layer, *batches, mask=None):
    collector = Collector(layer)
    for x in batches:
        collector.observe(x, mask)
    return collector.statistics()


@pytest.mark.parametrize("kind", LAYERS)
def test_moments_give_the_squares_and_means_of_outputs(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double().eval()
    batches = [torch.randn(shape).double() + 0.5 for _ in range(3)]
    batches[0] *= 4
    found = gathered(layer, *(x.float() for x in batches))
    dim = -1 if kind == "linear" else 1
    outputs = torch.cat([layer(x).movedim(dim, -1).flatten(0, -2) for x in batches])
    weight = layer.weight.detach().flatten(1)
    assert found.rows == len(outputs)
    # float32 products of up to some ten numbers each
    torch.testing.assert_close(
        found.error(weight), outputs.square().mean(0).detach(), rtol=1e-5, atol=1e-8
    )
    largest = torch.cat(batches).abs().movedim(dim, 0).flatten(1).amax(1)
    assert torch.equal(found.largest, largest.float())
    parts = weight.unflatten(0, (len(found.mean), -1))
    means = (parts * found.mean.double()[:, None]).sum(2).flatten()
    torch.testing.assert_close(means, outputs.mean(0).detach(), rtol=1e-4, atol=1e-6)


def test_padding_is_left_out():
    layer = nn.Linear(4, 2)
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    found = gathered(layer, x, mask=mask)
    assert found.rows == 4
    rows = x[mask]
    torch.testing.assert_close(found.hessian[0], rows.T @ rows / 4)
    assert gathered(layer, torch.randn(2, 6, 4), mask=mask).rows == 12  # not of these tokens
    x[1, 3] = torch.nan  # what attention makes of nothing but padding
    x[0, 4] = 1e9
    again = gathered(layer, x, mask=mask)
    assert torch.equal(again.hessian, found.hessian)
    assert torch.equal(again.largest, found.largest)
    square = torch.randn(2, 5)  # pooled, with as many features as there were tokens
    assert gathered(nn.Linear(5, 2), square, mask=mask).rows == 2


def test_blocks_and_batches_make_no_difference(monkeypatch):
    from torsh_quant import _statistics

    layer = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(6, 3, 10, 10)
    whole = gathered(layer, x)
    monkeypatch.setattr(_statistics, "_BLOCK", 300)
    parts = gathered(layer, *x.split(2))
    torch.testing.assert_close(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-6)
    assert parts.rows == whole.rows == 600
    monkeypatch.setattr(_statistics, "_MOST_ROWS", 7)
    linear, rows = nn.Linear(3, 2), torch.randn(40, 3)
    torch.testing.assert_close(gathered(linear, rows).hessian[0], rows.T @ rows / 40)


def test_blocks_bound_the_memory():
    from torsh_quant import _statistics

    layer = nn.Conv2d(16, 4, 7, padding=3)
    for shape in ((1, 16, 300, 64), (40, 16, 16, 16)):
        sizes = [rows.numel() for rows in _statistics._rows(layer, torch.zeros(shape))]
        assert sum(sizes) == shape[0] * shape[2] * shape[3] * 16 * 49
        assert max(sizes) <= _statistics._BLOCK  # 16 MiB of 61 and of 32


def test_an_image_without_a_batch():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(3, 6, 6)
    one, batch = gathered(layer, x), gathered(layer, x[None])
    assert torch.equal(one.hessian, batch.hessian)
    assert torch.equal(one.largest, batch.largest)


def test_products_are_exact_whatever_the_settings():
    layer, x = nn.Linear(16, 2), torch.randn(64, 16)
    wanted = gathered(layer, x).hessian
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gathered(layer, x).hessian
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype):
    layer, x = nn.Linear(8, 2), (torch.randn(50, 8) * 300).to(dtype)  # squares beyond float16
    found, wanted = gathered(layer, x), gathered(layer, x.float())
    assert torch.equal(found.hessian, wanted.hessian)
    assert found.mean.dtype == found.largest.dtype == torch.float32


def test_it_goes_on_to_the_same_bits():
    layer = nn.Linear(6, 2)
    batches = [torch.randn(9, 6) for _ in range(4)]
    whole = gathered(layer, *batches)
    first = Collector(layer)
    assert first.state_dict() == {}
    for x in batches[:2]:
        first.observe(x)
    second = Collector(layer)
    state = first.state_dict()
    second.load_state_dict(state)
    for x in batches[2:]:
        first.observe(x)  # must not reach into what was saved
        second.observe(x)
    found = second.statistics()
    assert torch.equal(found.hessian, whole.hessian)
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.largest, whole.largest)
    assert found.rows == whole.rows == 36
    second.load_state_dict({})
    assert second.state_dict() == {}


def test_a_state_of_another_layer_is_refused():
    collector = Collector(nn.Linear(6, 2))
    collector.observe(torch.randn(9, 6))
    state = collector.state_dict()
    with pytest.raises(ValueError, match=r"'products' of state_dict.*\(1, 6, 6\).*\(1, 5, 5\)"):
        Collector(nn.Linear(5, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="must have"):
        Collector(nn.Linear(6, 2)).load_state_dict({"rows": state["rows"]})
    state["sums"] = state["sums"].float()
    with pytest.raises(ValueError, match=r"'sums' of state_dict is torch.float32"):
        collector.load_state_dict(state)


def test_sums_do_not_lose_what_is_small():
    layer = nn.Linear(1, 1)
    collector = Collector(layer)
    collector.observe(
        torch.full((1, 1), 4096.0)
    )  # its square is 2**24: one more is lost in float32
    for _ in range(100):
        collector.observe(torch.ones(1, 1))
    assert collector.statistics().hessian.item() == pytest.approx((2**24 + 100) / 101, rel=1e-7)


def test_what_cannot_be_used_is_refused():
    collector = Collector(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no input was seen"):
        collector.statistics()
    with pytest.raises(ValueError, match="NaN or infinity"):
        collector.observe(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        collector.observe(torch.tensor([[1.0, float("nan")]]))
    collector.observe(torch.empty(0, 2))
    assert collector.state_dict() == {}
    with pytest.raises(ValueError, match="no input was seen"):
        collector.statistics()
    collector.observe(torch.tensor([[1.0, 1e25]]))
    with pytest.raises(ValueError, match=r"reaches 1e\+25, whose square is beyond float32"):
        collector.statistics()
