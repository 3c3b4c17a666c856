"""Which scheme each layer gets, so that the model loses least and still fits a budget."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torsh_quant._layers import matches
from torsh_quant._scores import Sensitivity
from torsh_quant._spec import Scheme


@dataclass(frozen=True)
class _Option:
    """One scheme of a group of layers.

    Args:
        cost: Whole units of the budget.
        loss: Sum of the layers' scores.
        scheme: Short name, or ``"float"``.
    """

    cost: int
    loss: float
    scheme: str


def allocate(
    sensitivity: Sensitivity,
    *,
    bits: float | None = None,
    mbytes: float | None = None,
    latency: float | None = None,
    seconds: Mapping[tuple[str, str], float] | None = None,
    tied: Sequence[Sequence[str]] = (),
    allow_float: bool = False,
) -> dict[str, Scheme | None]:
    """Choose a scheme for each layer: the smallest sum of scores within one budget.

    The choice is exact: no other one within the budget has a smaller sum. What the sum says is
    another matter: scores are of layers quantized one at a time.

    Args:
        sensitivity: Scores of the layers under the schemes to choose from.
        bits: Mean bits of a weight, scales and zero points included, biases left out.
        mbytes: Megabytes (10**6 bytes) of all layers, biases included.
        latency: Seconds of all layers together, as ``seconds`` has them.
        seconds: For each layer and scheme, as :func:`measure_latency` returns it.
        tied: Groups of patterns; the layers that one group names get one scheme, as query, key and
            value must where a runtime reads them together.
        allow_float: Let layers stay float, at no loss and their float size.

    Returns:
        A scheme for each layer, None for float, as ``overrides=`` of :func:`quantize` takes it.

    Raises:
        ValueError: If there is no budget or more than one, it cannot be met (the message has the
            least that can), or a pattern in ``tied`` names no layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torsh_quant import quantize, sensitivity
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> found = sensitivity(net, [torch.randn(64, 64)], ["w8a16", "w4a16"], score="mse")
        >>> chosen = allocate(found, mbytes=0.004)
        >>> sorted(str(scheme) for scheme in chosen.values())
        ['w4a16', 'w8a16']
        >>> quantize(net, overrides=chosen).quant_report.bytes_after < 4000
        True
    """
    budgets = {"bits": bits, "mbytes": mbytes, "latency": latency}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of bits=, mbytes= and latency=; there are {list(given) or 0}")
    ((kind, budget),) = given.items()
    if not budget > 0:
        raise ValueError(f"{kind}={budget!r}; use a number above 0")
    if (kind == "latency") != (seconds is not None):
        raise ValueError("latency= and seconds= go together; measure_latency() gives the seconds")
    groups = _groups(sensitivity, tied)
    options = [
        _options(sensitivity, group, kind, seconds, allow_float=allow_float) for group in groups
    ]
    units = _units(sensitivity, kind, budget)
    least = sum(min(option.cost for option in one) for one in options)
    if least > units:
        smallest = least / _units(sensitivity, kind, 1.0, exact=True)
        raise ValueError(
            f"{kind}={budget:g} cannot be met with {list(sensitivity.schemes)}: the least is "
            f"{smallest:.6g}"
        )
    chosen = choose_options([[(o.cost, o.loss) for o in one] for one in options], units)
    found: dict[str, Scheme | None] = {}
    for group, one, number in zip(groups, options, chosen, strict=True):
        name = one[number].scheme
        found |= dict.fromkeys(group, None if name == "float" else Scheme.parse(name))
    return {layer: found[layer] for layer in sensitivity.layers}


def _groups(sensitivity: Sensitivity, tied: Sequence[Sequence[str]]) -> list[list[str]]:
    """Layers that get one scheme, each in one group; groups that share a layer are one."""
    owner: dict[str, list[str]] = {layer: [layer] for layer in sensitivity.layers}
    for patterns in tied:
        for pattern in patterns:
            if not any(matches(layer, pattern) for layer in owner):
                raise ValueError(
                    f"tied names no layer that was measured: {pattern!r}; "
                    f"there are {list(sensitivity.layers)[:6]}"
                )
        named = [layer for layer in owner if any(matches(layer, pattern) for pattern in patterns)]
        joined = sorted(
            {member for layer in named for member in owner[layer]}, key=sensitivity.layers.index
        )
        owner |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in owner.values()}.values())


def _options(
    sensitivity: Sensitivity,
    group: Sequence[str],
    kind: str,
    seconds: Mapping[tuple[str, str], float] | None,
    *,
    allow_float: bool,
) -> list[_Option]:
    rows = {(row.layer, row.scheme): row for row in sensitivity.rows}
    options: list[_Option] = []
    for scheme in (*sensitivity.schemes, *["float"] * allow_float):
        cost, loss = 0, 0.0
        for layer in group:
            row = rows[layer, sensitivity.schemes[0] if scheme == "float" else scheme]
            nbytes = row.nbytes_float if scheme == "float" else row.nbytes
            loss += 0.0 if scheme == "float" else row.value
            if kind == "latency" and seconds is not None:
                if (layer, scheme) not in seconds:
                    raise ValueError(f"seconds has no {layer!r} with {scheme!r}; measure it, too")
                cost += round(seconds[layer, scheme] * 1e9)
            else:
                cost += nbytes - (row.nbytes_bias if kind == "bits" else 0)
        options.append(_Option(cost, loss, scheme))
    return options


def _units(sensitivity: Sensitivity, kind: str, budget: float, *, exact: bool = False) -> float:
    """A budget in what options cost: bytes or nanoseconds."""
    weights = {row.layer: row.weights for row in sensitivity.rows}
    each = {"bits": sum(weights.values()) / 8, "mbytes": 1e6, "latency": 1e9}[kind]
    return budget * each if exact else budget * each * (1 + 1e-12)


def choose_options(options: Sequence[Sequence[tuple[int, float]]], budget: float) -> list[int]:
    """Pick one option of each group: the least loss within a budget of costs, exactly.

    Partial choices are extended group by group. One goes where another costs no more and loses no
    more, and where even fractions of the remaining options could not bring it below the best whole
    choice that is known.

    Args:
        options: For each group (cost, loss) of its options; the cheapest of each fit together.
        budget: Sum of costs, at most.

    Returns:
        The number of the option of each group.

    Example:
        >>> choose_options([[(1, 5.0), (3, 0.0)], [(1, 4.0), (3, 1.0)]], budget=4)
        [1, 0]

    Reference:
        K. Dudzinski and S. Walukiewicz, Exact methods for the knapsack problem and its
        generalizations, European Journal of Operational Research 28, 1987 (the relaxation);
        dominance as in H. Kellerer, U. Pferschy, D. Pisinger, Knapsack Problems, 2004, chapter 11.
    """
    kept = [_undominated(one) for one in options]
    # The groups with most to lose first: their choices part the good from the bad.
    groups = [[options[n][k] for k in numbers] for n, numbers in enumerate(kept)]
    order = sorted(range(len(groups)), key=lambda n: groups[n][-1][1] - groups[n][0][1])
    bounds = [_Bound([groups[n] for n in order[depth:]]) for depth in range(len(order) + 1)]
    best, best_path = bounds[0].whole(budget)
    states: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for depth, n in enumerate(order):
        grown: list[tuple[int, float, tuple[int, ...]]] = []
        rest = bounds[depth + 1]
        for cost, loss, path in states:
            for number, (more, worse) in enumerate(groups[n]):
                total, lost = cost + more, loss + worse
                if total + rest.least_cost > budget:
                    continue
                if lost + rest.below(budget - total) > best * (1 + 1e-12):
                    continue
                grown.append((total, lost, (*path, number)))
        grown.sort(key=lambda state: state[:2])
        states = []
        least = float("inf")
        for state in grown:
            if state[1] < least:
                states.append(state)
                least = state[1]
        for total, lost, path in states[:: max(1, len(states) // 16)]:
            more, tail = rest.whole(budget - total)
            if lost + more < best:
                best, best_path = lost + more, (*path, *tail)
    for _, lost, path in states:
        if lost <= best:
            best, best_path = lost, path
    found = [0] * len(options)
    for n, number in zip(order, best_path, strict=True):
        found[n] = kept[n][number]
    return found


def _undominated(options: Sequence[tuple[int, float]]) -> list[int]:
    """Numbers of the options that no other is at least as good as in both, cheapest first."""
    found: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: options[k]):
        if not found or options[k][1] < options[found[-1]][1]:
            found.append(k)
    return found


class _Bound:
    """What is lost at least by some groups, were options divisible, for any budget."""

    def __init__(self, groups: Sequence[Sequence[tuple[int, float]]]) -> None:
        self.groups = groups
        self.least_cost = sum(group[0][0] for group in groups)
        self._most_lost = sum(group[0][1] for group in groups)
        steps = [
            (gain / cost, cost, gain, n, k)
            for n, group in enumerate(groups)
            for cost, gain, k in _hull_steps(group)
        ]
        steps.sort(key=lambda step: -step[0])
        self._steps = steps
        self._costs = list(accumulate((step[1] for step in steps), initial=0))
        self._gains = list(accumulate((step[2] for step in steps), initial=0.0))

    def below(self, budget: float) -> float:
        """A loss that no choice within a budget is below."""
        room = budget - self.least_cost
        done = bisect_right(self._costs, room) - 1
        gain = self._gains[done]
        if done < len(self._steps):
            gain += (room - self._costs[done]) * self._steps[done][0]
        return self._most_lost - gain

    def whole(self, budget: float) -> tuple[float, tuple[int, ...]]:
        """The loss of a choice within a budget, and the choice."""
        room, taken = budget - self.least_cost, [0] * len(self.groups)
        stopped: set[int] = set()
        for _, cost, _, n, k in self._steps:
            if n in stopped or cost > room:
                stopped.add(n)
                continue
            room -= cost
            taken[n] = k
        loss = sum(group[k][1] for group, k in zip(self.groups, taken, strict=True))
        return loss, tuple(taken)


def _hull_steps(group: Sequence[tuple[int, float]]) -> list[tuple[int, float, int]]:
    """Steps along the lower convex hull: what each costs more, gains, and where it leads."""
    hull: list[int] = []
    for k, (cost, loss) in enumerate(group):
        while len(hull) > 1:
            (a, la), (b, lb) = group[hull[-2]], group[hull[-1]]
            if (la - lb) * (cost - b) > (lb - loss) * (b - a):
                break
            hull.pop()
        hull.append(k)
    return [(group[b][0] - group[a][0], group[a][1] - group[b][1], b) for a, b in pairwise(hull)]
