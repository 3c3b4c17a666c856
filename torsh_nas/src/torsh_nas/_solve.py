"""The best architecture under a budget, exactly."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from torsh_nas._architecture import Architecture
from torsh_nas._budget import Budget, InfeasibleBudget
from torsh_nas._cell import NONE
from torsh_nas._space import CellGraph, Space

Scores = Mapping[str, Tensor | Sequence[float] | np.ndarray]
"""One number per option, by label."""


def solve(scores: Scores, budget: Budget) -> Architecture:
    """Return the architecture with the largest sum of scores within the predicted latency.

    Exact: a mixed-integer program over one 0/1 variable per option, with the latency as a linear
    constraint, solved to optimality by HiGHS. Cells with ``keep`` keep exactly that many edges,
    and no cell is cut off by ``"none"``.

    Args:
        scores: One number per option, ``(options,)`` by label; larger is better. Only
            differences above about 1e-6 count.
        budget: The limit, with a latency table as its source.

    Raises:
        InfeasibleBudget: No architecture is predicted to be that fast; carries the least
            prediction as ``minimum_ms``.
        ValueError: Scores do not match the space, or are not finite.

    Example:
        >>> from torsh_nas import Budget, InfeasibleBudget, LatencyTable, Space, solve
        >>> import torch
        >>> space = Space({"a": ("slow", "fast"), "b": ("slow", "fast")})
        >>> table = LatencyTable(space, {"a": (3.0, 1.0), "b": (4.0, 1.0)})
        >>> scores = {"a": [1.0, 0.0], "b": [1.5, 0.0]}
        >>> dict(solve(scores, Budget(latency_ms=5.0, source=table)))  # both slow: 7 ms
        {'a': 'fast', 'b': 'slow'}
    """
    table = budget.source
    costs = {label: table.scale * np.asarray(c) for label, c in table.costs.items()}
    limit = budget.latency_ms - table.intercept_ms
    try:
        return maximise(table.space, scores, costs, limit)
    except _InfeasibleError:
        fastest = minimise(table.space, costs)
        minimum = table.predict(fastest)
        raise InfeasibleBudget(
            f"latency_ms={budget.latency_ms:.4g} cannot be met: the fastest architecture of this "
            f"space is predicted to take {minimum:.4g} ms; raise the budget or add faster options",
            minimum_ms=minimum,
        ) from None


def minimise(space: Space, costs: Scores) -> Architecture:
    """Return the architecture with the smallest sum of costs."""
    return maximise(space, {label: -np.asarray(c, dtype=float) for label, c in costs.items()})


def maximise(
    space: Space,
    scores: Scores,
    costs: Mapping[str, np.ndarray] | None = None,
    limit: float = np.inf,
) -> Architecture:
    """Return the architecture with the largest sum of scores and a sum of costs up to ``limit``."""
    from scipy.optimize import LinearConstraint, milp

    offsets = _offsets(space)
    count = sum(len(options) for options in space.choices.values())
    objective = _flatten(space, scores, "scores")
    rows: list[np.ndarray] = []
    lower: list[float] = []
    upper: list[float] = []

    def add(row: np.ndarray, low: float, high: float) -> None:
        rows.append(row)
        lower.append(low)
        upper.append(high)

    for label, options in space.choices.items():
        row = np.zeros(count)
        row[offsets[label] : offsets[label] + len(options)] = 1
        add(row, 1, 1)
    for group in space.groups:
        row = np.zeros(count)
        for label in group.labels:
            row[offsets[label] + space.choices[label].index(NONE)] = 1
        dropped = len(group.labels) - group.keep
        add(row, dropped, dropped)
    if costs is not None and np.isfinite(limit):
        add(_flatten(space, costs, "costs"), -np.inf, limit)
    while True:
        result = milp(
            -objective,
            integrality=np.ones(count),
            bounds=(0, 1),
            constraints=LinearConstraint(np.stack(rows), lower, upper),
            options={"mip_rel_gap": 0.0},
        )
        if result.status == 2:
            raise _InfeasibleError
        if result.x is None:
            raise RuntimeError(f"the solver stopped without an answer: {result.message}")
        chosen = {
            label: options[int(np.argmax(result.x[offsets[label] : offsets[label] + len(options)]))]
            for label, options in space.choices.items()
        }
        cut = next((cell for cell in space.cells if not cell.connected(chosen)), None)
        if cut is None:
            return space.architecture(chosen)
        # Some edge must leave the part that the inputs reach now: excludes this and every
        # other choice that is cut off at the same place.
        row = np.zeros(count)
        edges = _leaving(cut, chosen)
        for label in edges:
            row[offsets[label] + space.choices[label].index(NONE)] = 1
        add(row, -np.inf, len(edges) - 1)


class _InfeasibleError(Exception):
    pass


def _leaving(cell: CellGraph, chosen: Mapping[str, str]) -> list[str]:
    reached = cell.reachable(chosen)
    return [
        cell.edge(source, target)
        for target in cell.targets
        if target not in reached
        for source in range(target)
        if source in reached
    ]


def _offsets(space: Space) -> dict[str, int]:
    offsets: dict[str, int] = {}
    position = 0
    for label, options in space.choices.items():
        offsets[label] = position
        position += len(options)
    return offsets


def _flatten(space: Space, values: Scores, what: str) -> np.ndarray:
    parts: list[np.ndarray] = []
    for label, options in space.choices.items():
        if label not in values:
            raise ValueError(f"{what} lacks {label!r}")
        value = values[label]
        numbers = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
        part = np.asarray(numbers, dtype=np.float64)
        if part.shape != (len(options),):
            raise ValueError(
                f"{what}[{label!r}] has shape {part.shape}, but {label!r} has options {options}"
            )
        parts.append(part)
    flat = np.concatenate(parts)
    if not np.isfinite(flat).all():
        raise ValueError(f"{what} must be finite, got {flat[~np.isfinite(flat)][0]}")
    return flat
