import gc

import pytest
import torch
from torch import nn

import torsh_nas as nas


def test_larger_takes_longer() -> None:
    x = torch.randn(64, 1024)
    small, large = (nas.measure(nn.Linear(1024, n), x, min_time_s=0.05) for n in (8, 4096))
    assert large.ms > small.ms > 0


def test_reports_what_it_did() -> None:
    timing = nas.measure(nn.Linear(4, 4), torch.ones(1, 4), min_time_s=0.01, threads=1)
    assert timing.n >= 5
    assert timing.iqr_ms >= 0
    assert timing.device_info.device == "cpu"
    assert timing.device_info.threads == 1
    assert timing.device_info.torch == torch.__version__
    assert timing.as_dict()["device_info"]["name"] == timing.device_info.name


def test_percentiles_are_ordered() -> None:
    low, high = (
        nas.measure(nn.Linear(64, 64), torch.ones(8, 64), percentile=p, min_time_s=0.02).ms
        for p in (0, 100)
    )
    assert low < high


def test_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    threads, stats = torch.get_num_threads(), model[1].running_mean.clone()
    nas.measure(model, torch.ones(4, 2), min_time_s=0.01, threads=1)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.get_num_threads() == threads
    assert torch.equal(model[1].running_mean, stats)
    assert gc.isenabled()


def test_several_inputs() -> None:
    model = nn.Bilinear(2, 3, 4)
    assert nas.measure(model, (torch.ones(5, 2), torch.ones(5, 3)), min_time_s=0.01).ms > 0


def test_refuses_a_model_elsewhere() -> None:
    with pytest.raises(ValueError, match="parameter 'weight' is on meta, but device='cpu'"):
        nas.measure(nn.Linear(1, 1, device="meta"), torch.ones(1, 1))


@pytest.mark.parametrize("option", [{"min_time_s": 0}, {"warmup": -1}, {"percentile": 101}])
def test_refuses_bad_options(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need min_time_s > 0"):
        nas.measure(nn.ReLU(), torch.ones(1), **option)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_waits_for_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    small, large = (
        nas.measure(nn.Linear(4096, n, device="cuda"), x, min_time_s=0.05) for n in (8, 32768)
    )
    # 1.1 TFLOP in fp32: a clock that stops at the launch would read the same for both.
    assert large.ms > 5 * small.ms
    assert large.device_info.device == "cuda"
