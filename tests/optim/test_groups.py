import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torsh_optim import AdamW
from torsh_optim._groups import param_groups


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)


class Net(nn.Module):
    """Embedding, blocks, norm, head; the head's weight may be the embedding's."""

    def __init__(self, blocks: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        if tied:
            self.head.weight = self.embed.weight


def options_of(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options by parameter name."""
    return {
        name: {key: value for key, value in group.items() if key not in ("params", "name")}
        for group in groups
        for name, _ in group["params"]
    }


def test_default_splits_decay_from_no_decay() -> None:
    model = Net(1)
    groups = param_groups(model, lr=0.1, weight_decay=0.5)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("decay", 0.1, 0.5),
        ("no_decay", 0.1, 0.0),
    ]
    assert [name for name, _ in groups[0]["params"]] == [
        "cls_token", "embed.weight", "blocks.0.fc1.weight", "blocks.0.fc2.weight", "head.weight",
    ]  # fmt: skip
    for group in groups:
        for name, tensor in group["params"]:
            assert tensor is model.get_parameter(name)


@pytest.mark.parametrize(
    ("no_decay", "decayed"),
    [
        ("norm_bias_1d", {"0.weight", "2.weight", "emb.weight", "pos_embed", "gain"}),
        ("norm_bias_1d_embedding", {"0.weight", "2.weight", "gain"}),
        ("bias", {"0.weight", "1.weight", "2.weight", "emb.weight", "pos_embed", "gain", "scale"}),
        ("norm", {"0.weight", "0.bias", "2.weight", "2.bias", "emb.weight", "pos_embed",
                  "gain", "scale"}),
        ("1d", {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "emb.weight", "pos_embed",
                "gain"}),
        ("none", {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "emb.weight",
                  "pos_embed", "gain", "scale"}),
    ],
)  # fmt: skip
def test_no_decay(no_decay: str, decayed: set[str]) -> None:
    model = nn.ModuleDict(
        {
            "0": nn.Linear(2, 2),
            "1": nn.LayerNorm((2, 2)),  # a norm with matrices
            "2": nn.Linear(2, 2, bias=False),
            "emb": nn.Embedding(3, 2),
        }
    )
    model["2"].register_parameter("bias", nn.Parameter(torch.zeros(1, 2)))  # a bias with two axes
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 3, 2)))
    model.register_parameter("gain", nn.Parameter(torch.zeros(2, 2)))
    model.register_parameter("scale", nn.Parameter(torch.zeros(2)))
    options = options_of(param_groups(model, 1.0, 0.1, no_decay=no_decay))
    assert {name for name, one in options.items() if one["weight_decay"]} == decayed


def test_norms_are_found_by_the_name_of_their_class() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    class NormedLinear(LlamaRMSNorm):
        pass

    model = nn.Sequential(LlamaRMSNorm(), NormedLinear())
    options = options_of(param_groups(model, 1.0, 0.1))
    assert options["0.weight"]["weight_decay"] == 0.0
    assert options["1.weight"]["weight_decay"] == 0.1


class Timm(Net):
    """What timm's models have."""

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "blocks.*.fc2.weight"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^embed|cls_token", "blocks": [(r"^blocks\.(\d+)", None)]}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_timm_conventions(prefix: str) -> None:
    model: nn.Module = nn.ModuleDict({"model": Timm(2)}) if prefix else Timm(2)
    groups = param_groups(model, 1.0, 0.1, layer_decay=0.5)
    options = options_of(groups)
    assert options[f"{prefix}cls_token"] == {"lr": 0.125, "weight_decay": 0.0}
    assert options[f"{prefix}embed.weight"] == {"lr": 0.125, "weight_decay": 0.1}
    assert options[f"{prefix}blocks.0.fc1.weight"] == {"lr": 0.25, "weight_decay": 0.1}
    assert options[f"{prefix}blocks.1.fc2.weight"] == {"lr": 0.5, "weight_decay": 0.0}
    assert options[f"{prefix}norm.weight"] == {"lr": 1.0, "weight_decay": 0.0}  # not in the matcher
    assert options[f"{prefix}head.weight"] == {"lr": 1.0, "weight_decay": 0.1}
    kept = options_of(param_groups(model, 1.0, 0.1, no_decay="none"))
    assert kept[f"{prefix}cls_token"]["weight_decay"] == 0.1


def test_layer_decay_by_depth() -> None:
    groups = param_groups(Net(2), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("layer_0.decay", 0.125),
        ("layer_1.decay", 0.25),
        ("layer_1.no_decay", 0.25),
        ("layer_2.decay", 0.5),
        ("layer_2.no_decay", 0.5),
        ("head.decay", 1.0),
        ("head.no_decay", 1.0),
    ]
    assert options_of(groups)["norm.weight"]["lr"] == 0.5  # with the last block


@pytest.mark.parametrize("layer_decay", [0.75, 0.65])
def test_layer_decay_as_in_timm(layer_decay: float) -> None:
    """The lr_scale of layers 0 and 6 in timm 1.0.31's groups of vit_base_patch16_224."""
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.vit_b_16()
    options = options_of(param_groups(model, 1e-3, layer_decay=layer_decay))
    scales = {
        0.75: (0.023757264018058777, 0.13348388671875),
        0.65: (0.003697205891018715, 0.049022278906250015),
    }
    stem, middle = (scale * 1e-3 for scale in scales[layer_decay])
    # timm multiplies afterwards: a rounding or two
    assert options["conv_proj.weight"]["lr"] == pytest.approx(stem, rel=1e-12)
    name = "encoder.layers.encoder_layer_5.mlp.0.weight"
    assert options[name]["lr"] == pytest.approx(middle, rel=1e-12)
    assert options["heads.head.weight"]["lr"] == 1e-3


def test_equal_options_share_a_group() -> None:
    groups = param_groups(Net(3), lr=1.0, weight_decay=0.1, layer_decay=1.0)
    assert [group["name"] for group in groups] == ["layer_0..head.decay", "layer_1..head.no_decay"]
    assert len(param_groups(Net(3), lr=1.0, weight_decay=0.0)) == 1


def test_the_order_is_that_of_depth() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 2), "body": nn.Sequential(Block(), Block())})
    groups = param_groups(model, 1.0, 0.1, layer_decay=1.0)
    assert [group["name"] for group in groups] == ["layer_0..head.decay", "layer_0..head.no_decay"]
    assert groups[0]["params"][-1][0] == "head.weight"
    groups = param_groups(model, 1.0, 0.1, head={"lr": 2.0}, rules=[("norm", {"weight_decay": 1})])
    assert [group["name"] for group in groups] == [
        "backbone.decay", "backbone.decay.rule_0", "backbone.no_decay", "head.decay",
        "head.no_decay",
    ]  # fmt: skip


def test_frozen_parameters_are_left_out_and_keep_the_depths() -> None:
    model = Net(3)
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    groups = param_groups(model, 1.0, 0.1, layer_decay=0.5)
    options = options_of(groups)
    assert "embed.weight" not in options
    assert options["cls_token"]["lr"] == 0.5**4
    assert options["blocks.1.fc1.weight"]["lr"] == 0.5**2
    assert not any(name.startswith("blocks.0") for name in options)


def test_head_options() -> None:
    groups = param_groups(Net(1), 0.1, 0.5, head={"lr": 1.0, "weight_decay": 0.2, "eps": 1e-6})
    assert [group["name"] for group in groups] == [
        "backbone.decay", "backbone.no_decay", "head.decay", "head.no_decay",
    ]  # fmt: skip
    options = options_of(groups)
    assert options["head.weight"] == {"lr": 1.0, "weight_decay": 0.2, "eps": 1e-6}
    assert options["head.bias"] == {"lr": 1.0, "weight_decay": 0.0, "eps": 1e-6}
    assert options["norm.weight"] == {"lr": 0.1, "weight_decay": 0.0}


def test_head_options_with_layer_decay() -> None:
    options = options_of(param_groups(Net(1), 0.1, layer_decay=0.5, head={"lr": 1.0}))
    assert options["head.weight"]["lr"] == 1.0
    assert options["blocks.0.fc1.weight"]["lr"] == 0.05
    assert options["embed.weight"]["lr"] == 0.025


@pytest.mark.parametrize("modules", ["blocks.2", ["blocks.2", "norm"]])
def test_head_modules(modules: Any) -> None:
    groups = param_groups(Net(3), 0.1, head={"lr": 1.0}, head_modules=modules)
    fast = {name for name, one in options_of(groups).items() if one["lr"] == 1.0}
    assert fast == {
        name for name, _ in Net(3).named_parameters()
        if name.startswith(("blocks.2.", "norm.") if isinstance(modules, list) else "blocks.2.")
    }  # fmt: skip


def test_tied_parameters_are_there_once() -> None:
    model = Net(2, tied=True)
    groups = param_groups(model, 1.0, 0.1, layer_decay=0.5, no_decay="norm_bias_1d_embedding")
    options = options_of(groups)
    assert "head.weight" not in options
    assert options["embed.weight"] == {"lr": 0.125, "weight_decay": 0.0}
    assert options["head.bias"]["lr"] == 1.0
    by_alias = param_groups(model, 1.0, rules=[(r"^head\.weight", {"lr": 7.0})])
    assert options_of(by_alias)["embed.weight"]["lr"] == 7.0


def test_rules_in_order() -> None:
    rules: list[Any] = [
        (r"^blocks\.", {"lr": 0.1, "betas": (0.9, 0.95)}),
        (nn.LayerNorm, {"lr": 0.2}),
        ([re.compile("FC2", re.IGNORECASE), Block], {"eps": 1e-6}),
        ("bias", {"weight_decay": 0.3}),
    ]
    groups = param_groups(Net(1), 1.0, 0.5, rules=rules)
    options = options_of(groups)
    assert options["embed.weight"] == {"lr": 1.0, "weight_decay": 0.5}
    inside = {"betas": (0.9, 0.95), "eps": 1e-6}
    assert options["blocks.0.fc1.weight"] == {"lr": 0.1, "weight_decay": 0.5, **inside}
    assert options["blocks.0.norm.weight"] == {"lr": 0.2, "weight_decay": 0.0, **inside}
    assert options["blocks.0.fc1.bias"] == {"lr": 0.1, "weight_decay": 0.3, **inside}
    assert options["norm.weight"] == {"lr": 0.2, "weight_decay": 0.0}
    assert "decay.rule_0.rule_2" in [group["name"] for group in groups]
    assert len({group["name"] for group in groups}) == len(groups)


def test_later_rules_win_over_everything() -> None:
    rules = [("head", {"lr": 3.0}), (r"head\.bias", {"lr": 4.0})]
    options = options_of(param_groups(Net(1), 1.0, layer_decay=0.5, head={"lr": 2.0}, rules=rules))
    assert (options["head.weight"]["lr"], options["head.bias"]["lr"]) == (3.0, 4.0)


def test_own_depth() -> None:
    depth = {"embed": 0, "cls_token": 0, "blocks": 4}
    groups = param_groups(
        Net(1), 1.0, layer_decay=0.5, depth=lambda name: depth.get(name.split(".")[0], 5)
    )
    options = options_of(groups)
    assert options["embed.weight"]["lr"] == 0.5**5  # gaps are kept
    assert options["blocks.0.fc1.weight"]["lr"] == 0.5


def test_groups_are_named_in_state_and_match_after_loading() -> None:
    model = Net(2)
    opt = AdamW(param_groups(model, 1e-2, layer_decay=0.5))
    names = [name for group in opt.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    again = AdamW(param_groups(copy.deepcopy(model), 1e-2, layer_decay=0.5))
    again.load_state_dict(opt.state_dict())
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in opt.param_groups]


def test_unknown_option_is_left_to_the_optimizer() -> None:
    groups = param_groups(Net(1), 1.0, rules=[("head", {"weigth_decay": 0.1})])
    with pytest.raises(ValueError, match="weight_decay"):
        AdamW(groups)


_layer = st.sampled_from(["linear", "norm", "embedding", "block", "stage"])


def _make(kind: str) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(4, 4),
        "norm": lambda: nn.LayerNorm(4),
        "embedding": lambda: nn.Embedding(3, 4),
        "block": Block,
        "stage": lambda: nn.Sequential(Block(), Block()),
    }[kind]()


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(_layer, min_size=1, max_size=6),
    frozen=st.sets(st.integers(0, 5), max_size=4),
    tie=st.booleans(),
    lr=st.floats(1e-8, 10.0),
    layer_decay=st.none() | st.floats(0.05, 1.0),
    weight_decay=st.floats(0.0, 1.0),
    chain=st.sampled_from([nn.Sequential, nn.ModuleList]),
)
def test_every_trainable_parameter_once(
    kinds: list[str],
    frozen: set[int],
    tie: bool,
    lr: float,
    layer_decay: float | None,
    weight_decay: float,
    chain: Any,
) -> None:
    elements = [_make(kind) for kind in kinds]
    linear = [element for element in elements if isinstance(element, nn.Linear)]
    if tie and len(linear) > 1:
        linear[-1].weight = linear[0].weight
    model = chain(*elements) if chain is nn.Sequential else chain(elements)
    for i in frozen & set(range(len(elements))):
        elements[i].requires_grad_(False)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        with pytest.raises(ValueError, match="no trainable parameters"):
            param_groups(model, lr)
        return
    groups = param_groups(model, lr, weight_decay, layer_decay=layer_decay)
    found = [id(tensor) for group in groups for _, tensor in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == trainable
    assert all(group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)
    rates = {id(t): group["lr"] for group in groups for _, t in group["params"]}
    assert all(0.0 < rate <= lr for rate in rates.values())
    if layer_decay is not None and "embedding" not in kinds:  # those are layer 0 wherever they are
        in_order = [rates[id(p)] for p in model.parameters() if p.requires_grad]
        assert in_order == sorted(in_order)
    for kind in (AdamW, torch.optim.AdamW):
        opt = kind([dict(group) for group in groups])
        assert [len(group["params"]) for group in opt.param_groups] == [
            len(group["params"]) for group in groups
        ]
        assert all("param_names" in group for group in opt.param_groups)


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(nn.LazyLinear(2))
    return model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_decay": 0.0}, ValueError, r"layer_decay=0.0 must be in \(0, 1\]"),
        ({"layer_decay": 1.5}, ValueError, r"layer_decay=1.5 must be in \(0, 1\]"),
        ({"layer_decay": math.nan}, ValueError, "layer_decay=nan must be in"),
        ({"lr": 0.0}, ValueError, "lr=0.0 must be a finite number above 0"),
        ({"lr": math.inf}, ValueError, "lr=inf must be a finite"),
        ({"lr": torch.tensor(1.0)}, TypeError, "lr must be a number, got Tensor"),
        ({"lr": None}, TypeError, "lr must be a number, got NoneType"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 must be a finite number of at"),
        ({"weight_decay": True}, TypeError, "weight_decay must be a number, got bool"),
        ({"no_decay": "norms"}, ValueError, "no_decay='norms' must be 'none' or some of norm"),
        ({"model": [1]}, TypeError, "model must be a torch.nn.Module, got list"),
        ({"depth": len}, ValueError, "depth is used by layer_decay only"),
        ({"depth": lambda name: -1, "layer_decay": 0.5}, ValueError,
         r"depth\('cls_token'\) returned -1; it must be an integer from 0"),
        ({"head_modules": "head"}, ValueError, "head_modules has no effect without head or"),
        ({"head": {"lr": 1.0}, "head_modules": "haed"}, ValueError,
         "head_modules names 'haed', which is no module of the model; did you mean 'head'"),
        ({"head": {"lr": 1.0}, "head_modules": ["zzz"]}, ValueError,
         "its modules are 'embed', 'blocks', 'norm', 'head'"),
        ({"head": {}}, TypeError, r"head must have options such as \{'lr': 1e-4\}, got \{\}"),
        ({"head": {"params": []}}, ValueError, "head sets 'params', which groups get from the"),
        ({"model": nn.Sequential(Block(), Block()), "head": {"lr": 1.0}}, ValueError,
         "head is set, but no head was found; name its modules in head_modules.*'0', '1'"),
        ({"rules": [("block.0", {"lr": 1.0})]}, ValueError,
         r"rules\[0\] \('block.0'\) selects no parameter; did you mean 'blocks.0'"),
        ({"rules": [(r"^embd\.weight$", {"lr": 1.0})]}, ValueError, "did you mean 'embed.weight'"),
        ({"rules": [("qqqqqqqq", {"lr": 1.0})]}, ValueError, "the modules are 'embed', 'blocks'"),
        ({"rules": [(["head", nn.Conv2d], {"lr": 1.0})]}, ValueError,
         r"rules\[0\] \(Conv2d\) selects no parameter"),
        ({"rules": [(nn.LayerNorm, {"lr": 1.0}), (nn.RMSNorm, {"lr": 1.0})]}, ValueError,
         r"rules\[1\] \(RMSNorm\) selects no parameter; did you mean 'LayerNorm'"),
        ({"rules": [("head(", {"lr": 1.0})]}, ValueError,
         r"rules\[0\] is not a regular expression: 'head\(' .*re.escape"),
        ({"rules": [(3, {"lr": 1.0})]}, TypeError, r"rules\[0\] selects by 3; it must be a reg"),
        ({"rules": [(int, {"lr": 1.0})]}, TypeError, r"rules\[0\] selects by <class 'int'>"),
        ({"rules": ["head"]}, TypeError, r"rules\[0\] must be a pair of a selector and options"),
        ({"rules": [("head", {"param_names": ["x"]})]}, ValueError,
         r"rules\[0\] sets 'param_names', which groups get from the model"),
        ({"rules": [("head", {"name": "x"})]}, ValueError, r"rules\[0\] sets 'name'"),
        ({"rules": [("head", 0.1)]}, TypeError, r"rules\[0\] must have options"),
        ({"no_decay": ["bias"]}, TypeError,
         r"no_decay=\['bias'\] must be a string, .* norm, bias, 1d, embedding .* use rules"),
        ({"model": Net(1).parameters()}, TypeError, "got generator; pass the model itself"),
        ({"model": list(Net(1).parameters())}, TypeError, "got list; pass the model itself"),
        ({"model": 3}, TypeError, "got int$"),
        ({"model": nn.ReLU()}, ValueError, r"model has no trainable parameters \(0 frozen\)"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, ValueError, r"\(2 frozen\); set req"),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": Net(1), "lr": 1.0, **options}
    with pytest.raises(error, match=message):
        param_groups(**arguments)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'1.weight' has no shape yet; pass a batch"):
        param_groups(_lazy(), 1.0)


def test_frozen_selection_is_an_error() -> None:
    model = Net(1)
    model.head.requires_grad_(False)
    for selector in (r"^head\.", nn.Linear):
        model.blocks.requires_grad_(selector is not nn.Linear)
        with pytest.raises(ValueError, match=r"selects frozen parameters only; remove it"):
            param_groups(model, 1.0, rules=[(selector, {"lr": 1.0})])
    with pytest.raises(ValueError, match="head has no trainable parameters of its own"):
        param_groups(model, 1.0, head={"lr": 1.0})


def test_a_head_tied_to_the_backbone_is_an_error() -> None:
    model = Net(1, tied=True)
    model.head.bias = None
    with pytest.raises(ValueError, match=r"head has no trainable .*\(frozen, or tied"):
        param_groups(model, 1.0, head={"lr": 1.0})


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_flat_parameters_are_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="'model' is wrapped in FullyShardedDataParallel"):
            param_groups(model, 1.0)
    finally:
        dist.destroy_process_group()
