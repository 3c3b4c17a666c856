"""States go to torch's AdamW and back, keep their types, and are refused when they do not fit."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torsh_optim import LAMB, SGD, AdamW, Lion, Lookahead


def _pair(**options: Any) -> list[Tensor]:
    return [
        torch.nn.Parameter(torch.randn(3, 4, **options)),
        torch.nn.Parameter(torch.randn(5, **options)),
    ]


def _steps(params: list[Tensor], opt: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, device="cpu").to(param)
        opt.step()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("to_torch", [False, True])
@pytest.mark.parametrize("torch_options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_interchange_with_torch(
    to_torch: bool, amsgrad: bool, torch_options: dict[str, bool]
) -> None:
    """Half of a run in one, half in the other, equals the whole in either."""
    params = _pair()
    whole = [torch.nn.Parameter(p.detach().clone()) for p in params]
    makers = [
        lambda ps: torch.optim.AdamW(ps, amsgrad=amsgrad, lr=0.05, **torch_options),
        lambda ps: AdamW(ps, amsgrad=amsgrad, lr=0.05),
    ]
    if to_torch:
        makers.reverse()
    first = makers[0](params)
    _steps(params, first, 3)
    second = makers[1](params)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _steps(params, second, 3, seed=1)
    reference = torch.optim.AdamW(whole, amsgrad=amsgrad, lr=0.05, foreach=False)
    _steps(whole, reference, 3)
    _steps(whole, reference, 3, seed=1)
    for mine, theirs in zip(params, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=5e-7)  # rounding of six steps
        state, expected = second.state[mine], reference.state[theirs]
        assert set(state) == set(expected)
        assert state["step"] == 6
    if not to_torch:  # how to compute stays the business of the optimizer that loads
        assert second.param_groups[0]["fused"] is None
        assert second.param_groups[0]["foreach"] is None


def test_round_trip_is_exact(adamw: type[AdamW], tmp_path: Path) -> None:
    params = _pair()
    opt = adamw([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], amsgrad=True)
    _steps(params, opt, 3)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = adamw([{"params": copies[:1]}, {"params": copies[1:]}])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.param_groups[0]["torsh_version"] == 2
    _steps(params, opt, 3, seed=1)
    _steps(copies, other, 3, seed=1)
    for mine, theirs in zip(params, copies, strict=True):
        assert torch.equal(mine, theirs)
        for key, value in opt.state[mine].items():
            assert torch.equal(value, other.state[theirs][key])
            assert value.dtype == other.state[theirs][key].dtype


def test_types_are_kept_and_nothing_is_shared() -> None:
    """torch would turn each of these into bfloat16."""
    params = _pair(dtype=torch.bfloat16)
    opt = AdamW(params)
    saved = opt.state_dict()
    saved["state"] = {
        i: {
            "step": 7,
            "exp_avg": torch.randn_like(p, dtype=torch.float32),
            "exp_avg_sq": torch.rand_like(p, dtype=torch.float64),
            "code": torch.arange(3, dtype=torch.uint8),
            "note": [1, 2],
        }
        for i, p in enumerate(params)
    }
    before = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    state = opt.state[params[0]]
    assert [state[k].dtype for k in ("step", "exp_avg", "exp_avg_sq", "code")] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.uint8,
    ]
    state["exp_avg"].zero_()
    state["code"].zero_()
    state["note"].append(3)
    opt.param_groups[0]["lr"] = 7.0
    assert saved["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        found = saved["state"][0][key]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


def test_memory_layout_follows_the_parameter() -> None:
    images = torch.randn(2, 3, 4, 5)
    param = torch.nn.Parameter(images.to(memory_format=torch.channels_last))
    opt = AdamW([param])
    param.grad = torch.randn_like(param)
    opt.step()
    saved = opt.state_dict()
    exp_avg = saved["state"][0]["exp_avg"]
    saved["state"][0] = {**saved["state"][0], "exp_avg": exp_avg.contiguous()}
    opt.load_state_dict(saved)
    assert opt.state[param]["exp_avg"].stride() == param.stride()
    assert torch.equal(opt.state[param]["exp_avg"], exp_avg)


def test_names_decide_when_they_are_the_same() -> None:
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    opt = AdamW([("a", first), ("b", second)])
    first.grad, second.grad = torch.ones(3), torch.full((3,), 2.0)
    opt.step()
    turned = AdamW([("b", second), ("a", first)])
    turned.load_state_dict(opt.state_dict())
    for param in (first, second):
        assert torch.equal(turned.state[param]["exp_avg"], opt.state[param]["exp_avg"])
    assert turned.param_groups[0]["param_names"] == ["b", "a"]


def _decay_groups(order: str, names: dict[str, list[str]] | None = None) -> AdamW:
    options = {"w": {"weight_decay": 0.1, "lr": 1e-3}, "b": {"weight_decay": 0.0, "lr": 1e-5}}
    names = names or {"w": ["w0", "w1"], "b": ["b0"]}
    groups: list[dict[str, Any]] = [
        {"params": [(name, torch.nn.Parameter(torch.zeros(1))) for name in names[key]]}
        | options[key]
        for key in order
    ]
    opt = AdamW(groups)
    for group in opt.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            param.grad = torch.full((1,), float(name[1]) + (10.0 if name[0] == "b" else 1.0))
    return opt


def test_names_take_the_options_of_their_group_along() -> None:
    """Saved as weights and biases, loaded as biases and weights."""
    saved = _decay_groups("wb")
    saved.step()
    turned = _decay_groups("bw", {"w": ["w1", "w0"], "b": ["b0"]})
    turned.load_state_dict(saved.state_dict())
    assert [(g["weight_decay"], g["lr"]) for g in turned.param_groups] == [(0.0, 1e-5), (0.1, 1e-3)]
    assert [g["param_names"] for g in turned.param_groups] == [["b0"], ["w1", "w0"]]
    moments = [
        turned.state[param]["exp_avg"].item() for g in turned.param_groups for param in g["params"]
    ]
    assert moments == pytest.approx([1.0, 0.2, 0.1])  # a tenth of the gradients 10, 2 and 1


def test_groups_with_other_members_are_refused() -> None:
    saved = _decay_groups("wb").state_dict()
    for names in ({"w": ["w0"], "b": ["b0", "w1"]}, {"w": ["w0", "b0"], "b": ["w1"]}):
        opt = _decay_groups("wb", names)
        before = [dict(g) for g in opt.param_groups]
        with pytest.raises(ValueError, match=r"in another way: '[wb]\d' is in group \d here and"):
            opt.load_state_dict(saved)
        assert [dict(g) for g in opt.param_groups] == before


def test_group_without_parameters_is_paired_too() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a, b = {"params": [("a", first)]}, {"params": [("b", second)]}
    none: dict[str, Any] = {"params": [], "param_names": []}
    saved = AdamW([{**a, "lr": 0.5}, {**none, "lr": 0.25}, dict(b)])
    turned = AdamW([dict(none), dict(b), dict(a)])
    turned.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in turned.param_groups] == [0.25, 1e-3, 0.5]


def test_other_names_are_said() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    opt = AdamW([("a", param)])
    param.grad = torch.ones(3)
    opt.step()
    other = AdamW([("module.a", param)])
    with pytest.warns(UserWarning, match="by position: 'a' there, 'module.a' here"):
        other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[param]["exp_avg"], opt.state[param]["exp_avg"])
    AdamW([param]).load_state_dict(opt.state_dict())  # no names on one side: by position


def _without(key: str) -> Any:
    def damage(saved: dict[str, Any]) -> None:
        del saved["state"][0][key]

    return damage


def _reshape(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg_sq"] = torch.zeros(6)


def _newer(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["torsh_version"] = 99


def _of_adam(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["decoupled_weight_decay"] = False


def _two_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"] *= 2


def _one_less(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("exp_avg"), "'exp_avg' of parameter 0 is missing in the loaded state"),
        (_without("step"), "'step' of parameter 0 is missing"),
        (_reshape, r"'exp_avg_sq' of parameter 1 in the loaded state is \(6,\), but .* \(5,\)"),
        (_newer, "torsh_version=99 of the loaded state is newer than 2"),
        (_of_adam, "decoupled_weight_decay=False is Adam, not AdamW"),
        (_two_groups, "different number of parameter groups: 2, not 1"),
        (_one_less, "group 0 has 1 parameters, not 2"),
    ],
)
def test_states_that_do_not_fit_are_refused(damage: Any, message: str) -> None:
    params = _pair()
    opt = AdamW(params)
    _steps(params, opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    damage(saved)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.state[params[0]]["step"] == 1  # and nothing was loaded


def test_load_hooks_run_in_order() -> None:
    params = _pair()
    opt = AdamW(params)
    _steps(params, opt, 1)
    seen: list[str] = []

    def pre(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        return {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.5}]}

    opt.register_load_state_dict_pre_hook(pre)
    opt.register_load_state_dict_post_hook(lambda optimizer: seen.append("post"))
    opt.load_state_dict(state_dict=opt.state_dict())
    assert seen == ["pre", "post"]
    assert opt.param_groups[0]["lr"] == 0.5


def test_older_state_without_new_options() -> None:
    params = _pair()
    opt = AdamW(params)
    _steps(params, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    for key in ("maximize", "foreach", "capturable", "fused", "torsh_version", "amsgrad"):
        del saved["param_groups"][0][key]
    for state in saved["state"].values():
        state["step"] = 2
    opt.load_state_dict(saved)
    _steps(params, opt, 1)
    assert opt.state[params[0]]["step"] == 3


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.slow
def test_lightning_resumes_where_it_stopped(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    import warnings

    from torch.utils.data import DataLoader, TensorDataset

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            opt = AdamW(self.named_parameters(), lr=0.05)
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 4, generator=generator)
    data = DataLoader(TensorDataset(inputs, inputs[:, :2].clone()), batch_size=4)

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Any, Net]:
        torch.manual_seed(0)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=tmp_path,
        )
        net = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers and folders
            trainer.fit(net, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return trainer, net

    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(4, tmp_path / "half.ckpt")
    _, whole = fit(4)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("make", [AdamW, lambda ps: Lookahead(AdamW(ps))])
def test_state_and_optimizer_are_pickled_in_linear_size(make: Any) -> None:
    """The step counters share one tensor while they are in use, but not when they are saved."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(200)]
    opt = make(params)
    _steps(params, opt, 2)
    for thing in (opt.state_dict(), opt):
        pickled = pickle.dumps(thing)
        assert len(pickled) < 200 * 1500  # about 1 kB each; a view of all would add 800 bytes each
    for values in opt.state_dict()["state"].values():
        assert values["step"].untyped_storage().nbytes() == 4
    steps = [opt.state[param]["step"] for param in params]
    kept = copy.deepcopy(opt.state_dict())
    _steps(params, opt, 1)
    assert [step.item() for step in steps] == [3] * 200  # the optimizer's own stay what they were
    assert kept["state"][7]["step"] == 2


def _stepped(kind: Any, **options: Any) -> torch.optim.Optimizer:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt: torch.optim.Optimizer = kind([param], **options)
    opt.step()
    return opt


@pytest.mark.parametrize(
    ("source", "target", "option"),
    [
        (AdamW, Lion, "amsgrad"),
        (torch.optim.AdamW, Lion, "amsgrad"),
        (AdamW, LAMB, "amsgrad"),
        (LAMB, AdamW, "always_adapt"),
        (torch.optim.AdamW, SGD, "amsgrad"),
        (torch.optim.SGD, AdamW, "dampening"),
        (torch.optim.RMSprop, SGD, "alpha"),
        (torch.optim.NAdam, AdamW, "momentum_decay"),
    ],
)
def test_states_of_other_algorithms_are_refused(source: Any, target: Any, option: str) -> None:
    opt = target([torch.nn.Parameter(torch.ones(3))])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=f"option '{option}', which {target.__name__} does not"):
        opt.load_state_dict(_stepped(source).state_dict())
    assert opt.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3, dtype=torch.uint8)), "torch.uint8"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3) * 1j), "is torch.complex64, the par"),
        (lambda s: s["state"][0].update(step=torch.tensor(torch.nan)), "is nan, not a whole"),
        (lambda s: s["state"][0].update(step=-5), "is -5.0, not a whole number of at least 0"),
        (lambda s: s["state"][0].update(step=2.5), "is 2.5, not a whole number"),
        (lambda s: s["state"].update({7: s["state"][0]}), "an entry 7, but no parameter of that"),
        (lambda s: s["param_groups"][0].update(torsh_version=-1), "torsh_version=-1 .* no version"),
        (
            lambda s: s["param_groups"][0].update(torsh_version="2"),
            "torsh_version='2' .* no version",
        ),
        (lambda s: s["param_groups"][0].pop("params"), "no list 'params'"),
    ],
)
def test_damaged_states_are_refused(change: Any, message: str) -> None:
    opt = _stepped(AdamW)
    saved = copy.deepcopy(opt.state_dict())
    change(saved)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    opt.step()


def test_no_state_at_all() -> None:
    opt = _stepped(AdamW)
    for wrong in (None, "state.pt"):
        with pytest.raises(
            TypeError, match=r"an optimizer state is a dictionary, got (NoneType|str)"
        ):
            opt.load_state_dict(wrong)  # pyrefly: ignore[bad-argument-type]


def test_loading_says_what_it_switches_off() -> None:
    opt = _stepped(AdamW, max_grad_norm=1.0, warmup_steps=3)
    with pytest.warns(UserWarning, match="switches max_grad_norm off: 1.0 here, None there"):
        opt.load_state_dict(_stepped(AdamW).state_dict())
    assert opt.param_groups[0]["max_grad_norm"] is None
    kept = _stepped(AdamW, max_grad_norm=1.0, warmup_steps=3)
    kept.load_state_dict(_stepped(torch.optim.AdamW).state_dict())  # torch's has no such option
    assert [kept.param_groups[0][key] for key in ("max_grad_norm", "warmup_steps")] == [1.0, 3]
