"""When a plan is kept, when it is made anew, and how gradients come and go."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torsh_optim import AdamW


def _model(*shapes: tuple[int, ...]) -> list[Tensor]:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _twin(params: list[Tensor], **options: object) -> tuple[torch.optim.AdamW, list[Tensor]]:
    copies: list[Tensor] = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return torch.optim.AdamW(copies, foreach=False, **options), copies


def _follow(
    opt: AdamW, params: list[Tensor], twin: torch.optim.AdamW, copies: list[Tensor]
) -> None:
    for param, other in zip(params, copies, strict=True):
        other.grad = None if param.grad is None else param.grad.clone()
    opt.step()
    twin.step()
    for param, other in zip(params, copies, strict=True):
        # other order of operations: some float32 units of weights of size one
        torch.testing.assert_close(param, other, rtol=1e-6, atol=3e-7)
        for key, value in twin.state[other].items():
            # torch makes its step counter on the default device, which may be the GPU here
            torch.testing.assert_close(
                opt.state[param][key], value, rtol=1e-6, atol=3e-7, check_device=False
            )


def test_plan_is_kept_while_nothing_changes(adamw: type[AdamW]) -> None:
    params = _model((3, 4), (5,))
    opt = adamw(params)
    opt.step()
    plan = opt._plan
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)  # new tensors, as after zero_grad()
        opt.param_groups[0]["lr"] *= 0.5
        opt.step()
    assert opt._plan is plan


def _swap_data(opt: AdamW, params: list[Tensor]) -> None:
    params[0].data = params[0].data.clone()


def _swap_moment(opt: AdamW, params: list[Tensor]) -> None:
    opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg"].clone()


def _swap_moment_data(opt: AdamW, params: list[Tensor]) -> None:
    moment = opt.state[params[0]]["exp_avg"]
    moment.data = moment.data.clone()


def _swap_step(opt: AdamW, params: list[Tensor]) -> None:
    opt.state[params[0]]["step"] = opt.state[params[0]]["step"].clone()


def _swap_state(opt: AdamW, params: list[Tensor]) -> None:
    opt.state[params[0]] = {key: value.clone() for key, value in opt.state[params[0]].items()}


def _load_own_state(opt: AdamW, params: list[Tensor]) -> None:
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    "change",
    [_swap_data, _swap_moment, _swap_moment_data, _swap_step, _swap_state, _load_own_state],
)
def test_tensors_that_move_are_followed(
    adamw: type[AdamW], change: Callable[[AdamW, list[Tensor]], None]
) -> None:
    """Each change is one that a plan keyed by the parameters alone would miss."""
    params = _model((3, 4), (5,))
    opt = adamw(params)
    twin, copies = _twin(params)
    for round_ in range(4):
        if round_:
            change(opt, params)
        for param in params:
            param.grad = torch.randn_like(param)
        _follow(opt, params, twin, copies)


def _narrow(param: Tensor) -> None:
    param.data = param.data[:2]


def _turn(param: Tensor) -> None:
    param.data = param.data.t()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrow, r"state 'exp_avg' has shape \(4, 3\), its parameter \(2, 3\)"),
        (_turn, r"state 'exp_avg' has shape \(4, 3\), its parameter \(3, 4\)"),
    ],
)
def test_same_address_in_another_form_is_noticed(
    adamw: type[AdamW], change: Callable[[Tensor], None], message: str
) -> None:
    params = _model((4, 3), (5,))
    opt = adamw(params)
    opt.step()
    params[0].grad = None
    address = params[0].data_ptr()
    change(params[0])
    assert params[0].data_ptr() == address
    params[0].grad = torch.randn_like(params[0])
    before = params[1].detach().clone()
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(params[1], before)


@pytest.mark.filterwarnings("ignore:AdamW updates a parameter:UserWarning")  # without Triton
def test_same_address_in_another_type(adamw: type[AdamW]) -> None:
    """Zero has the same bits in both 16-bit types, so the second step is as the first."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    opt = adamw([param], lr=0.1, weight_decay=0)
    for dtype in (torch.float16, torch.bfloat16):
        param.data, param.grad = param.data.zero_().view(dtype), None
        param.grad = torch.ones_like(param)
        opt.step()
        # the step is lr, rounded to 8 bits
        torch.testing.assert_close(param.float(), torch.full((4,), -0.1), atol=5e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*its state has another memory layout:UserWarning")
def test_square_parameter_transposed_in_place(adamw: type[AdamW]) -> None:
    params = _model((6, 6))
    opt = adamw(params, lr=0.1)
    twin, copies = _twin(params, lr=0.1)
    _follow(opt, params, twin, copies)
    for param in (params[0], copies[0]):
        param.grad = None
        param.data = param.data.t()
    for _ in range(2):
        params[0].grad = torch.randn(6, 6)
        _follow(opt, params, twin, copies)


@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1,), (8, 8), (64, 1)])
def test_gradient_of_another_shape_is_refused(
    adamw: type[AdamW], shape: tuple[int, ...], first_step: bool
) -> None:
    """Autograd refuses to assign one, but the parameter can be changed under it."""
    params: list[Tensor] = [torch.nn.Parameter(torch.zeros(shape))]
    opt = adamw(params)
    if not first_step:
        params[0].data = torch.zeros(64)
        params[0].grad = torch.ones(64)
        opt.step()
        params[0].grad, params[0].data = None, params[0].data.new_zeros(shape)
    params[0].grad = torch.ones(shape)
    data = torch.zeros(64) if first_step else opt.state[params[0]]["exp_avg"].clone()
    params[0].data = data
    with pytest.raises(RuntimeError, match=r"a gradient has shape \(.*\), its parameter \(64,\)"):
        opt.step()
    assert torch.equal(params[0], data)


def test_gradient_that_changes_shape_under_a_kept_plan(adamw: type[AdamW]) -> None:
    params = _model((64,))
    opt = adamw(params)
    opt.step()
    assert params[0].grad is not None
    params[0].grad.data = torch.ones(16)
    with pytest.raises(RuntimeError, match=r"a gradient has shape \(16,\), its parameter \(64,\)"):
        opt.step()
    assert opt.state[params[0]]["step"] == 1


def test_autograd_notices_the_step(adamw: type[AdamW]) -> None:
    """A graph that saved the weights must not be used after they have changed, as with torch."""
    weight, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    inputs = torch.ones(3, requires_grad=True)
    opt = adamw([weight, other])
    for present in (True, False):
        weight.grad = torch.ones(3)
        other.grad = torch.ones(3) if present else None
        loss, unused = (weight * inputs).sum(), (other * inputs).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    unused.backward()  # had no gradient, so it has not changed
    assert other.grad is not None


def test_state_cleared_starts_again(adamw: type[AdamW]) -> None:
    params = _model((3, 4), (5,))
    opt = adamw(params)
    opt.step()
    opt.state.clear()
    twin, copies = _twin(params)
    _follow(opt, params, twin, copies)
    assert opt.state[params[0]]["step"] == 1


def test_parameter_replaced_in_its_group(adamw: type[AdamW]) -> None:
    """As when points are added to a cloud: a new tensor takes over edited state."""
    params = _model((3, 4), (5,))
    opt = adamw(params)
    opt.step()
    stored = opt.state.pop(params[0])
    for key in ("exp_avg", "exp_avg_sq"):
        stored[key] = torch.cat([stored[key], torch.zeros(2, 4)])
    grown = torch.nn.Parameter(torch.cat([params[0].detach(), torch.ones(2, 4)]))
    opt.param_groups[0]["params"][0] = grown
    opt.state[grown] = stored
    params[0] = grown
    twin, copies = _twin(params)
    # a copy, because torch's optimizer shares the tensors that it loads
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    for param in params:
        param.grad = torch.randn_like(param)
    _follow(opt, params, twin, copies)


@pytest.mark.parametrize("split", [([1, 0], [2]), ([0], [1, 2]), ([2, 1], [0])])
def test_parameters_moved_between_groups(
    adamw: type[AdamW], split: tuple[list[int], list[int]]
) -> None:
    params = _model((3,), (3,), (3,))
    opt = adamw([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    opt.step()
    start = [param.detach().clone() for param in params]
    for group, members in zip(opt.param_groups, split, strict=True):
        group["params"] = [params[i] for i in members]
        group["weight_decay"] = 0.0
    opt.step()
    for i, (param, before) in enumerate(zip(params, start, strict=True)):
        # the same gradient as in the first step, so the second moves by lr again
        moved = (param - before).abs().max().item()
        assert moved == pytest.approx(0.1 if i in split[1] else 1e-3, rel=1e-3)


def test_gradients_that_come_and_go(adamw: type[AdamW]) -> None:
    """Each parameter counts its own steps, so bias corrections differ between parameters."""
    params = _model((20,), (3, 4), (5,), (1030,))
    opt = adamw(params, lr=0.1)
    twin, copies = _twin(params, lr=0.1)
    generator = torch.Generator("cpu").manual_seed(1)
    for present in torch.randint(
        0, 2, (12, 4), generator=generator, dtype=torch.bool, device="cpu"
    ).tolist():
        for param, here in zip(params, present, strict=True):
            values = torch.randn(param.shape, generator=generator, device="cpu").to(param)
            param.grad = values if here else None
        _follow(opt, params, twin, copies)
    counts = [opt.state[param]["step"].item() for param in params]
    assert counts == [twin.state[other]["step"].item() for other in copies]
    assert len(set(counts)) > 1


def test_step_without_gradients_does_nothing(adamw: type[AdamW]) -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(0))]
    opt = adamw(params)
    opt.step()
    assert not opt.state
    params[1].grad = torch.ones(0)
    opt.step()
    assert list(opt.state) == [params[1]]
    assert params[0].tolist() == [1, 1, 1]


def test_frozen_and_thawed(adamw: type[AdamW]) -> None:
    params = _model((4,), (4,))
    params[1].grad = None
    params[1].requires_grad_(False)
    opt = adamw(params)
    opt.step()
    assert params[1] not in opt.state
    params[1].requires_grad_(True)
    params[1].grad = torch.ones(4)
    opt.step()
    assert [opt.state[p]["step"].item() for p in params] == [2, 1]


def test_layouts(adamw: type[AdamW]) -> None:
    """Parameters and gradients in any pair of layouts; the parameter's own is kept."""
    images = torch.randn(4, 3, 5, 6)
    params: list[Tensor] = [
        torch.nn.Parameter(images.clone(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(6, 7).t()),
        torch.nn.Parameter(images.clone()),
        torch.nn.Parameter(torch.randn(1, 9)),
    ]
    strides = [param.stride() for param in params]
    opt = adamw(params)
    twin, copies = _twin(params)
    for _ in range(3):
        params[0].grad = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
        params[1].grad = torch.randn(7, 6)
        params[2].grad = torch.randn(4, 3, 6, 5).transpose(2, 3)
        params[3].grad = torch.randn(1, 1).expand(1, 9)
        _follow(opt, params, twin, copies)
        params[0].grad = torch.randn(4, 3, 5, 6)
        params[1].grad = torch.randn(6, 7).t()
        params[2].grad = torch.randn(4, 3, 5, 6)
        params[3].grad = torch.complex(torch.randn(1, 9), torch.randn(1, 9)).conj().imag
        _follow(opt, params, twin, copies)
    assert [param.stride() for param in params] == strides
    assert opt.state[params[0]]["exp_avg"].stride() == strides[0]


@pytest.mark.filterwarnings("ignore:AdamW updates a parameter:UserWarning")  # without Triton
def test_model_cast_between_steps(adamw: type[AdamW]) -> None:
    """The moments stay float32, a mix that the kernel and the loop take."""
    linear = torch.nn.Linear(3, 2)
    opt = adamw(linear.parameters(), lr=0.1)
    linear(torch.ones(1, 3)).sum().backward()
    opt.step()
    linear.to(torch.bfloat16)
    opt.zero_grad()
    linear(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    before = linear.bias.detach().clone()
    opt.step()
    assert opt.state[linear.bias]["exp_avg"].dtype == torch.float32
    # the gradient was 1 in both steps, so this one is lr again, in bfloat16
    torch.testing.assert_close(
        before - linear.bias, torch.full((2,), 0.1).bfloat16(), atol=5e-3, rtol=0
    )
