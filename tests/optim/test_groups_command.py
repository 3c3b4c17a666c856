import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torsh_optim._groups_command import groups

_MODELS = """
import torch
from torch import nn

INSTANCE = nn.Linear(4, 2)
NUMBER = 3
DEVICES = []


def build():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    DEVICES.append(model[0].weight.device.type)
    return model


def with_values():
    return nn.Linear(4, int(torch.ones(2).sum()))


def broken():
    raise RuntimeError("no such weights")


def many_lines():
    raise KeyError("first\\nsecond")


def with_arguments(width, *, depth, bias=True, **options):
    return nn.Linear(width, depth)


def other():
    return [1]


class Factory:
    @staticmethod
    def build():
        return build()
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_models_of_test.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield "own_models_of_test"
    assert sys.path == before
    sys.modules.pop("own_models_of_test", None)


def report(capsys: pytest.CaptureFixture[str], model: str, **options: Any) -> dict[str, Any]:
    groups(model, json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["model"] == model
    return {group["name"]: group for group in found["groups"]}


def test_own_function(own_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, f"{own_models}:build", lr=1.0, weight_decay=0.5, layer_decay=0.5)
    assert found["layer_0.decay"] == {
        "name": "layer_0.decay",
        "tensors": 1,
        "parameters": 32,
        "lr": 0.5,
        "weight_decay": 0.5,
        "options": {},
        "param_names": ["0.weight"],
    }
    assert found["head.no_decay"]["lr"] == 1.0
    assert sys.modules[own_models].DEVICES == ["meta"]  # without memory


@pytest.mark.parametrize("name", ["with_values", "INSTANCE", "Factory.build"])
def test_own_objects(name: str, own_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, f"{own_models}:{name}")
    assert found["no_decay"]["parameters"] == (10 if name == "Factory.build" else 2)


def test_table(own_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    groups(f"{own_models}:build")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1] == ["group", "tensors", "parameters", "lr", "weight", "decay"]
    assert ["decay", "2", "48", "0.001", "0.01"] in lines
    assert lines[-1] == ["total", "4", "58"]


def test_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    found = report(capsys, "torchvision:resnet18", layer_decay=0.5)
    assert found["layer_0.decay"]["param_names"] == ["conv1.weight"]
    assert found["head.decay"]["parameters"] == 512 * 1000
    assert sum(group["tensors"] for group in found.values()) == 62
    downloads = report(capsys, "torchvision:fcn_resnet50")  # unless told not to
    assert set(downloads) == {"decay", "no_decay"}


def test_torchvision_that_computes_while_it_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert set(report(capsys, "torchvision:regnet_y_400mf")) == {"decay", "no_decay"}


def test_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])  # 7 B, never allocated
    config.save_pretrained(tmp_path)
    found = report(capsys, f"hf:{tmp_path}", layer_decay=0.9)
    assert sum(group["parameters"] for group in found.values()) == 6_738_415_616
    assert len({group["lr"] for group in found.values()}) == 34
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)  # no architecture
    assert "layer_2.decay" in report(capsys, f"hf:{tmp_path}", layer_decay=0.9)


def test_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    found = report(capsys, "timm:vit_tiny_patch16_224", layer_decay=0.5)
    assert "pos_embed" in found["layer_0.no_decay"]["param_names"]
    with pytest.raises(
        SystemExit, match=r"timm has no model 'vit_tiny_patch16_225'; near: .*vit_tiny"
    ):
        groups("timm:vit_tiny_patch16_225")


def test_a_missing_package_is_named(own_models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in {"timm": "timm:x", "torchvision": "torchvision:x",
                         "transformers": "hf:x"}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit, match=f"install it: pip install {name}"):
            groups(source)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match=r"pip install 'torsh-optim\[cli\]'"):
        groups(f"{own_models}:build")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("buidl", "own_models_of_test has no 'buidl'; it has .*build"),
        ("NUMBER", "NUMBER is a int, not a function"),
        ("other", "made a list, not a torch.nn.Module"),
        ("broken", r"test:broken failed with RuntimeError: no such weights \(.*_of_test\.py:\d+\)"),
        ("many_lines", r"test:many_lines failed with KeyError: .*first.*second.* \("),
        ("with_arguments", "with_arguments needs the arguments width, depth; give a function wit"),
    ],
)
def test_errors_of_own_modules(name: str, message: str, own_models: str) -> None:
    with pytest.raises(SystemExit, match=message) as end:
        groups(f"{own_models}:{name}")
    assert len(str(end.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("VALUE = 1 / 0", r"^bad_models_of_test failed with ZeroDivisionError: .*_of_test\.py:1\)"),
        ("def f(:", "^bad_models_of_test failed with SyntaxError"),
        (
            "import os\nos.no_such_thing",
            "^bad_models_of_test failed with AttributeError: .* 'no_such",
        ),
    ],
)
def test_a_module_that_cannot_be_imported(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_models_of_test.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as end:
        groups("bad_models_of_test:f")
    assert len(str(end.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("resnet18", {}, "model 'resnet18' is not understood; give package.module:function"),
        (":resnet18", {}, "is not understood"),
        ("no_such_module_here:f", {}, "no_such_module_here:f: No module named"),
        ("torchvision:resnet19", {}, "torchvision has no model 'resnet19'; near: .*resnet18"),
        ("torchvision:resnet18", {"layer_decay": 2.0}, "resnet18: layer_decay=2.0 must be in"),
    ],
)
def test_errors(model: str, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(SystemExit, match=message):
        groups(model, **options)


def test_hugging_face_errors(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match=f"hf:{tmp_path}: "):
        groups(f"hf:{tmp_path}")


def test_nothing_is_left_on_the_meta_device(own_models: str) -> None:
    groups(f"{own_models}:build", json=True)
    assert torch.zeros(1).device.type == "cpu"
