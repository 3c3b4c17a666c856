import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import torsh_nas as nas
from tests.nas.nets import CellNet, ChainNet

SCRIPT = Path(__file__).parent / "killed.py"


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(model: nn.Module, **options: object) -> nas.Search:
    sgd = torch.optim.SGD(nas.weights(model), 0.05, momentum=0.9)
    options.setdefault("strategy", nas.DARTS(lr=0.01))
    return nas.Search(model, loss=functional.cross_entropy, weight_optimizer=sgd, **options)  # type: ignore[arg-type]


def batches(count: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 1, 8, 8, generator=g), torch.randint(10, (4,), generator=g))
        for _ in range(count)
    ]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: a second thread is mostly waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_searches_digits_under_a_measured_budget() -> None:
    x, y = digits()
    model = CellNet(8, reduce="sum")
    table = nas.LatencyTable.build(model, x[:64], threads=1, calibration=4, min_time_s=0.02)
    costs = [sum(times) for times in zip(*table.costs.values(), strict=True)]
    assert costs[0] > costs[1]
    search = start(
        model, strategy=nas.DARTS(lr=0.01), budget=nas.Budget(latency_ms=60.0, source=table)
    )
    loaders = [
        DataLoader(TensorDataset(x[part], y[part]), 64, shuffle=True)
        for part in (slice(0, 600), slice(600, 1200))
    ]
    result = search.fit(*loaders, epochs=2)
    assert result.timing is not None
    assert result.timing.ms <= 60.0
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < losses[0]

    torch.manual_seed(1)
    plain = result.model(weights="reset")
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for _ in range(8):
        for images, labels in loaders[0]:
            sgd.zero_grad()
            functional.cross_entropy(plain(images), labels).backward()
            sgd.step()
    accuracy = (plain.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean().item()
    # Ten classes: chance is 0.10, with a standard deviation of 0.012 on 597 images.
    assert accuracy > 0.6


def test_step_and_fit_do_the_same() -> None:
    train, val = batches(3), batches(2, seed=1)
    results = []
    for use_fit in (False, True):
        torch.manual_seed(0)
        search = start(ChainNet())
        if use_fit:
            search.fit(train, val, epochs=1)
        else:
            search.model.train()
            for batch, other in zip(train, nas.cycle(val), strict=False):
                search.step(batch, other)
        results.append(tree_flatten([search.model.state_dict(), search.strategy.state_dict()])[0])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_log_holds_every_epoch(tmp_path: Path) -> None:
    search = start(ChainNet(), log_dir=tmp_path)
    result = search.fit(batches(2), batches(2, seed=1), epochs=3)
    header, *rows = lines(tmp_path / "log.jsonl")
    assert header["format"] == "torsh_nas.log"
    assert header["choices"] == {"block": ["conv3", "conv5", "skip"], "act": ["0", "1"]}
    assert rows == list(result.history)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert set(rows[0]) == {"epoch", "train_loss", "val_loss", "seconds", "probabilities", "best"}
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch_00002.json", "epoch_00002.pt", "epoch_00003.json", "epoch_00003.pt"]


@pytest.mark.slow
def test_kill_9_and_resume_repeats_the_run_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, seconds: float) -> int:
        command = [sys.executable, str(SCRIPT), str(tmp_path / folder)]
        command += [str(tmp_path / f"{folder}.pt"), str(seconds)]
        return subprocess.run(command, timeout=240, capture_output=True, check=False).returncode

    assert run("whole", 0) == 0
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    rows = lines(tmp_path / "whole" / "log.jsonl")[1:]
    length = sum(row["seconds"] for row in rows)
    # Killed at growing moments until it gets through: early kills leave no checkpoint at all.
    killed = 0
    for attempt in range(20):
        code = run("killed", length * (0.6 + attempt))
        if code == 0:
            break
        assert code == -9
        killed += 1
    assert killed >= 1
    actual = torch.load(tmp_path / "killed.pt", weights_only=True)
    flat = [tree_flatten(state) for state in (actual, expected)]
    assert flat[0][1] == flat[1][1]
    for a, b in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    log = lines(tmp_path / "killed" / "log.jsonl")[1:]
    assert [row["train_loss"] for row in log] == [row["train_loss"] for row in rows]


def test_resume_in_the_same_process(tmp_path: Path) -> None:
    loaders = batches(2), batches(2, seed=1)
    torch.manual_seed(0)
    whole = start(ChainNet(), log_dir=tmp_path / "whole").fit(*loaders, epochs=3)
    torch.manual_seed(0)
    start(ChainNet(), log_dir=tmp_path / "half").fit(*loaders, epochs=1)
    torch.manual_seed(99)
    rest = start(ChainNet()).fit(*loaders, epochs=3, resume=str(tmp_path / "half"))
    for row, other in zip(whole.history, rest.history, strict=True):
        assert row["probabilities"] == other["probabilities"]
        assert row["train_loss"] == other["train_loss"]


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    loaders = batches(2), batches(2, seed=1)
    start(ChainNet(), log_dir=tmp_path).fit(*loaders, epochs=2)
    last = tmp_path / "checkpoints" / "epoch_00002.pt"
    last.write_bytes(last.read_bytes()[:-1])
    search = start(ChainNet(), log_dir=tmp_path)
    with pytest.warns(UserWarning, match="epoch_00002 .* is damaged .* trying the one before"):
        result = search.fit(*loaders, epochs=1, resume="auto")
    assert len(result.history) == 1
    first = tmp_path / "checkpoints" / "epoch_00001.pt"
    first.unlink()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"),
    ):
        start(ChainNet(), log_dir=tmp_path).fit(*loaders, epochs=1, resume="auto")


def test_refuses_to_resume_what_is_not_there(tmp_path: Path) -> None:
    loaders = batches(1), batches(1, seed=1)
    with pytest.raises(ValueError, match="resume='auto' needs log_dir"):
        start(ChainNet()).fit(*loaders, epochs=1, resume="auto")
    with pytest.raises(ValueError, match="has no checkpoint; use 'auto'"):
        start(ChainNet()).fit(*loaders, epochs=1, resume=str(tmp_path))
    start(ChainNet(), log_dir=tmp_path).fit(*loaders, epochs=1)
    with pytest.raises(ValueError, match=r"checkpoint in .* belongs to space"):
        start(CellNet()).fit(*loaders, epochs=1, resume=str(tmp_path))


def test_loss_that_is_not_finite_stops_before_the_checkpoint(tmp_path: Path) -> None:
    search = start(ChainNet(), log_dir=tmp_path)
    bad = [(torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(RuntimeError, match="loss is nan in epoch 0: lower the learning rate"):
        search.fit(bad, batches(1), epochs=1)
    assert not (tmp_path / "checkpoints").exists()


def test_budget_is_measured_and_its_limit_moved() -> None:
    """Tables that promise too much or too little: the measurement decides."""

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(300):
                x = x @ torch.eye(64)
            return x

    model = nn.Sequential(nn.Linear(64, 64), nas.Choice({"slow": Slow(), "fast": nn.ReLU()}, "a"))
    x = torch.randn(64, 64)
    honest = nas.LatencyTable.build(model, x, threads=1, calibration=2, min_time_s=0.02)
    slow, fast = (honest.predict({"a": name}) for name in ("slow", "fast"))
    limit = (slow * fast) ** 0.5
    flattering = nas.LatencyTable(
        honest.space,
        {"a": (0.5 * limit, 0.1 * limit)},
        device_info=honest.device_info,
        input_specs=honest.input_specs,
    )
    for source in (honest, flattering):
        search = start(
            model, strategy=nas.DARTS(), budget=nas.Budget(latency_ms=limit, source=source)
        )
        with torch.no_grad():
            search.strategy._alphas["a"].copy_(torch.tensor([5.0, 0.0]))
        assert search.strategy.best()["a"] == "slow"
        assert search.best()["a"] == "fast"
    gloomy = nas.LatencyTable(
        honest.space,
        {"a": (60 * slow, 0.1 * limit)},
        device_info=honest.device_info,
        input_specs=honest.input_specs,
    )
    search = start(model, budget=nas.Budget(latency_ms=20 * slow, source=gloomy))
    with torch.no_grad():
        search.strategy._alphas["a"].copy_(torch.tensor([5.0, 0.0]))
    assert search.best()["a"] == "slow"
    with pytest.raises(nas.InfeasibleBudget, match="cannot be met") as caught:
        start(model, budget=nas.Budget(latency_ms=1e-6, source=flattering)).best()
    assert caught.value.minimum_ms > 1e-6
    given = nas.LatencyTable(honest.space, {"a": (1.0, 1.0)})
    with pytest.raises(ValueError, match="holds given numbers, not measurements"):
        start(model, budget=nas.Budget(latency_ms=5.0, source=given)).best()


def test_refuses_the_classic_mistakes() -> None:
    x, y = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match="the same tensors"):
        start(ChainNet()).step((x, y), (x, y))
    data = TensorDataset(x, y)
    loader = DataLoader(data, 4)
    for val in (loader, DataLoader(data, 2, shuffle=True)):
        with pytest.raises(ValueError, match="read the same data"):
            start(ChainNet()).fit(loader, val, epochs=1)
    # The split by sampler, as the original DARTS code does it, is fine.
    halves = [
        DataLoader(data, 4, sampler=SubsetRandomSampler(part)) for part in (range(4), range(4, 8))
    ]
    start(ChainNet()).fit(*halves, epochs=1)
    with pytest.raises(ValueError, match="train_loader is empty"):
        start(ChainNet()).fit([], [(x, y)], epochs=1)
    with pytest.raises(ValueError, match="the loader is empty"):
        start(ChainNet()).fit([(x, y)], [], epochs=1)


def test_refuses_a_wrong_weight_optimizer() -> None:
    model, other = ChainNet(), ChainNet()
    sgd = torch.optim.SGD(nas.weights(other), 0.1)
    with pytest.raises(ValueError, match=r"holds \d+ tensor\(s\) that are no parameters"):
        nas.Search(model, nas.DARTS(), functional.cross_entropy, sgd)
    alpha = torch.zeros(3, requires_grad=True)
    sgd = torch.optim.SGD([*nas.weights(model), alpha], 0.1)
    with pytest.raises(ValueError, match=r"holds 1 tensor\(s\) that are no parameters"):
        nas.Search(model, nas.DARTS(), functional.cross_entropy, sgd)
    sgd = torch.optim.SGD(model.stem.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"lacks \d+ parameter\(s\) of the model, first 'a.ops"):
        nas.Search(model, nas.DARTS(), functional.cross_entropy, sgd)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("stem"))
    nas.Search(model, nas.DARTS(), functional.cross_entropy, sgd)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        nas.weights(nn.ReLU())


def test_refuses_to_share_a_strategy_or_use_it_unbound() -> None:
    strategy = nas.DARTS()
    with pytest.raises(RuntimeError, match="DARTS has no model yet"):
        strategy.probabilities()
    start(ChainNet(), strategy=strategy)
    with pytest.raises(RuntimeError, match="bound to a model already"):
        start(ChainNet(), strategy=strategy)


def test_refuses_a_loss_per_example() -> None:
    sgd_model = ChainNet()
    sgd = torch.optim.SGD(nas.weights(sgd_model), 0.1)
    loss = nn.CrossEntropyLoss(reduction="none")
    search = nas.Search(sgd_model, nas.DARTS(), loss, sgd)
    with pytest.raises(ValueError, match=r"loss returned shape \(4,\)"):
        search.step(*batches(2))
