"""Steps over parameters that are spread over processes: real ones, on gloo or NCCL."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.optim.ranks import Ranks, ranks
from tests.optim.sharding import (
    CASES,
    KERNELS,
    STEPS,
    backward,
    batch,
    device,
    even,
    model,
    one_row,
    optimizer_of,
    sharded,
    weights,
    whole,
)
from torsh_optim import AdamW, Lion


@pytest.fixture
def two() -> Ranks:
    return ranks(2)


@pytest.fixture
def two_gpus() -> Ranks:
    return ranks(2, "nccl")


def train_both(case: str, kernels: bool, make: Any, mesh: Any = None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    ours = sharded(make().to(device()), mesh)
    alone = make().to(device())
    opt = optimizer_of(ours, case, kernels=kernels)
    expected = optimizer_of(alone, case)
    for step in range(2 if kernels else STEPS):  # the interpreter is slow
        backward(ours, step, rank, world)
        backward(alone, step, 0, 1)
        fast = {"triton"} if kernels or device().type == "cuda" else {"cpu-fused", "cpu-chunked"}
        assert opt.implementation in fast
        opt.step()
        expected.step()
        if opt.grad_norm is not None:
            # float32 gradients, added up in another order
            torch.testing.assert_close(opt.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        opt.zero_grad()
        expected.zero_grad()
    for p, e in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), e.detach(), rtol=1e-5, atol=1e-6)
        for key, value in expected.state[e].items():
            torch.testing.assert_close(whole(opt.state[p][key]), value, rtol=1e-4, atol=1e-6)
    assert float(opt.skipped_steps) == 0


def count_replicas_once(case: str, kernels: bool) -> None:
    kind = device().type
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        train_both(case, kernels, model, mesh)


def parallel_tensors(case: str) -> None:
    """Column, row and replicated tensors of tensor parallelism: several spreads on one mesh."""
    mesh = init_device_mesh(device().type, (2,))
    ours, alone = even().to(device()), even().to(device())
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(ours, mesh, plan)
    opt, expected = optimizer_of(ours, case), optimizer_of(alone, case)
    for step in range(STEPS):
        backward(ours, step, 0, 1)
        backward(alone, step, 0, 1)
        opt.step()
        expected.step()
        torch.testing.assert_close(opt.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        opt.zero_grad()
        expected.zero_grad()
    for p, e in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), e.detach(), rtol=1e-5, atol=1e-6)


def lay_gradients_out_differently(kernels: bool) -> None:
    """A gradient may be whole, cut elsewhere, or not added up yet; the step is the same."""
    mesh = init_device_mesh(device().type, (2,))
    value, grad = torch.arange(15.0).reshape(5, 3) / 15, torch.linspace(-1, 1, 15).reshape(5, 3)
    results = []
    for placement in (Shard(0), Shard(1), Replicate(), Partial()):
        param = nn.Parameter(distribute_tensor(value.to(device()), mesh, [Shard(0)]))
        opt = optimizer_of(nn.ParameterList([param]), "lamb", kernels=kernels)
        for _ in range(2):
            found = grad.to(device())
            if placement.is_partial():
                found = DTensor.from_local(found / 2, mesh, [placement])
            else:
                found = distribute_tensor(found, mesh, [placement])
            param.grad = found
            opt.step()
        results.append(param.detach().full_tensor())
    for result in results[1:]:
        assert torch.equal(result, results[0])


def refuse() -> None:
    mesh = init_device_mesh(device().type, (2,))
    ones = torch.ones(4, device=device())
    spread = distribute_tensor(ones, mesh, [Shard(0)])

    param = nn.Parameter(DTensor.from_local(ones, mesh, [Partial()]))
    param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match=r"placements \(Partial\(sum\),\).*redistribute\(\)"):
        AdamW([param]).step()

    param = nn.Parameter(ones.clone())
    for opt in (AdamW([param]), Lion([param])):
        for good in (False, True):  # as the first gradient, and as the second
            if good:
                param.grad = torch.ones_like(param)
                opt.step()
            param.grad = spread
            with pytest.raises(RuntimeError, match="is a DTensor, the parameter a plain tensor"):
                opt.step()

    param = nn.Parameter(spread)
    param.grad = ones
    with pytest.raises(RuntimeError, match=r"is a DTensor on .* its gradient is a plain tensor"):
        AdamW([param]).step()


def miss_gradients(case: str, kernels: bool) -> None:
    """A process without gradients still has to take part in the sums of the others."""
    for missing in ((0,), (0, 1, 2, 3)):
        net = sharded(model().to(device()))
        opt = optimizer_of(net, case, kernels=kernels)
        for step in range(1 if kernels else 2):
            backward(net, step, dist.get_rank(), 2)
            square = torch.zeros((), dtype=torch.float64, device=device())
            for i, p in enumerate(net.parameters()):
                if dist.get_rank() == 0 or i not in missing:
                    square += local_part(p.grad).double().square().sum()
            dist.all_reduce(square)
            if dist.get_rank() == 1:
                for i, p in enumerate(net.parameters()):
                    p.grad = None if i in missing else p.grad
            before = [local_part(p.detach()).clone() for p in net.parameters()]
            opt.step()
            torch.testing.assert_close(opt.grad_norm, square.sqrt().float(), rtol=1e-6, atol=0)
            for p, old in zip(net.parameters(), before, strict=True):
                assert p.grad is not None or torch.equal(local_part(p.detach()), old)
            # of several elements a cautious step moves some
            rest = dist.get_rank() == 0 or 0 not in missing
            assert torch.equal(local_part(net[0].weight.detach()), before[0]) != rest
            opt.zero_grad()


def local_part(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local()
    return part


def skip_together(case: str, kernels: bool, value: float, scaled: bool) -> None:
    """What is not finite in one process must keep all from stepping."""
    net = sharded(model().to(device()))
    opt = optimizer_of(net, case, kernels=kernels)
    scaler = torch.amp.GradScaler(device().type, init_scale=4.0, enabled=scaled)
    for step in range(3):
        x, y = (part.chunk(2)[dist.get_rank()].to(device()) for part in batch(step))
        scaler.scale((net(x) - y).square().mean()).backward()
        if step == 1 and dist.get_rank() == 1:
            local_part(net[0].weight.grad)[0, 0] = value
        before = weights(net)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert torch.equal(weights(net), before) == (step == 1)
    assert float(opt.skipped_steps) == 1
    for p in net.parameters():
        assert float(opt.state[p]["step"]) == 2
    assert scaler.get_scale() == (2.0 if scaled else 1.0)


def replicate(case: str) -> None:
    """Replicas of DistributedDataParallel stay bit for bit the same, scales and estimates too."""
    net = nn.parallel.DistributedDataParallel(model().to(device()))
    opt = optimizer_of(net, case)
    for step in range(STEPS):
        backward(net, step, dist.get_rank(), 2)
        opt.step()
        opt.zero_grad()
    held = [p.detach() for p in net.parameters()]
    held += [value.to(device()) for p in net.parameters() for value in opt.state[p].values()]
    held.append(opt.grad_norm)
    for tensor in held:
        other = tensor.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, tensor)
    alone = model().to(device())
    expected = optimizer_of(alone, case)
    for step in range(STEPS):
        backward(alone, step, 0, 1)
        expected.step()
        expected.zero_grad()
    for p, e in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), e.detach(), rtol=1e-5, atol=1e-6)


def two_dimensions(case: str) -> None:
    """Two processes by two: replicas of shards, and shards of tensor-parallel tensors."""
    kind, rank = device().type, dist.get_rank()
    train_both(case, False, model, init_device_mesh(kind, (2, 2), mesh_dim_names=("r", "s")))

    mesh = init_device_mesh(kind, (2, 2), mesh_dim_names=("data", "tensor"))
    ours, alone = even().to(device()), even().to(device())
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(ours, mesh["tensor"], plan)
    sharded(ours, mesh["data"])
    # both dimensions of the mesh cut the rows of the first weight
    assert not any(placement.is_replicate() for placement in ours[0].weight.placements)
    opt, expected = optimizer_of(ours, case), optimizer_of(alone, case)
    for step in range(STEPS):
        backward(ours, step, rank // 2, 2)
        backward(alone, step, 0, 1)
        opt.step()
        expected.step()
        torch.testing.assert_close(opt.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        opt.zero_grad()
        expected.zero_grad()
    for p, e in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), e.detach(), rtol=1e-5, atol=1e-6)
    # a whole state finds its way into tensors that are cut twice
    loaded = optimizer_of(ours, case)
    loaded.load_state_dict(expected.state_dict())
    for p, e in zip(ours.parameters(), alone.parameters(), strict=True):
        for key, value in expected.state[e].items():
            assert torch.equal(whole(loaded.state[p][key]), value), key


def offload() -> None:
    """Shards on the CPU, of a mesh that communicates on CUDA only."""
    net, alone = model().to(device()), model()
    fully_shard(net, offload_policy=CPUOffloadPolicy())
    opt, expected = optimizer_of(net, "lamb"), optimizer_of(alone, "lamb")
    for step in range(STEPS):
        x, y = (part.chunk(2)[dist.get_rank()].to(device()) for part in batch(step))
        (net(x) - y).square().mean().backward()
        backward(alone, step, 0, 1)
        opt.step()
        expected.step()
        torch.testing.assert_close(opt.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        opt.zero_grad()
        expected.zero_grad()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("make", [model, one_row])
def test_fully_sharded_training_is_that_of_one_process(
    two: Ranks, make: Any, kernels: bool
) -> None:
    for case in CASES:
        two.run(train_both, case, kernels, make)


@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_replicas_are_counted_once(two: Ranks, case: str) -> None:
    two.run(count_replicas_once, case, False)


@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_tensor_parallel_training_is_that_of_one_process(two: Ranks, case: str) -> None:
    two.run(parallel_tensors, case)


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_that_lie_differently_are_redistributed(two: Ranks, kernels: bool) -> None:
    two.run(lay_gradients_out_differently, kernels)


def test_refuses_what_has_no_value_here(two: Ranks) -> None:
    two.run(refuse)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_gradients_missing_in_one_process_do_not_stop_the_others(
    two: Ranks, case: str, kernels: bool
) -> None:
    two.run(miss_gradients, case, kernels)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_all_processes_skip_a_step_that_is_not_finite_in_one(
    two: Ranks, case: str, kernels: bool, scaled: bool
) -> None:
    two.run(skip_together, case, kernels, float("inf" if scaled else "nan"), scaled)


@pytest.mark.parametrize("case", ["adamw-clip", "adaptive", "lamb"])
def test_replicas_stay_the_same(two: Ranks, case: str) -> None:
    two.run(replicate, case)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_a_step_without_any_gradient(case: str, kernels: bool) -> None:
    net = model()
    opt = optimizer_of(net, case, kernels=kernels)
    before = weights(net)
    opt.step()
    assert torch.equal(weights(net), before)
    assert float(opt.grad_norm) == 0
    assert not opt.state


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_two_dimensional_meshes(case: str) -> None:
    ranks(4).run(two_dimensions, case)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("make", [model, one_row])
@pytest.mark.parametrize("case", CASES)
def test_fully_sharded_training_on_gpus(two_gpus: Ranks, case: str, make: Any) -> None:
    two_gpus.run(train_both, case, False, make)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case", ["cautious", "adaptive", "lamb"])
def test_sums_of_shards_on_gpus(two_gpus: Ranks, case: str) -> None:
    two_gpus.run(count_replicas_once, case, False)
    two_gpus.run(parallel_tensors, case)
    two_gpus.run(miss_gradients, case, False)
    two_gpus.run(skip_together, case, False, float("inf"), True)
    two_gpus.run(replicate, case)


@pytest.mark.gpu(2)
def test_offloaded_shards(two_gpus: Ranks) -> None:
    two_gpus.run(offload)
