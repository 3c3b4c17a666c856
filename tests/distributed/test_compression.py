import copy
import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import battery
from torsh_dist import Cast, Compression, Int8, Step, compress, init, launch
from torsh_dist._lane import Lane


def network(width: int = 96) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(40, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )


def backward(model: nn.Module, generator: torch.Generator, scale: float = 1.0) -> None:
    x = torch.randn(8, 40, generator=generator) * scale
    model.zero_grad()
    model(x).square().sum().backward()


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(dist.get_rank())


def exact_mean(model: nn.Module, twin: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """Every parameter's averaged gradient in float64, by way of a bare copy of the model."""
    backward(twin, generator)
    means = [param.grad.double() for param in twin.parameters()]
    for mean in means:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return means


def same_everywhere(model: nn.Module) -> bool:
    prints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(prints, battery.fingerprint(model))
    return len(set(prints)) == 1


def averages_are_never_mixed_up():
    """50 steps with a bucket per layer: every gradient is the mean of its own."""
    for method, bound in ((Int8(), 0.03), (Int8(group_size=32), 0.03), (Cast(), 0.01)):
        bare = network()
        model = DistributedDataParallel(copy.deepcopy(bare), bucket_cap_mb=0.002)
        compression = compress(model, method)
        ours, theirs = own_generator(), own_generator()
        for _ in range(50 if method == Int8() else 5):
            backward(model, ours)
            for param, mean in zip(
                model.parameters(), exact_mean(model, bare, theirs), strict=True
            ):
                assert param.grad is not None
                error = (param.grad.double() - mean).norm() / mean.norm()
                assert error < bound, (method, error)
        assert len(compression._plans) > 2  # several buckets were on their way at a time


def error_feedback_telescopes():
    """What arrived plus what is owed on average is what was meant, over 30 steps."""
    bare = network()
    model = DistributedDataParallel(copy.deepcopy(bare), bucket_cap_mb=0.02)
    compression = compress(model, Int8())
    ours, theirs = own_generator(), own_generator()
    arrived = {name: torch.zeros_like(p).double() for name, p in bare.named_parameters()}
    meant = copy.deepcopy(arrived)
    for _ in range(30):
        backward(model, ours)
        means = exact_mean(model, bare, theirs)
        for name, mean in zip(arrived, means, strict=True):
            arrived[name] += model.module.get_parameter(name).grad
            meant[name] += mean
    residual = compression.state_dict()["residual"]
    assert sorted(residual) == ["0.weight", "2.weight"]  # 4.weight has 960 values, biases fewer
    for name, mean in meant.items():
        owed = torch.zeros_like(mean)
        if name in residual:
            owed = residual[name].double().view_as(mean)
            dist.all_reduce(owed)
            owed /= dist.get_world_size()
            assert owed.norm() > 1e-4 * mean.norm()
        # Each step adds and averages in fp32: 30 roundings of 6e-8 of values of mean size.
        torch.testing.assert_close(arrived[name] + owed, mean, rtol=1e-5, atol=2e-5)


def replicas_stay_equal_bit_for_bit():
    for method in (Int8(), Int8(group_size=1024), Cast(), Cast(torch.float16)):
        model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
        compress(model, method)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = own_generator()
        for _ in range(10):
            backward(model, generator)
            optimizer.step()
            assert same_everywhere(model), method


def bytes_are_counted_at_the_collective():
    world = dist.get_world_size()
    for method, limit in ((Int8(), 0.27), (Cast(), 0.51)):
        model = DistributedDataParallel(network(512))
        compression = compress(model, method)
        assert compression.stats().ratio == 1.0
        for _ in range(3):
            backward(model, own_generator())
        stats = compression.stats()
        numel = sum(param.numel() for param in model.parameters())
        assert stats.steps == 3
        assert stats.bytes_uncompressed == round(3 * 2 * (world - 1) / world * 4 * numel)
        assert stats.bytes_sent == stats.bytes_exchange + stats.bytes_gather
        assert stats.bytes_exchange == stats.bytes_gather
        assert stats.bytes_sent <= limit * stats.bytes_uncompressed
        # No fewer than one byte a value, or two: nothing was left out.
        least = numel * (1 if isinstance(method, Int8) else 2)
        assert stats.bytes_sent >= 3 * 2 * (world - 1) / world * least
        assert (stats.residual_norm > 0) == isinstance(method, Int8)


def a_nan_reaches_every_rank_and_no_residual():
    for value in (float("nan"), float("inf")):
        model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
        compression = compress(model, Int8())
        generator = own_generator()
        backward(model, generator)
        backward(model, generator, value if dist.get_rank() == dist.get_world_size() - 1 else 1.0)
        grads = [param.grad for param in model.parameters()]
        assert any(bool(grad.isnan().any()) for grad in grads)
        twin = copy.deepcopy(model.module)
        for param, grad in zip(twin.parameters(), grads, strict=True):
            param.data = grad.nan_to_num(nan=12345.0)
        assert same_everywhere(twin)
        residual = compression.state_dict()["residual"].values()
        assert all(bool(owed.isfinite().all()) for owed in residual)
        backward(model, generator)
        assert all(bool(param.grad.isfinite().all()) for param in model.parameters())


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def a_skipped_step_leaves_the_error_feedback_alone():
    """The bad value is in the last layer's bias, which travels first and uncompressed."""
    losses = {}
    for method in (None, Int8()):
        model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
        compression = compress(model, method)
        step = Step(model, torch.optim.SGD(model.parameters(), lr=0.02), squares)
        generator = own_generator()
        losses[method] = []
        for number in range(12):
            x = torch.randn(8, 40, generator=generator)
            y = torch.randn(8, 10, generator=generator)
            if number in (0, 4, 5):
                x = x * 1e4
                # The last is finite in every value: only its norm is not.
                y[0, 0] = {0: float("nan"), 4: float("inf"), 5: 1e22}[number] * (
                    dist.get_rank() == 0
                )
            before = compression.state_dict()["residual"]
            result = step((x, y))
            after = compression.state_dict()["residual"]
            assert bool(result.skipped) == (number in (0, 4, 5)), number
            if method is None:
                pass
            elif number == 0:
                assert len(after) == 2
                assert not any(bool(owed.any()) for owed in after.values())
            else:
                assert before.keys() == after.keys()
                for name, owed in after.items():
                    assert torch.equal(owed, before[name]) == bool(result.skipped), (number, name)
            if not result.skipped:
                losses[method].append(float(result.loss))
        assert same_everywhere(model)
    assert losses[Int8()] == pytest.approx(losses[None], rel=0.01)


def a_saved_state_goes_on_bit_for_bit():
    def fresh():
        model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
        compression = compress(model, Int8(), warmup=1)
        return model, compression, torch.optim.AdamW(model.parameters(), lr=1e-2), own_generator()

    def train(parts, steps):
        model, _, optimizer, generator = parts
        for _ in range(steps):
            backward(model, generator)
            optimizer.step()

    straight = fresh()
    train(straight, 9)
    stopped, resumed = fresh(), fresh()
    train(stopped, 4)
    for ours, saved in zip(resumed[:3], stopped[:3], strict=True):
        ours.load_state_dict(saved.state_dict())
    resumed[3].set_state(stopped[3].get_state())
    train(resumed, 5)
    assert battery.fingerprint(resumed[0]) == battery.fingerprint(straight[0])
    ours, theirs = resumed[1].state_dict(), straight[1].state_dict()
    assert ours["steps"] == theirs["steps"] == 9
    for name, owed in theirs["residual"].items():
        assert torch.equal(ours["residual"][name], owed)


def buckets_do_not_matter():
    """The same training bit for bit with one bucket and with one per layer."""
    prints = set()
    for megabytes in (25, 0.01):
        model = DistributedDataParallel(network(), bucket_cap_mb=megabytes)
        compress(model, Int8())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        generator = own_generator()
        for _ in range(5):
            backward(model, generator)
            optimizer.step()
        prints.add(battery.fingerprint(model))
    assert len(prints) == 1


def another_world_size_takes_the_mean():
    world = dist.get_world_size()
    model = DistributedDataParallel(network())
    compression = compress(model, Int8())
    backward(model, own_generator())
    state = compression.state_dict()
    old = []
    for rank in range(world + 1):
        residual = {name: torch.full_like(v, float(rank)) for name, v in state["residual"].items()}
        old.append({**state, "rank": rank, "world_size": world + 1, "residual": residual})
    compression.load_state_dict(old)
    for owed in compression.state_dict()["residual"].values():
        assert bool((owed == world / 2).all())
    with pytest.raises(ValueError, match="the world size is now"):
        compression.load_state_dict(old[0])
    with pytest.raises(ValueError, match="pass this rank's state"):
        compression.load_state_dict({**state, "rank": (state["rank"] + 1) % world})
    with pytest.raises(ValueError, match="state has version 99"):
        compression.load_state_dict({**state, "version": 99})
    with pytest.raises(ValueError, match="method Cast"):
        compression.load_state_dict({**state, "method": repr(Cast())})
    with pytest.raises(ValueError, match=r"'0\.weight' has 3 values, the model has 3840"):
        compression.load_state_dict({**state, "residual": {"0.weight": torch.ones(3)}})
    with pytest.raises(ValueError, match="state has keys"):
        compression.load_state_dict({"version": 1})


def warm_up_sends_exactly():
    bare = network()
    model = DistributedDataParallel(copy.deepcopy(bare))
    compression = compress(model, Int8(), warmup=2)
    ours, theirs = own_generator(), own_generator()
    for number in range(4):
        backward(model, ours)
        means = exact_mean(model, bare, theirs)
        close = [
            torch.allclose(param.grad.double(), mean, rtol=1e-6, atol=1e-6)
            for param, mean in zip(model.parameters(), means, strict=True)
        ]
        assert all(close) == (number < 2), (number, close)
    stats = compression.stats()
    assert 0.6 < stats.ratio < 0.67  # two steps of four at 1, two at 0.27


def narrow_gradients_are_averaged_in_fp32():
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(1)
        bare = nn.Linear(64, 64, bias=False).to(dtype)
        model = DistributedDataParallel(copy.deepcopy(bare))
        compression = compress(model, Int8())
        x = torch.randn(8, 64, generator=own_generator()).to(dtype)
        model(x).square().sum().backward()
        bare(x).square().sum().backward()
        mean = bare.weight.grad.double()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        error = float((model.module.weight.grad.double() - mean).norm() / mean.norm())
        assert model.module.weight.grad.dtype == dtype
        assert error < (1e-15 if dtype == torch.float64 else 0.02)
        assert (compression.stats().ratio > 0.9) == (dtype == torch.float64)
        assert same_everywhere(model)


def disagreement_is_refused_everywhere():
    model = DistributedDataParallel(network())
    with pytest.raises(ValueError, match=r"rank\(s\) \[.*1.*\] have another model, method"):
        compress(model, Int8(), min_numel=100 + 1 * (dist.get_rank() == 1))


def a_second_hook_is_refused():
    model = DistributedDataParallel(network())
    compress(model, Int8())
    with pytest.raises(RuntimeError, match="has a communication hook already"):
        compress(model, Cast())


def accumulation_sends_nothing_between():
    model = DistributedDataParallel(network())
    compression = compress(model, Int8())
    step = Step(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        lambda model, x: model(x).square().mean(),
        accumulate=4,
    )
    step(torch.randn(8, 40))
    step(torch.randn(8, 40))
    assert compression.stats().steps == 2
    assert same_everywhere(model)


def train_on_digits(method, epochs):
    from sklearn.datasets import load_digits  # here: the other groups of processes start faster

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images).float() / 16, torch.tensor(labels)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(net, bucket_cap_mb=0.02)
    compression = compress(model, method)
    step = Step(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    order = torch.Generator().manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(64):
            step((images[index[rank::world]], labels[index[rank::world]]))
    return float(step.eval((images[rank::world], labels[rank::world]))), compression.stats()


def int8_reaches_the_uncompressed_loss_on_digits():
    plain, _ = train_on_digits(None, 4)
    compressed, stats = train_on_digits(Int8(), 4)
    # Error feedback delays what rounding lost by a step or two: the loss is within 2 %.
    assert plain < 0.2
    assert compressed == pytest.approx(plain, rel=0.02)
    assert stats.ratio < 0.3


SHAPES = [
    averages_are_never_mixed_up,
    error_feedback_telescopes,
    replicas_stay_equal_bit_for_bit,
    bytes_are_counted_at_the_collective,
    a_nan_reaches_every_rank_and_no_residual,
    a_skipped_step_leaves_the_error_feedback_alone,
    a_saved_state_goes_on_bit_for_bit,
    buckets_do_not_matter,
    another_world_size_takes_the_mean,
    disagreement_is_refused_everywhere,
]
CHECKS = [
    *SHAPES,
    warm_up_sends_exactly,
    narrow_gradients_are_averaged_in_fp32,
    a_second_hook_is_refused,
    accumulation_sends_nothing_between,
    int8_reaches_the_uncompressed_loss_on_digits,
]


@pytest.fixture(scope="module")
def two_ranks():
    return launch(battery.run, CHECKS, device="cpu", timeout=120)


@pytest.fixture(scope="module")
def three_ranks():
    return launch(battery.run, SHAPES, nproc=3, device="cpu", timeout=180)


@pytest.fixture(scope="module")
def four_ranks():
    return launch(battery.run, SHAPES, nproc=4, device="cpu", timeout=240)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks(two_ranks, check):
    battery.judge(two_ranks, check)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in SHAPES])
def test_three_ranks(three_ranks, check):
    battery.judge(three_ranks, check)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in SHAPES])
def test_four_ranks(four_ranks, check):
    battery.judge(four_ranks, check)


@pytest.fixture
def alone():
    with init("cpu"):
        yield DistributedDataParallel(network())


def test_one_process_or_no_method_changes_nothing(alone, caplog):
    for method, why in ((Int8(), "one process"), (None, "method is None")):
        compression = compress(alone, method)
        assert why in caplog.messages[-1]
        assert caplog.records[-1].levelno == logging.INFO
        backward(alone, torch.Generator())
        assert compression.stats().bytes_sent == 0
        compression.load_state_dict(compression.state_dict())


def test_refuses_arguments(alone):
    with pytest.raises(TypeError, match="model is a Sequential; wrap it first"):
        compress(network(), Int8())
    with pytest.raises(TypeError, match="method='int8' is not Int8"):
        compress(alone, "int8")
    with pytest.raises(ValueError, match="min_numel=-1 is negative"):
        compress(alone, Int8(), min_numel=-1)
    with pytest.raises(ValueError, match="warmup=-1 is negative"):
        compress(alone, Int8(), warmup=-1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_both_phases_run_in_a_world_of_one(device):
    """compress() leaves them out there; the lane, the codec and DDP's futures work all the same."""
    with init(device) as context:
        bare = network(512).to(context.device)
        model = DistributedDataParallel(copy.deepcopy(bare), bucket_cap_mb=0.1)
        names = {param: name for name, param in model.module.named_parameters()}
        lane = Lane(dist.group.WORLD, context.device)
        compression = Compression(names, Int8(), lane, 1024, 0)
        model.register_comm_hook(lane, compression._hook)
        for _ in range(10):
            x = torch.randn(8, 40).to(context.device)
            for one in (model, bare):
                one.zero_grad()
                one(x).square().sum().backward()
            for param, other in zip(model.parameters(), bare.parameters(), strict=True):
                assert (param.grad - other.grad).norm() < 0.03 * other.grad.norm()
        stats = compression.stats()
        assert (stats.steps, stats.bytes_sent) == (10, 0)
        assert stats.residual_norm > 0


def on_cuda():
    context = init("cuda")
    torch.manual_seed(0)
    bare = network(512).to(context.device)
    for method, bound in ((Int8(), 0.03), (Cast(), 0.01)):
        model = DistributedDataParallel(copy.deepcopy(bare), bucket_cap_mb=0.1)
        compression = compress(model, method)
        generator = own_generator()
        for _ in range(20):
            x = torch.randn(8, 40, generator=generator).to(context.device)
            for one in (model, bare):
                one.zero_grad()
                one(x).square().sum().backward()
            for param, other in zip(model.parameters(), bare.parameters(), strict=True):
                mean = other.grad.double()
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
                assert (param.grad.double() - mean).norm() / mean.norm() < bound
        assert same_everywhere(model.module.cpu())
        assert compression.stats().ratio < (0.3 if isinstance(method, Int8) else 0.55)


@pytest.mark.gpu(2)
def test_two_gpus():
    battery.judge(launch(battery.run, [on_cuda], device="cuda", timeout=120), "on_cuda")
