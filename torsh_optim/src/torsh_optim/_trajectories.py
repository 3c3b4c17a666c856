"""Paths of optimizers over a surface, and their picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Surface = Callable[[Tensor, Tensor], Tensor]

# Colours that people with any kind of colour vision can tell apart (Okabe, Ito)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_GRID = 201  # points along each axis of the contours
_LEVELS = 24
_MARGIN = 0.15  # of what the paths span, on each side
_HIGHEST = 10.0  # what is shown, as a multiple of how high the start is above the lowest point


def _rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x).square() + 100 * (y - x.square()).square()


def _beale(x: Tensor, y: Tensor) -> Tensor:
    a, b, c = 1.5 - x + x * y, 2.25 - x + x * y.square(), 2.625 - x + x * y.pow(3)
    return a.square() + b.square() + c.square()


def _rastrigin(x: Tensor, y: Tensor) -> Tensor:
    waves = torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)
    return 20 + x.square() + y.square() - 10 * waves


@dataclass(frozen=True)
class _Known:
    function: Surface
    start: tuple[float, float]
    minimum: tuple[float, float]


_SURFACES = {
    "rosenbrock": _Known(_rosenbrock, (-1.5, 2.0), (1.0, 1.0)),
    "beale": _Known(_beale, (1.0, 1.5), (3.0, 0.5)),
    "rastrigin": _Known(_rastrigin, (-2.0, 3.0), (0.0, 0.0)),
}


@dataclass(frozen=True)
class Trajectories:
    """Where optimizers went on a surface.

    Attributes:
        surface: The function of two coordinates.
        title: Name of the surface.
        minimum: Where the surface is lowest; None if that is not known.
        paths: For each optimizer its points, ``(steps + 1, 2)`` float64, the start first.
        losses: For each optimizer the value at each point, ``(steps + 1,)`` float64.
    """

    surface: Surface
    title: str
    minimum: tuple[float, float] | None
    paths: Mapping[str, Tensor]
    losses: Mapping[str, Tensor]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the contours of the surface and the path of each optimizer.

        The picture shows the paths, the minimum if it is known, and a margin; points more than ten
        times as high above the lowest point as the start may lie outside, as those of a path that
        diverges. The start is a circle, the end of each path a cross, the minimum a star. The
        contours follow the logarithm of the height, so that valleys are seen.

        Args:
            ax: Axes to draw on; a new figure by default.

        Returns:
            The axes; ``ax.figure.savefig("paths.svg")`` writes the picture.

        Raises:
            ImportError: matplotlib is missing.
        """
        axes = _new_axes() if ax is None else ax
        (left, right), (bottom, top) = self._limits()
        x = torch.linspace(left, right, _GRID, dtype=torch.float64)
        y = torch.linspace(bottom, top, _GRID, dtype=torch.float64)
        with torch.no_grad():
            xx, yy = torch.meshgrid(x, y, indexing="xy")
            z = self.surface(xx, yy)
        heights = (z - z[z.isfinite()].min()).log1p()
        axes.contour(
            x.tolist(), y.tolist(), heights.tolist(), levels=_LEVELS, colors="#bbbbbb",
            linewidths=0.6, zorder=0,
        )  # fmt: skip
        for i, (name, path) in enumerate(self.paths.items()):
            points = path[path.isfinite().all(1)].tolist()
            colour = _COLOURS[i % len(_COLOURS)]
            label = f"{_literal(name)}: {float(self.losses[name][-1]):.2g}"
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label)
            axes.plot(*points[-1], marker="x", color=colour, linestyle="none")
        start = next(iter(self.paths.values()))[0].tolist()
        axes.plot(*start, marker="o", color="#333333", linestyle="none")
        if self.minimum is not None:
            axes.plot(*self.minimum, marker="*", markersize=12, color="#333333", linestyle="none")
        axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y", title=self.title)
        axes.legend(title="value at the end", fontsize=8, title_fontsize=8, framealpha=0.9)
        return axes

    def _limits(self) -> list[tuple[float, float]]:
        points = torch.cat(list(self.paths.values()))
        heights = torch.cat(list(self.losses.values()))
        heights = heights - heights[heights.isfinite()].min()
        points = points[heights <= _HIGHEST * heights[0]]
        if self.minimum is not None:
            points = torch.cat([points, torch.tensor([self.minimum], dtype=points.dtype)])
        limits = []
        for low, high in zip(points.amin(0).tolist(), points.amax(0).tolist(), strict=True):
            margin = _MARGIN * (high - low) or 1.0
            limits.append((low - margin, high + margin))
        return limits


def trajectories(
    optimizers: Mapping[str, Callable[[list[Tensor]], Optimizer]],
    surface: Literal["rosenbrock", "beale", "rastrigin"] | Surface = "rosenbrock",
    *,
    start: Sequence[float] | None = None,
    steps: int = 200,
) -> Trajectories:
    """Let optimizers go down a surface of two coordinates, to see how they move.

    Each begins at the same point and takes as many steps on the exact gradient, in float64. The
    two coordinates are one parameter of two elements. This shows what momentum, the sign of an
    update or a slow weight do to a path; it says little about which optimizer trains a network
    best.

    Args:
        optimizers: For each name a function that makes the optimizer of a list of parameters, such
            as ``lambda params: AdamW(params, lr=0.1)``.
        surface: ``rosenbrock`` (a curved valley, lowest at (1, 1)), ``beale`` (a plain with steep
            edges, lowest at (3, 0.5)), ``rastrigin`` (a bowl of many pits, lowest at (0, 0)), or a
            function of two tensors, the coordinates, which works element by element.
        start: The two coordinates to begin at; needed with a function.
        steps: Steps to take, at least 1.

    Returns:
        The paths; :meth:`Trajectories.plot` draws them.

    Raises:
        ValueError: There is no optimizer, the surface is unknown, or ``start`` or ``steps`` is not
            as above.
        TypeError: The surface does not give a real number at each point, or a function gives no
            optimizer.

    Example:
        On x² + y² a step of SGD with rate 0.25 halves both coordinates.

        >>> found = trajectories(
        ...     {"SGD": lambda params: torch.optim.SGD(params, lr=0.25)},
        ...     lambda x, y: x**2 + y**2,
        ...     start=(4.0, -2.0),
        ...     steps=2,
        ... )
        >>> found.paths["SGD"].tolist(), found.losses["SGD"].tolist()
        ([[4.0, -2.0], [2.0, -1.0], [1.0, -0.5]], [20.0, 5.0, 1.25])
    """
    if not optimizers:
        raise ValueError("optimizers is empty; give at least one, by name")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer of at least 1")
    title, minimum = "", None
    if isinstance(surface, str):
        if surface not in _SURFACES:
            raise ValueError(
                f"surface={surface!r} is unknown; it is one of {', '.join(_SURFACES)}, or a "
                "function of two tensors"
            )
        known = _SURFACES[surface]
        function, title, minimum = known.function, surface.title(), known.minimum
        start = known.start if start is None else start
    else:
        function = surface
    if start is None:
        raise ValueError("a surface of your own needs start=(x, y)")
    begin = torch.tensor(list(start), dtype=torch.float64, device="cpu")
    if begin.shape != (2,) or not begin.isfinite().all():
        raise ValueError(f"start={start!r} must be two finite numbers")
    walks = {name: _walk(make, function, begin, steps) for name, make in optimizers.items()}
    return Trajectories(
        function,
        title,
        minimum,
        {name: path for name, (path, _) in walks.items()},
        {name: losses for name, (_, losses) in walks.items()},
    )


def _walk(
    make: Callable[[list[Tensor]], Optimizer], surface: Surface, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    point = torch.nn.Parameter(start.clone())
    optimizer = make([point])
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizers must make optimizers, got {type(optimizer).__name__}")

    def closure() -> float:
        optimizer.zero_grad()
        value = _value(surface, point)
        value.backward()
        return value.item()

    points, losses = [start.clone()], [closure()]
    for _ in range(steps):
        optimizer.step(closure)
        points.append(point.detach().clone())
        with torch.no_grad():
            losses.append(_value(surface, point).item())
    return torch.stack(points), torch.tensor(losses, dtype=torch.float64)


def _value(surface: Surface, point: Tensor) -> Tensor:
    value = surface(point[0], point[1])
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"surface gave {found} at a point; it takes two tensors and gives one of their shape"
        )
    return value


def _new_axes() -> "Axes":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install 'torsh-optim[plot]'") from None
    # A figure without pyplot: nothing global is opened that somebody would have to close.
    return Figure(figsize=(6.0, 4.5), layout="constrained").add_subplot()


def _literal(text: str) -> str:
    """Keep a name from being read as a formula or, with a leading underscore, left out."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
