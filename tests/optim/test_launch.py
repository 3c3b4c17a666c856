"""The launch table, and what a step costs on a GPU."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from torsh_optim import LAMB, SGD, AdamW, AdvancedAdam, Lion
from torsh_optim._launch import _AT_CONSTANTS, _AT_ENTRIES, _AT_FACTORS, _block_map
from torsh_optim._plan import Hypers


def test_block_map_by_hand() -> None:
    assert _block_map(torch.tensor([5, 0, 4, 9]), 4).tolist() == [
        [0, 0], [0, 1], [2, 0], [3, 0], [3, 1], [3, 2],
    ]  # fmt: skip
    assert _block_map(torch.tensor([0]), 4).shape == (0, 2)


def _params(device: str, count: int = 12, **options: Any) -> list[Tensor]:
    params: list[Tensor] = [
        torch.nn.Parameter(torch.randn(100 * i + 1, device=device, **options)) for i in range(count)
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, and of the rules of ``update``."""
    from torsh_optim import _launch

    names: list[str] = []
    call = _launch._Start.__call__

    def counted(start: Any) -> None:
        name = start._kernel.__name__
        rules = [arg for arg in start.args if isinstance(arg, str)]
        names.append(":".join([name, *rules]))
        call(start)

    monkeypatch.setattr(_launch._Start, "__call__", counted)
    return names


def test_one_launch_for_all_groups(triton_adamw: type[AdamW], launched: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = _params(device)
    opt = triton_adamw(
        [
            {"params": [p], "lr": 0.01 * i, "betas": (0.1 * (i % 3), 0.9), "amsgrad": i % 2 == 0}
            for i, p in enumerate(params[:-2])
        ]
    )
    for _ in range(3):
        opt.step()
    assert launched == ["update:adam"] * 3
    opt.add_param_group({"params": params[-2:]})
    opt.step()
    assert launched == ["update:adam"] * 4
    opt.add_param_group({"params": _params(device, 3, dtype=torch.bfloat16)})
    opt.step()
    assert launched == ["update:adam"] * 6  # one for each element type


def test_launches_with_the_norm(triton_adamw: type[AdamW], launched: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opt = triton_adamw(_params(device), max_grad_norm=1.0)
    opt.step()
    assert launched == ["update:norm", "total", "advance:bias", "update:adam"]


def test_only_what_changed_is_sent(triton_adamw: type[AdamW]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = _params(device)
    opt = triton_adamw([{"params": params[:5]}, {"params": params[5:], "betas": (0.8, 0.9)}])
    opt.step()
    assert opt._plan is not None
    bucket: Any = opt._plan.buckets[0]
    grads: list[Tensor | None] = [param.grad for param in params]
    groups = opt.param_groups

    def write(grads: list[Tensor | None], *, rates: tuple[float, float] = (1e-3, 1e-3)) -> Any:
        bucket._dirty = _AT_FACTORS
        bucket._write_constants(Hypers(groups, False, list(rates)))
        bucket._write_entries(Hypers(groups, False, list(rates)), grads, steps)
        return bucket._dirty, bucket._keys

    steps = [2.0] * len(params)
    factors, entries, constants = _AT_FACTORS, _AT_ENTRIES, _AT_CONSTANTS
    assert write(grads) == (factors, [(0, 2.0), (1, 2.0)])
    assert write(grads, rates=(1e-2, 1e-3)) == (constants, [(0, 2.0), (1, 2.0)])
    assert write(grads, rates=(1e-2, 1e-3))[0] == factors
    steps = [1.0, *[2.0] * (len(params) - 1)]
    assert write([None, *grads[1:]], rates=(1e-2, 1e-3)) == (entries, [(0, 2.0), (1, 2.0)])
    assert write(grads, rates=(1e-2, 1e-3)) == (entries, [(0, 1.0), (0, 2.0), (1, 2.0)])
    assert bucket._host_entries[:, 1].tolist() == [0, 1, 1, 1, 1, *[2] * 7]


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_gradients_that_stay_where_they_are(
    triton_adamw: type[AdamW], max_grad_norm: float | None
) -> None:
    """Only factors, constants or entries are sent, and each when it has to be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = _params(device)
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in mine]
    for a, b in zip(mine, theirs, strict=True):
        b.grad = a.grad
    options = {"lr": 0.1, "warmup_steps": 4, "max_grad_norm": max_grad_norm}
    ours, reference = triton_adamw(mine, **options), AdamW(theirs, fused=False, **options)
    kept = mine[3].grad
    for step in range(9):
        for opt, params in ((ours, mine), (reference, theirs)):
            if step == 3:
                opt.param_groups[0]["lr"] = 0.05
            if step == 5:
                opt.param_groups[0]["betas"] = (0.5, 0.9)
            params[3].grad = None if step == 7 else kept
            opt.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)  # a few roundings of the step


@pytest.mark.gpu
@pytest.mark.parametrize(
    "build",
    [
        lambda p: AdamW(p, amsgrad=True, fused=True),
        lambda p: AdamW(p, max_grad_norm=1.0, warmup_steps=20),
        lambda p: AdvancedAdam(p, cautious=True, ema_decay=0.9, max_grad_norm=1.0),
        lambda p: AdvancedAdam(p, adaptive_lr=True),
        LAMB,
        lambda p: LAMB(p, max_grad_norm=None),
        Lion,
        lambda p: SGD(p, momentum=0.9, max_grad_norm=1.0),
        lambda p: AdamW([{"params": p[:4]}, {"params": p[4:], "weight_decay": 0.0}]),
    ],
)
def test_steps_do_not_synchronise_or_allocate(
    build: Callable[[list[Tensor]], torch.optim.Optimizer],
    forbid_synchronisation: Callable[[], AbstractContextManager[None]],
) -> None:
    opt = build(_params("cuda"))
    for _ in range(8):  # compiles, and goes once around the ring
        opt.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with forbid_synchronisation():
        for step in range(8):
            opt.param_groups[0]["lr"] = 1e-3 / (1 + step)
            opt.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_profiler_sees_one_kernel() -> None:
    from torch.profiler import ProfilerActivity, profile

    params = _params("cuda")
    opt = AdamW([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params)])
    for _ in range(3):
        opt.step()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            opt.step()
            torch.cuda.synchronize()
    kernels = [
        event.name
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Optimizer", "Memset"))
    ]
    assert kernels == ["update"]


@pytest.mark.gpu
def test_learning_rate_on_the_device(
    forbid_synchronisation: Callable[[], AbstractContextManager[None]],
) -> None:
    rate = torch.tensor(0.1, device="cuda")
    first, second = (torch.nn.Parameter(torch.zeros(40, device="cuda")) for _ in range(2))
    opt = AdamW([{"params": [first], "lr": rate}, {"params": [second]}], lr=0.5, weight_decay=0)
    for param in (first, second):
        param.grad = torch.ones(40, device="cuda")
    opt.step()
    torch.cuda.synchronize()
    with forbid_synchronisation():
        rate.fill_(0.2)
        opt.step()
    torch.testing.assert_close(first, torch.full_like(first, -0.3))
    torch.testing.assert_close(second, torch.full_like(second, -1.0))


@pytest.mark.gpu
def test_table_is_safe_when_the_host_runs_ahead_and_streams_change() -> None:
    """Hundreds of steps queued behind a long kernel, from two streams, equal the slow way."""
    mine, theirs = _params("cuda"), []
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours, reference = AdamW(mine), AdamW(theirs, fused=False)
    grads = [[torch.randn_like(p) for p in mine] for _ in range(4)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(50_000_000)
    for step in range(40):
        for i, param in enumerate(mine):
            param.grad = grads[step % 4][i]
        with torch.cuda.stream(streams[step // 10 % 2]):
            ours.step()
    torch.cuda.synchronize()
    for step in range(40):
        for i, param in enumerate(theirs):
            param.grad = grads[step % 4][i]
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # forty steps of rounding


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_is_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(8, device="cuda"))
    param.grad = torch.ones_like(param)
    opt = AdamW([param])
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        opt.step()


@pytest.mark.gpu
def test_moved_to_the_gpu_after_construction() -> None:
    linear = torch.nn.Linear(4, 4)
    opt = AdamW(linear.parameters())
    assert opt.implementation == "cpu-fused"
    linear.cuda()
    assert opt.implementation == "triton"
    linear(torch.ones(1, 4, device="cuda")).sum().backward()
    opt.step()
    assert opt.state[linear.weight]["exp_avg"].is_cuda
    assert opt.state[linear.weight]["step"].is_cpu


@pytest.mark.gpu(2)
def test_two_devices() -> None:
    params = [torch.nn.Parameter(torch.zeros(100, device=f"cuda:{i}")) for i in (0, 1)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = AdamW(params, lr=0.1, weight_decay=0)
    opt.step()
    for param in params:
        torch.testing.assert_close(param, torch.full_like(param, -0.1))
