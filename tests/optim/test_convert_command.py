import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim.foreign_states import OPTIONS, STATES, as_apex, same, some_params, train
from torsh_optim import AdamW, Lookahead
from torsh_optim._convert_command import convert
from torsh_optim._state_file import read_checkpoint

pytest.importorskip("rich")


def torch_optimizer(steps: int = 3) -> torch.optim.Optimizer:
    params = some_params()
    opt = torch.optim.AdamW(params, **OPTIONS)
    train(params, opt, steps)
    return opt


def torch_state(steps: int = 3) -> dict[str, Any]:
    return torch_optimizer(steps).state_dict()


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def report(capsys: pytest.CaptureFixture[str], *paths: Path, **options: Any) -> dict[str, Any]:
    convert(*paths, json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --- what is converted ---


def test_a_run_goes_on_after_the_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch -> bitsandbytes -> torsh: ten steps in two halves are ten steps in one."""
    params, straight = some_params(), some_params()
    first = torch.optim.AdamW(params, **OPTIONS)
    train(params, first, 5)
    source = saved(tmp_path / "torch.pt", first.state_dict())
    done = report(capsys, source, tmp_path / "bnb.pt", from_="torch", to="bnb")
    assert [part["name"] for part in done["written"]] == ["step", "state1", "state2"]
    convert(tmp_path / "bnb.pt", tmp_path / "torsh.pt", from_="bnb", to="torsh")

    second = AdamW(params, lr=0.5)
    second.load_state_dict(torch.load(tmp_path / "torsh.pt", weights_only=True))
    train(params, second, 5, seed=1)
    whole = torch.optim.AdamW(straight, **OPTIONS)
    train(straight, whole, 5)
    train(straight, whole, 5, seed=1)
    for mine, theirs in zip(params, straight, strict=True):
        # another order of operations, and torch's default loop
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=2e-6, atol=1e-6)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "a.pt", torch_state())
    done = report(capsys, source, tmp_path / "b.pt", from_="torch", to="torsh")
    parts = {part.pop("name"): part for part in done.pop("read")}
    elements = 3 * 5 + 7 + 1
    moment = {"count": 3, "dtypes": ["float32"], "num_bytes": 4 * elements}
    assert parts == {
        "step": {"count": 3, "dtypes": ["float32"], "num_bytes": 12},
        "exp_avg": moment,
        "exp_avg_sq": moment,
    }
    assert done["parameters"] == 3
    assert done["key"] == ""
    assert set(done["options"]) >= {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"}
    assert set(done["dropped"]) == {"foreach", "fused", "capturable", "differentiable"}
    assert done["warnings"] == done["kept"] == done["left_out"] == []


def test_what_changes_the_result_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = some_params()
    opt = AdamW(params, **OPTIONS, max_grad_norm=1.0)
    train(params, opt, 1)
    source = saved(tmp_path / "a.pt", opt.state_dict())
    done = report(capsys, source, tmp_path / "b.pt", from_="torsh", to="torch")
    assert len(done["warnings"]) == 1
    assert "max_grad_norm=1.0" in done["warnings"][0]
    assert "max_grad_norm" in done["dropped"]
    convert(source, tmp_path / "c.pt", from_="torsh", to="torch")
    assert "max_grad_norm=1.0" in capsys.readouterr().out


def test_lightning_checkpoint_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.make = make

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.make(self.parameters(), lr=0.01, weight_decay=0.1)

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    rows = torch.utils.data.TensorDataset(torch.randn(8, 4))
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    first = trainer(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        torch.manual_seed(0)
        first.fit(Module(torch.optim.AdamW), loader)
        first.save_checkpoint(tmp_path / "a.ckpt")
        paths = (tmp_path / "a.ckpt", tmp_path / "b.ckpt")
        done = report(capsys, *paths, from_="torch", to="torsh")
        assert done["key"] == "optimizer_states.0"
        assert {"state_dict", "epoch", "global_step", "loops"} <= set(done["kept"])
        ends = []
        for make, path in ((torch.optim.AdamW, paths[0]), (AdamW, paths[1])):
            module = Module(make)
            trainer(3).fit(module, loader, ckpt_path=path)
            ends.append(module.layer.weight.detach())
    torch.testing.assert_close(*ends, rtol=2e-6, atol=1e-6)
    before, after = (torch.load(path, weights_only=True) for path in paths)
    for each in (before, after):
        each.pop("optimizer_states")
    assert same(before, after)


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda s: {"model": {"w": torch.ones(2)}, "optimizer": s}, "optimizer"),
        (lambda s: {"train": {"optims": (s, None)}, "epoch": 3}, "train.optims.0"),
    ],
)
def test_state_is_found_and_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrap: Any, where: str
) -> None:
    state = torch_state()
    source = saved(tmp_path / "a.pt", wrap(state))
    done = report(capsys, source, tmp_path / "b.pt", from_="torch", to="te")
    assert done["key"] == where
    after = torch.load(tmp_path / "b.pt", weights_only=True)
    inner = after["optimizer"] if where == "optimizer" else after["train"]["optims"][0]
    assert inner["param_groups"][0]["step"] == 3
    assert same(inner["state"][1]["exp_avg"], state["state"][1]["exp_avg"])
    if where == "optimizer":
        assert done["kept"] == ["model"]
        assert torch.equal(after["model"]["w"], torch.ones(2))
    else:
        assert done["kept"] == ["epoch"]
        assert after["epoch"] == 3
        assert after["train"]["optims"][1] is None


def test_key_picks_one_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"optimizer_states": [torch_state(2), torch_state(5)]}
    source, target = saved(tmp_path / "a.ckpt", content), tmp_path / "b.ckpt"
    with pytest.raises(SystemExit, match=r"give --key, one of optimizer_states\.0, optimizer_"):
        convert(source, target, from_="torch", to="apex")
    with pytest.raises(SystemExit, match=r"no optimizer state at 'optim'; there is one at 'optim"):
        convert(source, target, from_="torch", to="apex", key="optim")
    assert not target.exists()
    report(capsys, source, target, from_="torch", to="apex", key="optimizer_states.1")
    after = torch.load(target, weights_only=True)["optimizer_states"]
    assert after[1]["param_groups"][0]["step"] == 5
    assert same(after[0], content["optimizer_states"][0])


def test_file_of_bitsandbytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with several states, which bitsandbytes itself wrote and decoded."""
    source = STATES / "bitsandbytes_0.50.2.pt"
    key = "adamw8bit.state_dict"
    done = report(capsys, source, tmp_path / "b.pt", from_="bnb", to="torsh", key=key)
    assert {"gradients", "adam", "lion8bit"} <= set(done["kept"])
    read = {part["name"]: part["dtypes"] for part in done["read"]}
    assert "uint8" in read["state1"]
    after = torch.load(tmp_path / "b.pt", weights_only=True)["adamw8bit"]
    expected = torch.load(source, weights_only=True)["adamw8bit"]["decoded"]
    assert len(expected) > 1
    for number, values in expected.items():
        found = after["state_dict"]["state"][number]
        for name, value in zip(("exp_avg", "exp_avg_sq"), values, strict=True):
            assert torch.equal(found[name], value)


def test_algorithm_says_what_a_state_of_bitsandbytes_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0, "params": [0]}
    state = {"state": {0: {"step": 2, "state1": torch.ones(3)}}, "param_groups": [group]}
    source, target = saved(tmp_path / "a.pt", state), tmp_path / "b.pt"
    with pytest.raises(SystemExit, match=r"a\.pt: the state does not say .* --algorithm lion or"):
        convert(source, target, from_="bnb", to="torsh")
    report(capsys, source, target, from_="bnb", to="torsh", algorithm="lion")
    assert "exp_avg" in torch.load(target, weights_only=True)["state"][0]
    report(capsys, source, target, from_="bnb", to="torsh", algorithm="sgd", force=True)
    assert "momentum_buffer" in torch.load(target, weights_only=True)["state"][0]
    with pytest.raises(SystemExit, match="--algorithm is for --from bnb"):
        convert(source, tmp_path / "c.pt", from_="torch", to="torsh", algorithm="sgd")


def test_eight_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    opt = AdamW([weight])
    train([weight], opt, 2)
    source = saved(tmp_path / "a.pt", opt.state_dict())
    done = report(capsys, source, tmp_path / "b.pt", from_="torsh", to="bnb", bits=8)
    dtypes = {part["name"]: part["dtypes"] for part in done["written"]}
    assert dtypes["state1"] == ["uint8"]
    with pytest.raises(SystemExit, match="--bits 8 is for --to bnb"):
        convert(source, tmp_path / "c.pt", from_="torsh", to="te", bits=8)


# --- safetensors ---


def test_safetensors_and_back_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    params = some_params()
    named = [(f"layer.{i}", param) for i, param in enumerate(params)]
    opt = Lookahead(AdamW(named, **OPTIONS, max_grad_norm=math.inf), k=2)
    train(params, opt, 3)
    state = opt.state_dict()
    source = saved(tmp_path / "a.pt", {"epoch": 1, "optimizer": state})
    middle, back = tmp_path / "b.safetensors", tmp_path / "c.pt"
    done = report(capsys, source, middle, from_="torsh", to="torsh")
    assert done["left_out"] == ["epoch"]
    assert done["kept"] == []
    from safetensors import safe_open

    with safe_open(middle, framework="pt") as file:
        assert torch.equal(file.get_tensor("state.1.exp_avg"), state["state"][1]["exp_avg"])
    report(capsys, middle, back, from_="torsh", to="torsh")
    assert same(torch.load(back, weights_only=True), state)
    opt.load_state_dict(torch.load(back, weights_only=True))


# --- what is refused ---


@pytest.mark.parametrize("old_format", [False, True])
def test_objects_are_not_unpickled(tmp_path: Path, old_format: bool) -> None:
    content = {"optimizer": torch_state(), "args": argparse.Namespace(lr=1.0)}
    source = tmp_path / "a.pt"
    torch.save(content, source, _use_new_zipfile_serialization=not old_format)
    message = r"a\.pt holds objects of argparse\.Namespace, .* save the optimizer's state alone"
    with pytest.raises(SystemExit, match=message):
        convert(source, tmp_path / "b.pt", from_="torch", to="torsh")


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    for new in (True, False):
        torch.save(Attack(), tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(SystemExit, match=r"holds objects of posix\.mkdir"):
            convert(tmp_path / "a.pt", tmp_path / "b.pt", from_="torch", to="torsh")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 1, "epoch": 2}, r"no optimizer state, .* the file has model, epoch"),
        ([1, 2], "no optimizer state, .* the file is a list"),
        (torch.ones(2), "no optimizer state, .* the file is a Tensor"),
        ({"optimizer_state_dict": {"base_optimizer_state": []}}, "in Python, state_from"),
    ],
)
def test_files_without_a_state(tmp_path: Path, content: Any, message: str) -> None:
    source = saved(tmp_path / "a.pt", content)
    with pytest.raises(SystemExit, match=message):
        convert(source, tmp_path / "b.pt", from_="deepspeed", to="torsh")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 no archive"])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"a\.pt is (empty|damaged, or is no file of torch\.save)"):
        convert(tmp_path / "a.pt", tmp_path / "b.pt", from_="torch", to="torsh")


def test_places(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", torch_state())
    with pytest.raises(SystemExit, match=r"a\.pt exists; --force replaces it"):
        convert(source, source, from_="torch", to="torsh")
    with pytest.raises(SystemExit, match=r"there is no folder .*missing"):
        convert(source, tmp_path / "missing" / "b.pt", from_="torch", to="torsh")
    with pytest.raises(SystemExit, match=r"none\.pt"):
        convert(tmp_path / "none.pt", tmp_path / "b.pt", from_="torch", to="torsh")
    with pytest.raises(SystemExit, match="--from torch --to torch has nothing to convert"):
        convert(source, tmp_path / "b.pt", from_="torch", to="torch")
    params = some_params()
    rmsprop = saved(tmp_path / "c.pt", torch.optim.RMSprop(params, lr=0.1).state_dict())
    with pytest.raises(SystemExit, match=r"c\.pt: no optimizer here continues one of torch"):
        convert(rmsprop, tmp_path / "b.pt", from_="torch", to="torsh")


def foreign_files(tmp_path: Path) -> dict[str, Path]:
    """A file of each kind that can be told, and one of what apex and its kin have in common."""
    weight = torch.nn.Parameter(torch.ones(4))
    ours = AdamW([weight])
    train([weight], ours, 1)
    group = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "params": [0]}
    lion = {"state": {0: {"step": 2, "state1": torch.ones(3)}}, "param_groups": [group]}
    return {
        "torch": saved(tmp_path / "torch.pt", torch_state()),
        "torsh": saved(tmp_path / "torsh.pt", ours.state_dict()),
        "bnb": saved(tmp_path / "bnb.pt", lion),
        "apex": saved(tmp_path / "apex.pt", as_apex(torch_optimizer(), 3)),
    }


@pytest.mark.parametrize(
    ("file", "wrong", "message"),
    [
        *(
            ("torch", kind, f"looks like a state of torch.optim, not of {kind}: --from torch$")
            for kind in ("apex", "te", "deepspeed", "bnb", "torsh")
        ),
        ("torsh", "torch", "looks like a state of torsh_optim, not of torch: --from torsh$"),
        ("torsh", "apex", "--from torsh$"),
        ("bnb", "torch", "looks like a state of bitsandbytes, not of torch: --from bnb$"),
        ("bnb", "te", "--from bnb$"),
        ("apex", "torch", "--from apex or --from te or --from deepspeed$"),
        ("apex", "bnb", "--from apex or --from te or --from deepspeed$"),
        ("apex", "torsh", "--from apex or --from te or --from deepspeed$"),
    ],
)
def test_a_wrong_kind_is_named(tmp_path: Path, file: str, wrong: Any, message: str) -> None:
    source = foreign_files(tmp_path)[file]
    to = "apex" if wrong == "torsh" else "torsh"
    with pytest.raises(SystemExit, match=message):
        convert(source, tmp_path / "new.pt", from_=wrong, to=to)  # type: ignore[arg-type]
    assert not (tmp_path / "new.pt").exists()


@pytest.mark.parametrize("kind", ["apex", "te", "deepspeed"])
def test_what_looks_alike_is_taken(tmp_path: Path, kind: Any) -> None:
    convert(foreign_files(tmp_path)["apex"], tmp_path / "new.pt", from_=kind, to="torsh")
    assert torch.load(tmp_path / "new.pt", weights_only=True)["state"][0]["step"] == 3


def test_a_wrapped_torch_optimizer_may_go_to_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    state = Lookahead(torch_optimizer()).state_dict()
    source = saved(tmp_path / "a.pt", state)
    convert(source, tmp_path / "b.safetensors", from_="torsh", to="torsh")
    assert same(read_checkpoint(tmp_path / "b.safetensors"), state)


def test_messages_are_in_the_words_of_the_command(tmp_path: Path) -> None:
    files = foreign_files(tmp_path)
    convert(files["bnb"], tmp_path / "lion.pt", from_="bnb", to="torsh", algorithm="lion")
    with pytest.raises(SystemExit, match=r"continues lion exactly; --to torch takes adam and sgd$"):
        convert(tmp_path / "lion.pt", tmp_path / "new.pt", from_="torsh", to="torch")
    message = "a state of lion or sgd, which --algorithm adam contradicts$"
    with pytest.raises(SystemExit, match=message):
        convert(files["bnb"], tmp_path / "new.pt", from_="bnb", to="torsh", algorithm="adam")


def test_force_replaces_the_source_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch_state()
    source = saved(tmp_path / "a.pt", state)
    report(capsys, source, source, from_="torch", to="apex", force=True)
    after = torch.load(source, weights_only=True)
    assert same(after["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    source = saved(tmp_path / "a.pt", {"epoch": 4, "optimizer": torch_state()})
    command = [sys.executable, "-W", "error", "-m", "torsh_optim", "convert"]
    run = subprocess.run(
        [*command, source, tmp_path / "b.pt", "--from", "torch", "--to", "torsh"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "torsh_optim/src", "COLUMNS": "200"},
    )
    assert run.returncode == 0, run.stderr
    assert "at optimizer (torch)" in run.stdout
    assert "kept in the file: epoch" in run.stdout
    assert run.stderr == ""  # no bar where there is no terminal
    after = read_checkpoint(tmp_path / "b.pt")
    assert after["epoch"] == 4
    AdamW(some_params()).load_state_dict(after["optimizer"])


_SLOW = """
import sys, time
from torsh_optim._convert_command import _Progress

with _Progress() as progress:
    progress.show("writing it", total=100)
    progress.advance(50)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize(("seconds", "shown"), [("0", False), ("2.6", True)])
def test_a_bar_is_shown_on_a_terminal_after_two_seconds(seconds: str, shown: bool) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    run = subprocess.run(
        [sys.executable, "-c", _SLOW, seconds],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": "torsh_optim/src", "TERM": "xterm"},
    )
    os.write(theirs, b"end")  # so that there is something to read
    text = os.read(ours, 2**16).decode()
    for end in (ours, theirs):
        os.close(end)
    assert run.returncode == 0, text
    assert ("writing it" in text) == shown
    assert run.stdout == b""
