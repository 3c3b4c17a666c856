import pytest
import torch
from torch import nn

import torsh_nas as nas


def test_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    batches = [torch.randn(16, 3, dtype=torch.float64) for _ in range(5)]
    weight = model[0].weight.clone()
    nas.recalibrate(model, [(x, None) for x in batches])
    hidden = torch.stack([model[0](x) for x in batches])
    # Float64 averages in another order.
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, hidden.var(1).mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(model[0].weight, weight)
    assert all(m.training for m in model.modules())
    assert model[1].momentum == 0.1


def test_a_model_without_statistics_stays_as_it_is() -> None:
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    nas.recalibrate(model, [])
    assert torch.equal(model.weight, before)


def test_refuses_no_data_before_forgetting_anything() -> None:
    norm = nn.BatchNorm1d(1)
    norm(torch.randn(8, 1))
    before = norm.running_mean.clone()
    with pytest.raises(ValueError, match="batches is empty"):
        nas.recalibrate(norm, [])
    assert torch.equal(norm.running_mean, before)
