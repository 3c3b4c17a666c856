"""Saving and loading states that are spread over processes, on gloo or NCCL."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from tests.optim.ranks import Ranks, ranks
from tests.optim.sharding import (
    CASES,
    KERNELS,
    backward,
    batch,
    device,
    model,
    optimizer_of,
    sharded,
    weights,
    whole,
)
from torsh_optim import Lookahead

SAVED = (*CASES, "lookahead-ours", "lookahead-torch")


@pytest.fixture
def two() -> Ranks:
    return ranks(2)


@pytest.fixture
def two_gpus() -> Ranks:
    return ranks(2, "nccl")


def saved_case(net: nn.Module, case: str, *, kernels: bool = False) -> Any:
    """An optimizer of any kind that is saved, Lookahead among them."""
    if case == "lookahead-ours":
        base = optimizer_of(net, "adamw-clip", kernels=kernels)
        return Lookahead(base, k=2, pullback="pullback")
    if case == "lookahead-torch":
        return Lookahead(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), k=2)
    return optimizer_of(net, case, kernels=kernels)


def state_of(net: nn.Module, opt: Any, **options: Any) -> dict[str, Any]:
    options = StateDictOptions(**options)
    state = get_optimizer_state_dict(net, opt, options=options)
    return {"model": get_model_state_dict(net), "optimizer": state}


def load(net: nn.Module, opt: Any, path: str, **options: Any) -> None:
    before = [whole(p.detach()).clone() for p in net.parameters()]
    state = state_of(net, opt, **options)  # takes a step with lr=0 to create the state
    for p, value in zip(net.parameters(), before, strict=True):
        assert torch.equal(whole(p.detach()), value)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, opt, state["optimizer"], options=StateDictOptions(**options))


def values(net: nn.Module, opt: Any) -> dict[str, Any]:
    """Whole weights, whole state and options, keyed by name."""
    state = get_optimizer_state_dict(net, opt)
    found: dict[str, Any] = {name: whole(p.detach()) for name, p in net.named_parameters()}
    for name, held in state["state"].items():
        found |= {f"{name}.{key}": whole(value) for key, value in held.items()}
    for i, group in enumerate(state["param_groups"]):
        found |= {f"{i}.{key}": value for key, value in group.items() if key != "params"}
    return {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key].cpu(), value.cpu()), key
        else:
            assert found[key] == value, key


def train(net: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        backward(net, step, dist.get_rank(), dist.get_world_size())
        opt.step()
        opt.zero_grad()


def save(folder: str) -> dict[str, Any]:
    """Train and save, then go on; give what was at the save."""
    found = {}
    for case in SAVED:
        net = sharded(model().to(device()))
        opt = saved_case(net, case)
        train(net, opt, 0, 3)
        dcp.save(state_of(net, opt), checkpoint_id=f"{folder}/{case}")
        found[case] = values(net, opt)
        train(net, opt, 3, 6)
        torch.save(values(net, opt), f"{folder}/{case}-{dist.get_rank()}-later.pt")
    return found


def resume(folder: str, then: str, expected: dict[str, Any]) -> None:
    for case in SAVED:
        net = sharded(model().to(device()))
        opt = saved_case(net, case)
        load(net, opt, f"{folder}/{case}")
        assert_equal(values(net, opt), expected[case])
        train(net, opt, 3, 6)
        assert_equal(values(net, opt), torch.load(f"{then}/{case}-{dist.get_rank()}-later.pt"))


def save_and_load_whole() -> None:
    """The whole state on every process, as tutorials have it, flat and nested, and by rank 0."""
    net = sharded(model().to(device()))
    opt = optimizer_of(net, "cautious")
    train(net, opt, 0, 2)
    expected = values(net, opt)
    for options in (
        {"flatten_optimizer_state_dict": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ):
        chosen = StateDictOptions(**options)
        saved = get_optimizer_state_dict(net, opt, options=chosen)
        other = sharded(model().to(device()))
        other.load_state_dict(net.state_dict())
        loaded = optimizer_of(other, "cautious")
        set_optimizer_state_dict(other, loaded, saved, options=chosen)
        assert_equal(values(other, loaded), expected)

    # what an unsharded run has saved, without torch.distributed.checkpoint
    alone = model().to(device())
    unsharded = optimizer_of(alone, "cautious")
    backward(alone, 0, 0, 1)
    unsharded.step()
    other = sharded(model().to(device()))
    loaded = optimizer_of(other, "cautious")
    loaded.load_state_dict(unsharded.state_dict())
    for p, a in zip(other.parameters(), alone.parameters(), strict=True):
        for key, value in unsharded.state[a].items():
            assert torch.equal(whole(loaded.state[p][key]), value), key
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 .*full_state_dict=True"):
        unsharded.load_state_dict(loaded.state_dict())


def keep_float32_moments(folder: str) -> None:
    """DCP fills the tensors it finds; loading must not change their element type."""

    def made() -> tuple[nn.Module, Any]:
        net = sharded(model().to(device(), torch.bfloat16))
        opt = optimizer_of(net, "lion")
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        state = opt.state_dict()
        for held in state["state"].values():
            held |= {key: value.float() for key, value in held.items()}
        opt.load_state_dict(state)
        return net, opt

    net, opt = made()
    for step in range(2):
        x, y = (part.bfloat16().to(device()) for part in batch(step))
        (net(x) - y).square().mean().backward()
        assert opt.implementation == ("cpu-chunked" if device().type == "cpu" else "triton")
        opt.step()
        opt.zero_grad()
    expected = values(net, opt)
    assert expected["0.weight"].dtype == torch.bfloat16
    assert expected["0.weight.exp_avg"].dtype == torch.float32
    assert not torch.equal(
        expected["0.weight.exp_avg"], expected["0.weight.exp_avg"].bfloat16().float()
    )
    dcp.save(state_of(net, opt), checkpoint_id=folder)
    net, opt = made()
    load(net, opt, folder)
    assert_equal(values(net, opt), expected)


def copy_and_save(folder: str) -> None:
    net = sharded(model().to(device()))
    opt = optimizer_of(net, "cautious")
    train(net, opt, 0, 2)
    path = f"{folder}/{dist.get_rank()}.pt"
    torch.save(opt.state_dict(), path)
    twin = copy.deepcopy(opt)
    loaded = optimizer_of(net, "cautious")
    loaded.load_state_dict(torch.load(path, weights_only=True))
    pairs = zip(opt.param_groups, twin.param_groups, loaded.param_groups, strict=True)
    for group, copied, read in pairs:
        for p, c, r in zip(group["params"], copied["params"], read["params"], strict=True):
            assert isinstance(c, DTensor)
            assert c is not p
            for key, value in opt.state[p].items():
                if value.ndim:
                    assert twin.state[c][key].placements == p.placements
                assert torch.equal(whole(twin.state[c][key]), whole(value))
                assert torch.equal(whole(loaded.state[r][key]), whole(value))
            c.grad = p.grad = torch.ones_like(p)
    opt.step()
    twin.step()
    for group, copied in zip(opt.param_groups, twin.param_groups, strict=True):
        for p, c in zip(group["params"], copied["params"], strict=True):
            assert torch.equal(whole(p.detach()), whole(c.detach()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints_move_between_numbers_of_processes(two: Ranks, tmp_path: Path) -> None:
    (expected, _) = two.run(save, str(tmp_path))
    for case in SAVED:
        net = model()
        opt = saved_case(net, case)
        load(net, opt, f"{tmp_path}/{case}")
        assert_equal(values(net, opt), expected[case])
        dcp.save(state_of(net, opt), checkpoint_id=f"{tmp_path}/one/{case}")
    two.run(resume, f"{tmp_path}/one", str(tmp_path), expected)


def test_whole_states_load_into_shards(two: Ranks) -> None:
    two.run(save_and_load_whole)


def test_checkpoints_keep_element_types(two: Ranks, tmp_path: Path) -> None:
    two.run(keep_float32_moments, str(tmp_path))


def test_copies_and_local_files(two: Ranks, tmp_path: Path) -> None:
    two.run(copy_and_save, str(tmp_path))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", SAVED)
def test_the_step_that_makes_room_for_a_checkpoint_changes_nothing(
    case: str, kernels: bool
) -> None:
    """``torch.distributed.checkpoint`` creates state by a step with lr=0 and zero gradients."""
    if kernels and "lookahead" not in case:
        pytest.importorskip("triton")
    net = model()
    opt = saved_case(net, case, kernels=kernels)
    before = weights(net)
    state = get_optimizer_state_dict(net, opt)
    assert torch.equal(weights(net), before)
    for name, held in state["state"].items():
        for key, value in held.items():
            if key in ("ema", "p0", "slow"):
                assert torch.equal(value, dict(net.named_parameters())[name])
            elif key == "d":
                assert float(value) == pytest.approx(1e-6)
            elif key != "step" and case != "adam-amsgrad":  # its coupled decay is a gradient
                assert not value.any(), key
    assert all(group.get("lookahead_step", 0) == 0 for group in state["param_groups"])
    assert float(getattr(opt, "skipped_steps", 0.0)) == 0


@pytest.mark.parametrize("kernels", KERNELS)
def test_options_may_come_back_as_lists(kernels: bool) -> None:
    """As full_state_dict=True and JSON make them; a kernel's cache has to take them too."""
    net = model()
    opt = optimizer_of(net, "adamw", kernels=kernels)
    state = opt.state_dict()
    state["param_groups"][0]["betas"] = [0.5, 0.9]
    opt.load_state_dict(state)
    assert opt.param_groups[0]["betas"] == (0.5, 0.9)
    opt.param_groups[0]["betas"] = [0.5, 0.9]
    backward(net, 0, 0, 1)
    opt.step()
    assert opt.state[net[0].weight]["exp_avg"].equal(net[0].weight.grad * 0.5)


@pytest.mark.gpu(2)
def test_checkpoints_on_gpus(two_gpus: Ranks, tmp_path: Path) -> None:
    (expected, _) = two_gpus.run(save, str(tmp_path))
    two_gpus.run(resume, str(tmp_path), str(tmp_path), expected)
    two_gpus.run(keep_float32_moments, f"{tmp_path}/types")
    two_gpus.run(save_and_load_whole)
