import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torsh_optim import LAMB, SGD, AdamW, Lion, Lookahead
from torsh_optim._trajectories import _SURFACES, trajectories


def quadratic(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + 3 * y.square()


def test_sgd_on_a_quadratic() -> None:
    """x shrinks by 1 - 2 lr in each step, y by 1 - 6 lr; with momentum as torch's SGD does."""
    found = trajectories(
        {
            "plain": lambda params: torch.optim.SGD(params, lr=0.1),
            "ours": lambda params: SGD(params, lr=0.1),
            "momentum": lambda params: SGD(params, lr=0.1, momentum=0.5),
        },
        quadratic,
        start=(2.0, 1.0),
        steps=7,
    )
    k = torch.arange(8, dtype=torch.float64)
    expected = torch.stack([2.0 * 0.8**k, 0.4**k], dim=1)
    for name in ("plain", "ours"):
        torch.testing.assert_close(found.paths[name], expected, rtol=1e-14, atol=0)
        values = expected[:, 0] ** 2 + 3 * expected[:, 1] ** 2
        torch.testing.assert_close(found.losses[name], values, rtol=1e-14, atol=0)
    x, y, vx, vy = 2.0, 1.0, 0.0, 0.0
    for point in found.paths["momentum"].tolist():
        assert point == pytest.approx([x, y], rel=1e-13)
        vx, vy = 0.5 * vx + 2 * x, 0.5 * vy + 6 * y
        x, y = x - 0.1 * vx, y - 0.1 * vy
    assert list(found.paths) == ["plain", "ours", "momentum"]


@pytest.mark.parametrize("name", sorted(_SURFACES))
def test_known_surfaces_are_zero_and_lowest_at_their_minimum(name: Any) -> None:
    known = _SURFACES[name]
    at = torch.tensor(known.minimum, dtype=torch.float64)
    assert known.function(*at).abs() < 1e-14
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    xx, yy = torch.meshgrid(x, x, indexing="xy")
    assert known.function(xx, yy).min() >= 0
    around = torch.autograd.functional.hessian(lambda p: known.function(p[0], p[1]), at)
    assert (torch.linalg.eigvalsh(around) > 0).all()


@pytest.mark.parametrize(
    ("name", "point", "value"),
    # by hand: 4 + 100 (2 - 1)²; 1.5² + 2.25² + 2.625²; 20 + 1 + 1 - 10 - 10
    [("rosenbrock", (-1, 2), 104.0), ("beale", (0, 1), 14.203125), ("rastrigin", (1, 1), 2.0)],
)
def test_known_surfaces_at_a_point(name: Any, point: tuple[int, int], value: float) -> None:
    x, y = torch.tensor(point, dtype=torch.float64)
    assert float(_SURFACES[name].function(x, y)) == pytest.approx(value)


def test_every_optimizer_comes_down() -> None:
    found = trajectories(
        {
            "AdamW": lambda params: AdamW(params, lr=0.1, weight_decay=0.0),
            "Lion": lambda params: Lion(params, lr=0.05),
            "LAMB": lambda params: LAMB(params, lr=0.02, max_grad_norm=None),
            "Lookahead": lambda params: Lookahead(SGD(params, lr=1e-3, momentum=0.8)),
            "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1),
        },
        "beale",
        steps=60,
    )
    for name, losses in found.losses.items():
        assert losses[-1] < losses[0] / 5, name
        assert losses.shape == (61,)


def test_picture() -> None:
    pytest.importorskip("matplotlib")
    found = trajectories(
        {"a $1$": lambda params: SGD(params, lr=0.1), "_b": lambda params: Lion(params, lr=0.1)},
        quadratic,
        start=(2.0, 1.0),
        steps=5,
    )
    ax = found.plot()
    points = torch.cat(list(found.paths.values()))
    low, high = points.amin(0).tolist(), points.amax(0).tolist()
    for (left, right), a, b in zip((ax.get_xlim(), ax.get_ylim()), low, high, strict=True):
        assert left == pytest.approx(a - 0.15 * (b - a))
        assert right == pytest.approx(b + 0.15 * (b - a))
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("x", "y", "")
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    ends = [float(losses[-1]) for losses in found.losses.values()]
    assert texts == [f"a \\$1\\$: {ends[0]:.2g}", f"\u200b_b: {ends[1]:.2g}"]
    drawn = [line.get_xydata().tolist() for line in ax.lines]
    assert drawn[0] == found.paths["a $1$"].tolist()
    assert drawn[2] == found.paths["_b"].tolist()
    assert drawn[-1] == [[2.0, 1.0]]
    assert found.plot(ax) is ax


def test_picture_of_a_known_surface_shows_the_minimum_and_leaves_out_what_is_not_finite() -> None:
    pytest.importorskip("matplotlib")
    found = trajectories(
        {
            "far": lambda params: SGD(params, lr=10.0),
            "near": lambda params: AdamW(params, lr=0.1),
        },
        steps=40,
    )
    assert not found.paths["far"].isfinite().all()
    near = trajectories({"near": lambda params: AdamW(params, lr=0.1)}, steps=40)
    ax = near.plot()
    assert ax.get_title() == "Rosenbrock"
    left, right = ax.get_xlim()
    assert left < -1.5 < 1.0 < right  # start and minimum
    assert ax.lines[-1].get_xydata().tolist() == [[1.0, 1.0]]
    far = found.plot()  # the one that diverges does not hide the other
    assert (far.get_xlim(), far.get_ylim()) == (ax.get_xlim(), ax.get_ylim())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizers": {}}, ValueError, "optimizers is empty; give at least one"),
        ({"steps": 0}, ValueError, "steps=0 must be an integer of at least 1"),
        (
            {"surface": "rosen"},
            ValueError,
            "surface='rosen' is unknown; it is one of rosenbrock, b",
        ),
        ({"surface": quadratic}, ValueError, r"a surface of your own needs start=\(x, y\)"),
        ({"start": (1.0, 2.0, 3.0)}, ValueError, r"start=\(1\.0, 2\.0, 3\.0\) must be two finite"),
        ({"start": (1.0, math.nan)}, ValueError, r"start=\(1\.0, nan\) must be two finite"),
        ({"optimizers": {"a": len}}, TypeError, "optimizers must make optimizers, got int"),
        (
            {"surface": lambda x, y: 1.0, "start": (0, 0)},
            TypeError,
            "surface gave float at a point; it takes two tensors",
        ),
        (
            {"surface": lambda x, y: torch.stack([x, y]), "start": (0, 0)},
            TypeError,
            r"surface gave shape \(2,\) at a point",
        ),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trajectories(**{"optimizers": {"a": lambda p: SGD(p, lr=0.1)}, **options})


def test_without_matplotlib_the_error_names_the_extra() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from torsh_optim import SGD; from torsh_optim._trajectories import trajectories\n"
        "found = trajectories({'a': lambda p: SGD(p, lr=1e-3)}, steps=1)\n"
        "try: found.plot()\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "torsh_optim/src"},
    )
    assert run.stdout.strip() == "plotting needs matplotlib: pip install 'torsh-optim[plot]'"


def test_picture_of_the_tutorial(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = "docs/examples/draw_trajectories.py"
    env = {"PYTHONPATH": "torsh_optim/src"}
    subprocess.run([sys.executable, script, tmp_path / "a.svg"], check=True, env=env)
    new = (tmp_path / "a.svg").read_text()
    committed = Path("docs/tutorials/optimizer-trajectories.svg").read_text()
    for text in ("Beale", "SGD: ", "AdamW: ", "Lion: ", "Lookahead(SGD): "):
        assert text in new
        assert text in committed
