"""What torch asks of its own optimizers, asked of ours.

The names follow ``TestOptimRenewed`` in torch's ``test/test_optim.py``; the inputs are torch's
tables in ``torch.testing._internal.common_optimizers`` where torch has the optimizer, and the like
of them where it has not. torch's implementation flags ``foreach``, ``capturable`` and
``differentiable`` are refused by design, and tested to be; ``fused`` is ours.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR

from torsh_optim import LAMB, SGD, Adam, AdamW, AdvancedAdam, Lion, Lookahead

cuda = pytest.param("cuda", marks=pytest.mark.gpu)
devices = pytest.mark.parametrize("device", ["cpu", cuda])
# complex and float64 tensors are not for the kernels, which is said once
pytestmark = pytest.mark.filterwarnings("ignore:.*one by one, which is slow:UserWarning")


def lookahead(params: Any, *, k: int = 2, pullback: Any = "none", **options: Any) -> Lookahead:
    """Lookahead over AdamW, with the signature of an optimizer."""
    return Lookahead(AdamW(params, **options), k=k, pullback=pullback)


@dataclass(frozen=True)
class Info:
    """An optimizer, as torch's ``OptimizerInfo``.

    Attributes:
        make: The class, or a function of the same signature.
        table: Name of torch's table of inputs; None if it has none.
        inputs: Options to run with, beside torch's.
        errors: Options to refuse: with the exception and a part of the message.
        moments: Names of the state.
        flags: Flags of torch's signature that it takes, and refuses if they are True.
    """

    make: Callable[..., Any]
    table: str | None = None
    inputs: tuple[dict[str, Any], ...] = ()
    errors: tuple[tuple[dict[str, Any], type[Exception], str], ...] = ()
    moments: frozenset[str] = frozenset({"exp_avg", "exp_avg_sq"})
    flags: tuple[str, ...] = field(default=())


_ADAM_FLAGS = ("foreach", "capturable", "differentiable")
_COMMON = (
    {},
    {"lr": 1e-2},
    {"lr": torch.tensor(1e-3)},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
)
_COMMON_ERRORS = (
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
    ({"betas": (1.0, 0.0)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
)
INFOS = {
    "adam": Info(Adam, "adam", flags=_ADAM_FLAGS),
    "adamw": Info(AdamW, "adamw", flags=_ADAM_FLAGS),
    "sgd": Info(SGD, "sgd", moments=frozenset(), flags=("foreach", "differentiable")),
    "advanced": Info(
        AdvancedAdam,
        "adam",
        inputs=(
            {"cautious": True, "weight_decay": 0.1},
            {"decay": "absolute", "weight_decay": 0.01},
            {"ema_decay": 0.9, "warmup_steps": 3, "max_grad_norm": 1.0},
        ),
        flags=_ADAM_FLAGS,
    ),
    "lamb": Info(
        LAMB,
        inputs=(
            *_COMMON,
            {"bias_correction": False},
            {"trust_clip": 1.0, "always_adapt": True},
            {"max_grad_norm": None},
        ),
        errors=(*_COMMON_ERRORS, ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08")),
    ),
    "lion": Info(
        Lion, inputs=(*_COMMON, {"betas": (0.5, 0.8)}), errors=_COMMON_ERRORS,
        moments=frozenset({"exp_avg"}),
    ),
    "lookahead": Info(
        lookahead,
        inputs=(*_COMMON, {"k": 3, "pullback": "pullback"}),
        errors=(*_COMMON_ERRORS, ({"k": 0}, ValueError, "k=0 must be an integer of at least 1")),
    ),
}  # fmt: skip
infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


@pytest.fixture(scope="module")
def tables() -> Any:
    """torch's tables of optimizer inputs, which need expecttest to be imported."""
    pytest.importorskip("expecttest")
    import torch.testing._internal.common_optimizers

    return torch.testing._internal.common_optimizers


def _inputs(info: Info, tables: Any, device: str) -> Iterator[dict[str, Any]]:
    """All options to run with; what we refuse by design is in ``test_refused_flags``."""
    if info.table is not None:
        for case in getattr(tables, f"optim_inputs_func_{info.table}")(device=device):
            if not case.kwargs.get("capturable"):
                yield case.kwargs
    for options in info.inputs:
        yield copy.deepcopy(options)


def _params(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, 3), (3,), (20, 4), ())
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype).to(device))
        for s in shapes
    ]


def _set_grads(params: list[Tensor], step: int = 0) -> None:
    for i, param in enumerate(params):
        index = torch.arange(param.numel(), device=param.device).reshape(param.shape)
        param.grad = torch.cos(index + i + step).to(param.dtype)


def _run(params: list[Tensor], opt: Any, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        _set_grads(params, step)
        opt.step()


def _copies(params: list[Tensor]) -> list[Tensor]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


# --- inputs ---


@infos
def test_errors(info: Info, tables: Any) -> None:
    """torch's table: exception type, and torch's words in the message."""
    if info.table is not None:
        cases = getattr(tables, f"optim_error_inputs_func_{info.table}")("cpu", torch.float32)
    else:
        cases = tables.get_error_inputs_for_all_optims("cpu", torch.float32)
    assert len(cases) >= 6  # as many as torch 2.11 has for all optimizers
    for case in cases:
        given, message = case.optimizer_error_input, case.error_regex
        if given.kwargs.get("foreach"):  # torch refuses a combination, we the flag itself
            message = "foreach=True is not supported"
        params = given.params
        if params is None:
            params = [torch.nn.Parameter(torch.randn(2, 3))]
        warns = issubclass(case.error_type, Warning)
        expected = pytest.warns if warns else pytest.raises
        with expected(case.error_type, match=message):
            info.make(params, **given.kwargs)
    for options, error, message in info.errors:
        with pytest.raises(error, match=message):
            info.make([torch.nn.Parameter(torch.randn(2, 3))], **options)


@infos
def test_refused_flags(info: Info) -> None:
    """Flags of implementations that are not here are errors, not ignored; False and None pass."""
    params = [torch.nn.Parameter(torch.ones(1))]
    for flag in info.flags:
        with pytest.raises(ValueError, match=f"{flag}=True is not supported by"):
            info.make(params, **{flag: True})
        info.make(params, **{flag: False})
    if "foreach" in info.flags:
        with pytest.raises(RuntimeError, match="cannot be `True` together"):
            info.make(params, foreach=True, fused=True)


@infos
def test_names_for_all_or_none(info: Info) -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        info.make([("first", params[0]), params[1]])
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        info.make(params, lr=torch.ones(2))


# --- the right direction ---


@devices
@infos
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [False, True])
def test_goes_right_direction(
    info: Info, contiguous: bool, scheduled: bool, device: str, tables: Any
) -> None:
    for options in _inputs(info, tables, device):
        if contiguous:
            weight = torch.randn(10, 5, device=device).requires_grad_()
            bias = torch.randn(10, device=device).requires_grad_()
        else:  # views with gaps: every second element
            weight = torch.randn(10, 5, 2, device=device)[..., 0].requires_grad_()
            bias = torch.randn(10, 2, device=device)[..., 0].requires_grad_()
        data = torch.randn(5, device=device)
        opt = info.make([weight, bias], **{"lr": 1e-2, **options})
        schedulers: list[Any] = []
        if scheduled:
            schedulers = [StepLR(opt, 10, 0.9), LinearLR(opt, 0.9), ReduceLROnPlateau(opt)]

        def loss(opt: Any = opt, weight: Any = weight, bias: Any = bias, data: Any = data) -> Any:
            opt.zero_grad()
            value = (weight.mv(data) + bias).square().sum()
            value.backward()
            return value

        first = loss().item()
        for _ in range(10):
            opt.step(loss)
            for scheduler in schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(loss().item())
                else:
                    scheduler.step()
        last = loss().item()
        assert (last > first) if options.get("maximize") else (last < first), options


@devices
@infos
def test_rosenbrock(info: Info, device: str) -> None:
    """Two parameters, schedulers, and a way down a curved valley."""
    params = torch.tensor([1.5, 1.5], device=device, requires_grad=True)
    solution = torch.tensor([1.0, 1.0], device=device)
    options = {"momentum": 0.9} if info.table == "sgd" else {}
    rate = 1e-3 if info.table == "sgd" else 0.05
    opt = info.make([params], lr=rate, weight_decay=0.0, **options)
    scheduler = ExponentialLR(opt, 0.995)

    def evaluate() -> Tensor:
        opt.zero_grad()
        x, y = params
        value = 10.0 * (y - x * x) ** 2 + (1 - x) ** 2
        value.backward()
        return value

    first = (params.detach() - solution).norm()
    for _ in range(300):
        opt.step(evaluate)
        scheduler.step()
    assert (params.detach() - solution).norm() < 0.9 * first


# --- groups and rates ---


@devices
@infos
def test_param_groups_lr(info: Info, device: str) -> None:
    """Rate 0 moves nothing; the others go on; a default of 0 can be overridden."""
    params = _params(device)[:2]
    before = [p.detach().clone() for p in params]
    opt = info.make([{"params": params[:1], "lr": 0.01}, {"params": params[1:]}], lr=0.0)
    _run(params, opt, 3)
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    lone = _params(device)[1]
    alone = info.make([{"params": [lone], "lr": 0.0}], lr=0.01)
    _run([lone], alone, 3)
    assert torch.equal(lone, before[1])


@devices
@infos
def test_param_groups_weight_decay(info: Info, device: str) -> None:
    params = [torch.nn.Parameter(torch.full((3,), 2.0, device=device)) for _ in range(2)]
    opt = info.make(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}],
        lr=0.1, weight_decay=0.0,
    )  # fmt: skip
    for param in params:
        param.grad = torch.zeros(3, device=device)
    for _ in range(2):
        opt.step()
    assert params[0].tolist() == [2.0] * 3
    assert (params[1] < 2.0).all()


@devices
@infos
def test_tensor_lr(info: Info, device: str, tables: Any) -> None:
    """A tensor is as good as its number, and follows a scheduler."""
    for options in _inputs(info, tables, device):
        options = {k: v for k, v in options.items() if k != "lr"}
        mine, theirs = _params(device), _params(device)
        for params, rate in ((mine, torch.tensor([0.01])), (theirs, 0.01)):
            opt = info.make(params, lr=rate, **copy.deepcopy(options))
            scheduler = ExponentialLR(opt, 0.9)
            for step in range(4):
                _run(params, opt, range(step, step + 1))
                scheduler.step()
        for a, b in zip(mine, theirs, strict=True):
            # 0.9**n in float32, as the tensor holds it
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@devices
@infos
def test_add_param_group_is_like_having_had_it(info: Info, device: str) -> None:
    first, second = _params(device), _params(device)
    opts = [info.make(first[:2], lr=0.01), info.make([{"params": second[:2]}], lr=0.01)]
    opts[0].add_param_group({"params": first[2:], "lr": 0.1})
    opts[1].add_param_group({"params": second[2:], "lr": 0.1})
    for params, opt in zip((first, second), opts, strict=True):
        _run(params, opt, 3)
    assert _equal(first, second)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opts[0].add_param_group({"params": first[:1]})


# --- tensors ---


@devices
@infos
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_complex(info: Info, device: str, shape: tuple[int, ...], tables: Any) -> None:
    """A complex tensor is a pair of real ones."""
    for options in _inputs(info, tables, device):
        value = torch.randn(shape, dtype=torch.complex64, device=device)
        param = torch.nn.Parameter(value)
        real = torch.nn.Parameter(torch.view_as_real(value).clone())
        opts = [info.make([p], **copy.deepcopy(options)) for p in (param, real)]
        for _ in range(3):
            param.grad = torch.randn(shape, dtype=torch.complex64, device=device)
            real.grad = torch.view_as_real(param.grad).clone()
            for opt in opts:
                opt.step()
        torch.testing.assert_close(torch.view_as_real(param.detach()), real.detach())


@infos
@devices
def test_fused_matches_forloop(info: Info, device: str, tables: Any) -> None:
    for dtype, options in itertools.product(
        (torch.float32, torch.float64), _inputs(info, tables, device)
    ):
        mine, theirs = _params(device, dtype), _params(device, dtype)
        fused = None if dtype == torch.float64 and device == "cuda" else True
        for params, flag in ((mine, fused), (theirs, False)):
            opt = info.make(params, **copy.deepcopy(options), fused=flag)
            _run(params, opt, 5)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6, msg=str(options))


@pytest.mark.gpu
@infos
def test_mixed_device_dtype(info: Info) -> None:
    """One optimizer over devices and types is as many optimizers."""
    kinds = list(itertools.product(("cpu", "cuda"), (torch.float32, torch.bfloat16)))
    together = [p for device, dtype in kinds for p in _params(device, dtype)]
    options: dict[str, Any] = {"max_grad_norm": None}
    opt = info.make(together, lr=0.01, **options)
    apart = _copies(together)
    size = len(_params("cpu"))
    opts = [info.make(apart[i : i + size], lr=0.01, **options) for i in range(0, 4 * size, size)]
    for step in range(3):
        _set_grads(together, step)
        _set_grads(apart, step)
        for each in (opt, *opts):
            each.step()
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@infos
def test_fused_cpu_matches_cuda(info: Info, tables: Any) -> None:
    for options in _inputs(info, tables, "cpu"):
        mine, theirs = _params("cpu"), _params("cuda")
        for params in (mine, theirs):
            _run(params, info.make(params, **copy.deepcopy(options)), 5)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=2e-6, atol=1e-6)


@pytest.mark.gpu
def test_fused_large_tensor() -> None:
    """More than 2**32 elements: indices need 64 bits."""
    size = 2**32 + 17
    if torch.cuda.get_device_properties(0).total_memory < 8 * size:
        pytest.skip("needs 32 GiB of GPU memory")
    param = torch.zeros(size, dtype=torch.float16, device="cuda").requires_grad_()
    param.grad = torch.ones_like(param)
    SGD([param], lr=0.5, fused=True).step()
    assert param[-3:].tolist() == [-0.5] * 3
    assert bool((param == -0.5).all())


@infos
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_set_default_dtype(info: Info, dtype: torch.dtype, tables: Any) -> None:
    """Counters and results do not depend on the default type while stepping."""
    for options in _inputs(info, tables, "cpu"):
        results = []
        for default in (torch.float32, dtype):
            params = _params("cpu")
            _set_grads(params)
            torch.set_default_dtype(default)
            try:
                opt = info.make(params, **copy.deepcopy(options))
                opt.step()
                opt.step()
            finally:
                torch.set_default_dtype(torch.float32)
            assert all(opt.state[p]["step"].dtype == torch.float32 for p in params)
            results.append(params)
        assert _equal(*results)


@infos
def test_error_on_params_on_meta(info: Info) -> None:
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    opt = info.make([param], fused=True)
    param.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match=r"fused=True, but a parameter of shape .* on meta"):
        opt.step()


@pytest.mark.gpu
@infos
def test_peak_memory(info: Info) -> None:
    """No copy of anything: beyond the states, a step takes tables and a few sums."""
    params = [torch.nn.Parameter(torch.randn(2**20, device="cuda")) for _ in range(8)]
    opt = info.make(params)
    for param in params:
        param.grad = torch.randn_like(param)
    opt.step()
    opt.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20


# --- steps that do nothing ---


@infos
def test_step_is_noop_when_params_have_no_grad(info: Info, tables: Any) -> None:
    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        before = _copies(params)
        opt = info.make(params, **options)
        opt.step()
        assert _equal(params, before)
        assert not opt.state


@infos
def test_step_is_noop_for_zero_grads(info: Info, tables: Any) -> None:
    for options in _inputs(info, tables, "cpu"):
        if options.get("weight_decay"):
            continue  # decay moves, as it does in torch
        params = _params("cpu")
        before = _copies(params)
        opt = info.make(params, **{"weight_decay": 0.0, **options})
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()
        assert _equal(params, before)


@infos
def test_zero_grad(info: Info) -> None:
    params = _params("cpu")
    opt = info.make(params)
    _set_grads(params)
    opt.zero_grad(set_to_none=False)
    assert all(bool((p.grad == 0).all()) for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


# --- printing, copying, pickling ---


@infos
def test_optimizer_can_be_printed(info: Info, tables: Any) -> None:
    for options in _inputs(info, tables, "cpu"):
        opt = info.make(_params("cpu"), **options)
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        text = repr(opt)
        assert "Parameter Group 1" in text
        for key in options:
            assert f"{key if key not in ('k', 'pullback') else 'lookahead_' + key}: " in text


@infos
def test_deepcopy_copies_all_public_attrs(info: Info, tables: Any) -> None:
    def public(opt: Any) -> set[str]:
        kept = {"grad_norm", "skipped_steps", "implementation"}  # of the device, and of this moment
        return {name for name in vars(opt) if not name.startswith("_")} | kept

    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(params, **options)
        _run(params, opt, 2)
        copied = copy.deepcopy(opt)
        assert public(opt) == public(copied)
        assert opt.defaults.keys() == copied.defaults.keys()
        others = [p for group in copied.param_groups for p in group["params"]]
        for mine, theirs in zip(params, others, strict=True):
            assert mine.data_ptr() != theirs.data_ptr()
            assert opt.state[mine].keys() == copied.state[theirs].keys()
        _run(params, opt, range(2, 5))
        _run(others, copied, range(2, 5))
        assert _equal(params, others)


@infos
def test_pickled_optimizer_goes_on(info: Info, tables: Any) -> None:
    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(params, **options)
        _run(params, opt, 2)
        copied = pickle.loads(pickle.dumps(opt))
        others = [p for group in copied.param_groups for p in group["params"]]
        _run(params, opt, range(2, 5))
        _run(others, copied, range(2, 5))
        assert _equal(params, others)


@infos
def test_non_empty_state(info: Info, tables: Any) -> None:
    """The state has torch's names, and the shapes of the parameters."""
    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(params, **options)
        _run(params, opt, 1)
        wanted = info.moments | ({"momentum_buffer"} if options.get("momentum") else set())
        for param in params:
            state = opt.state[param]
            assert wanted | {"step"} <= state.keys()
            assert all(state[key].shape == param.shape for key in wanted)
            assert state["step"].shape == ()
            assert state["step"].item() == 1.0


# --- state dictionaries ---


@infos
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)])
def test_state_dict_deterministic(info: Info, named: tuple[bool, bool], tables: Any) -> None:
    """A loaded state goes on bit for bit, with and without names on either side."""

    def with_names(params: list[Tensor], wanted: bool) -> Any:
        return [(f"p{i}", p) for i, p in enumerate(params)] if wanted else params

    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(with_names(params, named[0]), **copy.deepcopy(options))
        _run(params, opt, 3)
        state = copy.deepcopy(opt.state_dict())
        others = _copies(params)
        fresh = info.make(with_names(others, named[1]), **copy.deepcopy(options))
        given = copy.deepcopy(state)
        fresh.load_state_dict(given)
        _run(params, opt, range(3, 6))
        _run(others, fresh, range(3, 6))
        assert _equal(params, others)
        assert given["param_groups"] == state["param_groups"]  # loading changes nothing in it
        for number, values in state["state"].items():
            assert values.keys() == given["state"][number].keys()
            for key, value in values.items():
                assert torch.equal(value, given["state"][number][key]), key
        for key in ("lr", "weight_decay"):
            assert fresh.param_groups[0][key] == opt.param_groups[0][key]
        assert ("param_names" in fresh.param_groups[0]) == any(named)  # as torch's


@infos
def test_can_load_older_state_dict(info: Info, tables: Any) -> None:
    """Options that a state lacks are those of the optimizer."""
    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(params, **copy.deepcopy(options))
        _run(params, opt, 2)
        state = copy.deepcopy(opt.state_dict())
        for group in state["param_groups"]:
            for flag in ("fused", "maximize", "foreach", "differentiable", "skip_nonfinite"):
                group.pop(flag, None)
        others = _copies(params)
        fresh = info.make(others, **copy.deepcopy(options))
        fresh.load_state_dict(state)
        _run(params, opt, range(2, 4))
        _run(others, fresh, range(2, 4))
        assert _equal(params, others)


@infos
def test_save_load_equality_with_weights_only(info: Info, tables: Any) -> None:
    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(params, **copy.deepcopy(options))
        _run(params, opt, 3)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        fresh = info.make(_copies(params), **copy.deepcopy(options))
        fresh.load_state_dict(loaded)
        mine, theirs = opt.state_dict(), fresh.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        for number, values in mine["state"].items():
            for key, value in values.items():
                assert torch.equal(theirs["state"][number][key], value), key


@infos
def test_load_nontensor_step(info: Info, tables: Any) -> None:
    """Steps were numbers once."""
    for options in _inputs(info, tables, "cpu"):
        params = _params("cpu")
        opt = info.make(params, **copy.deepcopy(options))
        _run(params, opt, 3)
        state = copy.deepcopy(opt.state_dict())
        for values in state["state"].values():
            values["step"] = values["step"].item()
        others = _copies(params)
        fresh = info.make(others, **copy.deepcopy(options))
        fresh.load_state_dict(state)
        assert all(isinstance(fresh.state[p]["step"], Tensor) for p in others)
        _run(params, opt, range(3, 5))
        _run(others, fresh, range(3, 5))
        assert _equal(params, others)


@pytest.mark.gpu
@infos
def test_state_dict_with_cuda_params(info: Info, tables: Any) -> None:
    """A state saved on the CPU follows the parameters; counters stay on the host."""
    for options in _inputs(info, tables, "cuda"):
        params = _params("cpu")
        opt = info.make(params, **copy.deepcopy(options))
        _run(params, opt, 3)
        state = opt.state_dict()
        others = [torch.nn.Parameter(p.detach().cuda()) for p in params]
        fresh = info.make(others, **copy.deepcopy(options))
        fresh.load_state_dict(state)
        assert all(
            not value.is_cuda for values in state["state"].values() for value in values.values()
        )
        for param in others:
            for key, value in fresh.state[param].items():
                assert value.is_cuda == (key != "step"), key
        _run(params, opt, range(3, 6))
        _run(others, fresh, range(3, 6))
        for a, b in zip(params, others, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=2e-6, atol=1e-6)


@infos
def test_state_is_not_shared_between_copies(info: Info) -> None:
    """Optimizers that load one state do not write to each other's, nor to the dictionary."""
    params = _params("cpu")
    opt = info.make(params, lr=0.1)
    _run(params, opt, 2)
    state = opt.state_dict()
    fresh = [info.make(_copies(params), lr=0.1) for _ in range(2)]
    for other in fresh:
        other.load_state_dict(state)
    kept = copy.deepcopy(state)
    for other in fresh:
        _run([p for group in other.param_groups for p in group["params"]], other, 3)
    for number, values in kept["state"].items():
        for key, value in values.items():
            assert torch.equal(state["state"][number][key], value), key
    assert state["param_groups"] == kept["param_groups"]


@infos
@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks(info: Info, prepend: bool) -> None:
    params = _params("cpu")
    opt = info.make(params)
    _run(params, opt, 1)
    seen: list[str] = []

    def after(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("after")
        return {**state, "extra": True}

    opt.register_state_dict_pre_hook(lambda opt: seen.append("first"))
    opt.register_state_dict_pre_hook(lambda opt: seen.append("second"), prepend=prepend)
    handle = opt.register_state_dict_post_hook(after)
    state = opt.state_dict()
    assert state["extra"] is True
    assert seen == [*(("second", "first") if prepend else ("first", "second")), "after"]
    handle.remove()
    assert "extra" not in opt.state_dict()


@infos
@pytest.mark.parametrize("prepend", [False, True])
def test_load_state_dict_hooks(info: Info, prepend: bool) -> None:
    params = _params("cpu")
    opt = info.make(params)
    _run(params, opt, 1)
    state = opt.state_dict()
    rate = state["param_groups"][0]["lr"]
    seen: list[str] = []

    def before(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("first")
        groups = copy.deepcopy(state["param_groups"])
        groups[0]["lr"] = 0.125
        return {**state, "param_groups": groups}

    def second(opt: Any, state: dict[str, Any]) -> None:
        seen.append("second")

    opt.register_load_state_dict_pre_hook(before)
    opt.register_load_state_dict_pre_hook(second, prepend=prepend)
    opt.register_load_state_dict_post_hook(lambda opt: seen.append("after"))
    opt.load_state_dict(state)
    assert seen == [*(("second", "first") if prepend else ("first", "second")), "after"]
    assert opt.param_groups[0]["lr"] == 0.125
    assert state["param_groups"][0]["lr"] == rate


@infos
def test_step_hooks_of_all_kinds(info: Info) -> None:
    """Global before local before the step, and local before global after it; as torch's."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    params = _params("cpu")
    opt = info.make(params)
    seen: list[str] = []
    inner = getattr(opt, "base_optimizer", None)  # a wrapped step calls the global hooks as well

    def note(name: str) -> Callable[..., None]:
        def hook(of: Any, args: Any, kwargs: Any) -> None:
            if of is not inner:
                seen.append(name)

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
        opt.register_step_pre_hook(note("before")),
        opt.register_step_post_hook(note("after")),
    ]
    _set_grads(params)
    opt.step()
    reference = torch.optim.SGD(_params("cpu"), lr=0.1)
    ours = list(seen)
    seen.clear()
    reference.register_step_pre_hook(note("before"))
    reference.register_step_post_hook(note("after"))
    reference.step()
    assert ours == seen
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(ours) == len(seen) == 4


@infos
def test_step_hook_changes_arguments(info: Info) -> None:
    opt = info.make(_params("cpu"))

    def with_closure(of: Any, args: Any, kwargs: Any) -> Any:
        return (of, lambda: 2.5), {}

    opt.register_step_pre_hook(with_closure)
    assert opt.step() == 2.5


@infos
def test_closure_runs_with_gradients_and_gives_the_loss(info: Info) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = info.make([param])

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 3.0


# --- GradScaler ---


@devices
@infos
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_does_not_step_if_found_inf(info: Info, device: str, found: float) -> None:
    """Through the scaler, as torch's fused optimizers through its arguments."""
    params = _params(device)
    before = _copies(params)
    opt = info.make(params, lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    factor = float("inf") if found else 1.0
    scaler.scale(sum((p * factor).sum() for p in params)).backward()
    scaler.step(opt)
    scaler.update()
    counts = [float(opt.state[p]["step"]) if opt.state[p] else 0.0 for p in params]
    assert counts == [1.0 - found] * len(params)
    assert _equal(params, before) == bool(found)


@pytest.mark.gpu
@infos
def test_grad_scaling_autocast(info: Info) -> None:
    """Training in float16 with a scaler keeps to training in float32."""
    losses = []
    for half in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)).cuda()
        opt = info.make(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=half)
        data = torch.randn(64, 16, device="cuda")
        for _ in range(20):
            opt.zero_grad()
            with torch.autocast("cuda", torch.float16, enabled=half):
                loss = model(data).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # float16 products


# --- swaps ---


@infos
def test_swapped_parameters_and_state_are_followed(info: Info) -> None:
    """``swap_tensors`` and ``param.data`` put other memory under the same objects."""
    mine, theirs = _params("cpu"), _params("cpu")
    opts = [info.make(params, lr=0.01) for params in (mine, theirs)]
    for step in range(6):
        for params, opt in zip((mine, theirs), opts, strict=True):
            _run(params, opt, range(step, step + 1))
        if step == 1:
            for param in mine:
                param.data = param.data.clone()
        if step == 3:
            for param in mine:
                state = opts[0].state[param]
                for key, value in state.items():
                    state[key] = value.clone()
    assert _equal(mine, theirs)
