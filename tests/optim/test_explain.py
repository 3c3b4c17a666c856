import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

from torsh_optim import AdamW, Lookahead
from torsh_optim._explain import explain_groups
from torsh_optim._groups import param_groups


def groups() -> list[dict[str, Any]]:
    model = nn.Sequential(nn.Linear(1000, 2), nn.Linear(2, 3))
    return param_groups(
        model, 1e-3, 0.1, layer_decay=0.5, rules=[(r"1\.bias", {"betas": (0.8, 0.9)})]
    )


_TABLE = """
group                 tensors  parameters      lr  weight decay         betas
layer_0.decay               1       2,000  0.0005           0.1  (0.9, 0.999)
layer_0.no_decay            1           2  0.0005             0  (0.9, 0.999)
head.decay                  1           6   0.001           0.1  (0.9, 0.999)
head.no_decay.rule_0        1           3   0.001             0    (0.8, 0.9)
total                       4       2,011
""".strip()


@pytest.mark.parametrize("kind", ["torch", "own", "lookahead"])
def test_table_of_an_optimizer(kind: str) -> None:
    opt: Any = {
        "torch": torch.optim.AdamW,
        "own": AdamW,
        "lookahead": lambda given: Lookahead(AdamW(given)),
    }[kind](groups())
    assert str(explain_groups(opt)) == _TABLE
    rows = explain_groups(opt).rows
    assert [row.param_names for row in rows] == [("0.weight",), ("0.bias",), ("1.weight",),
                                                 ("1.bias",)]  # fmt: skip
    assert [row.parameters for row in rows] == [2000, 2, 6, 3]
    assert rows[3].options == {"betas": (0.8, 0.9)}


def test_rows_are_for_machines() -> None:
    row = explain_groups(AdamW(groups())).rows[0]
    assert json.loads(json.dumps(dataclasses.asdict(row))) == {
        "name": "layer_0.decay",
        "tensors": 1,
        "parameters": 2000,
        "lr": 0.0005,
        "weight_decay": 0.1,
        "options": {"betas": [0.9, 0.999]},
        "param_names": ["0.weight"],
    }


def test_groups_before_the_optimizer() -> None:
    table = explain_groups(groups())
    assert [row.options["betas"] for row in table.rows] == [None, None, None, (0.8, 0.9)]
    assert str(table).splitlines()[1].endswith(" -")
    assert table.rows[0].param_names == ("0.weight",)


def test_changes_show() -> None:
    opt = torch.optim.SGD([{"params": nn.Linear(2, 2).parameters()}], lr=torch.tensor(0.25))
    opt.add_param_group({"params": nn.Linear(3, 3, bias=False).weight, "momentum": 0.5, "lr": 1})
    first, second = explain_groups(opt).rows
    assert (first.name, first.tensors, first.parameters, first.lr) == ("0", 2, 6, 0.25)
    assert (second.name, second.lr, second.options) == ("1", 1.0, {"momentum": 0.5})
    assert second.param_names == ()


def test_optimizer_without_weight_decay() -> None:
    table = explain_groups(torch.optim.Rprop(nn.Linear(2, 2).parameters()))
    assert table.rows[0].weight_decay is None
    assert str(table).splitlines()[0].split() == ["group", "tensors", "parameters", "lr"]


def test_a_tensor_alone_and_no_groups() -> None:
    assert explain_groups([{"params": torch.zeros(3)}]).rows[0].parameters == 3
    assert str(explain_groups([])).splitlines()[1].split() == ["total", "0", "0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            nn.Linear(2, 2),
            "takes an optimizer or a list of parameter groups, got Linear; for a model: expl",
        ),
        (list(nn.Linear(2, 2).parameters()), "got list of other things"),
        ([{"lr": 0.1}], "got list of other things"),
        ([{"params": nn.Linear(2, 2).parameters()}], "group '0' are an iterator, which counting"),
    ],
)
def test_errors(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        explain_groups(given)
