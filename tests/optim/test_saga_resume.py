"""SAGA goes on from saved states and files with the same bits, and refuses foreign ones."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.saga_problem import (
    DTYPES,
    KINDS,
    MODELS,
    N,
    linear_net,
    make_batches,
    make_data,
    run_saga,
    unbiased_net,
)
from torsh_optim._adam import AdamW
from torsh_optim._saga import SAGA


def _continue(
    run: Callable[[nn.Module, SAGA], tuple[nn.Module, SAGA]], kind: str, dtype: Any
) -> None:
    """Go on in the middle of an epoch, with and without ``run`` in between: the same bits."""
    model = MODELS[kind]()
    opt = SAGA(model.parameters(), 0.2, N, table_dtype=dtype, weight_decay=0.01, l1=1e-4)
    batches = make_batches(3)
    run_saga(model, opt, batches[:9])
    twin, other = run(model, opt)
    run_saga(model, opt, batches[9:])
    run_saga(twin, other, batches[9:])
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in opt.state[mine].items():
            assert torch.equal(value, other.state[theirs][key])
            assert value.dtype == other.state[theirs][key].dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_through_a_state_dict(kind: str, dtype: torch.dtype) -> None:
    def resume(model: nn.Module, opt: SAGA) -> tuple[nn.Module, SAGA]:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = MODELS[kind]()
        twin.load_state_dict(saved["model"])
        other = SAGA(twin.parameters(), 9.0, N)
        other.load_state_dict(saved["opt"])
        assert other.param_groups[0]["lr"] == 0.2
        assert other.param_groups[0]["table"] == kind
        return twin, other

    _continue(resume, kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_through_a_file(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def resume(model: nn.Module, opt: SAGA) -> tuple[nn.Module, SAGA]:
        opt.save_table(tmp_path / "table.saga")
        twin = copy.deepcopy(model)
        other = SAGA(twin.parameters(), 0.2, N, weight_decay=0.01, l1=1e-4)
        other.load_table(str(tmp_path / "table.saga"))
        return twin, other

    _continue(resume, kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_alone(kind: str) -> None:
    _continue(lambda model, opt: copy.deepcopy((model, opt)), kind, torch.int8)
    _continue(lambda model, opt: pickle.loads(pickle.dumps((model, opt))), kind, torch.bfloat16)


def test_distributed_checkpoint_format() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def resume(model: nn.Module, opt: SAGA) -> tuple[nn.Module, SAGA]:
        saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
        twin = copy.deepcopy(model)
        other = SAGA(twin.parameters(), 0.3, N)
        set_optimizer_state_dict(twin, other, saved)
        return twin, other

    _continue(resume, "factored", torch.int8)


def test_load_goes_by_names() -> None:
    model = linear_net()
    opt = SAGA(model.named_parameters(), 0.1, N)
    run_saga(model, opt, make_batches(1))
    saved = opt.state_dict()
    turned = SAGA([("bias", model.bias), ("weight", model.weight)], 0.1, N)
    turned.load_state_dict(saved)
    for param in model.parameters():
        for key, value in opt.state[param].items():
            assert torch.equal(turned.state[param][key], value)
            assert turned.state[param][key] is not value


@pytest.mark.parametrize("way", ["state", "file"])
def test_checksums_are_saved(way: str, tmp_path: Path) -> None:
    model = unbiased_net()
    opt = SAGA(model.parameters(), 0.1, N)
    run_saga(model, opt, make_batches(1)[:3])
    other = SAGA(model.parameters(), 0.1, N)
    if way == "state":
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt.save_table(tmp_path / "table")
        other.load_table(tmp_path / "table")
    sums = other.state[model.weight]["input_sum"]
    assert torch.equal(sums, opt.state[model.weight]["input_sum"])
    assert int((sums == 0).sum()) == N - 12  # those not seen yet
    assert other.table_bytes == opt.table_bytes == N * (3 * 4 + 8)
    x, y = make_data()
    seen = int(make_batches(1)[0][0])
    with pytest.raises(RuntimeError, match=f"the input of sample {seen} is another one"):
        other.step(lambda: F.cross_entropy(model(-x[[seen]]), y[[seen]]), index=seen)
    run_saga(model, other, make_batches(2))


@pytest.mark.parametrize("way", ["state", "file"])
def test_version_1_had_no_checksums(way: str, tmp_path: Path) -> None:
    model = linear_net()
    opt = SAGA(model.parameters(), 0.1, N)
    run_saga(model, opt, make_batches(1))
    del opt.state[model.weight]["input_sum"]
    other = SAGA(model.parameters(), 0.1, N)
    if way == "state":
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["torsh_version"] = 1
        other.load_state_dict(saved)
    else:
        opt.save_table(tmp_path / "table")
        other.load_table(tmp_path / "table")
    assert other.param_groups[0]["torsh_version"] == 2
    run_saga(model, other, [torch.tensor([4])])
    assert other.state[model.weight]["input_sum"].nonzero().tolist() == [[4]]
    x, y = make_data()
    with pytest.raises(RuntimeError, match="the input of sample 4 is another one"):
        other.step(lambda: F.cross_entropy(model(x[[5]]), y[[5]]), index=4)


# --- what loading refuses ---


def _drop_version(saved: dict[str, Any]) -> None:
    del saved["param_groups"][0]["torsh_version"]


def _other_data(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["num_samples"] = 7


def _cast(saved: dict[str, Any]) -> None:
    saved["state"][0]["output_grad"] = saved["state"][0]["output_grad"].double()


def _extra(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = torch.zeros(3)


def _stray(saved: dict[str, Any]) -> None:
    saved["state"][5] = {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_version, "torsh_version=None of the loaded state is not between 1 and 2"),
        (_other_data, "the loaded table is for num_samples=7, this SAGA for 23"),
        (_cast, r"'output_grad' of parameter 0 is \(23, 3\) in torch.float64, not \(23, 3\) in to"),
        (_extra, "'exp_avg' of parameter 1 does not belong in a scalar table"),
        (_stray, "state 5 of the loaded state belongs to no parameter"),
    ],
)
def test_foreign_states_are_refused(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    model = linear_net()
    opt = SAGA(model.parameters(), 0.1, N)
    run_saga(model, opt, make_batches(1))
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    other = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert not other.state
    assert other.param_groups[0]["table"] == "auto"


@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW])
def test_states_of_other_optimizers_are_refused(make: Any) -> None:
    model = linear_net()
    other = make(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    other.step()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(ValueError, match=r"is that of another optimizer: .* but .*betas, "):
        opt.load_state_dict(other.state_dict())
    assert not opt.state


def test_files_of_other_models_and_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    model = linear_net()
    opt = SAGA(model.parameters(), 0.1, N)
    with pytest.raises(RuntimeError, match="no table to save before the first step"):
        opt.save_table(path)
    run_saga(model, opt, make_batches(1))
    opt.save_table(path)
    with pytest.raises(ValueError, match="is for num_samples=23, this SAGA for 24"):
        SAGA(model.parameters(), 0.1, N + 1).load_table(path)
    with pytest.raises(ValueError, match=r"has '1/gradient_mean', but there is no parameter '1'"):
        SAGA([model.weight], 0.1, N).load_table(path)
    with pytest.raises(ValueError, match=r"'output_grad' of parameter '0' is \(23, 3\) in torch."):
        SAGA(nn.Linear(5, 4).double().parameters(), 0.1, N).load_table(path)
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="chunk 0 of '0/output_grad' is damaged"):
        SAGA(model.parameters(), 0.1, N).load_table(path)
