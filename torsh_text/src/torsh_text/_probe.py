"""Logistic regression on vectors, solved to the end."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
_FOLDS = 5
_MANY = 2000


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, *, close: float) -> Tensor:
    """Solve ``product(x) = b`` until the rest is ``close`` times as long as ``b``."""
    x, rest = torch.zeros_like(b), b.clone()
    step, square = rest.clone(), rest.square().sum()
    goal = close**2 * square
    for _ in range(1000):
        if square <= goal:
            break
        image = product(step)
        length = square / (step * image).sum()
        x += length * step
        rest -= length * image
        before, square = square, rest.square().sum()
        step = rest + square / before * step
    return x


def solve_logistic(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    c: float,
    weights: Tensor | None = None,
    tolerance: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Fit multinomial logistic regression with an L2 penalty, by Newton's method in float64.

    Minimises ``|W|**2 / 2 + c * sum_i weights[y_i] * cross_entropy_i``; the bias is not penalised.
    This is scikit-learn's objective. Newton's equations are solved by conjugate gradients, with
    products of the Hessian in closed form, in the span of the vectors where they are fewer than
    their entries. (L-BFGS needs thousands of steps where ``c`` is large.)

    Args:
        x: Vectors ``(rows, dim)``.
        y: Classes ``(rows,)``, int64 from 0.
        num_classes: How many classes.
        c: Inverse strength of the penalty.
        weights: Weight of each class ``(num_classes,)``; None for one.
        tolerance: Largest entry of the gradient, divided by ``c * rows``, at which it stops.

    Returns:
        ``W`` ``(num_classes, dim)`` and the bias ``(num_classes,)``, which sums to zero; float64.

    Example:
        >>> import math, pytest
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> weight, bias = solve_logistic(x, torch.tensor([0, 1]), num_classes=2, c=1.0)
        >>> w = weight[1].item()  # where the penalty's slope is that of the loss
        >>> w == pytest.approx(2 / (1 + math.exp(2 * w))), bias.abs().max().item() < 1e-9
        (True, True)

    Reference:
        Lin, Weng, Keerthi: Trust region Newton method for logistic regression. 2008. Here a line
        search takes the place of the trust region.
    """
    data, basis = x.double(), None
    if len(data) < data.shape[1]:
        basis, triangle = torch.linalg.qr(data.T)
        data = triangle.T
    data = F.pad(data, (0, 1), value=1.0)  # the last column carries the bias
    count = len(data)
    pull = torch.full((data.shape[1],), 1.0 / (c * count), dtype=data.dtype, device=data.device)
    pull[-1] = 0.0
    share = torch.ones_like(y, dtype=data.dtype) if weights is None else weights.to(data)[y]
    share = share.unsqueeze(1) / count
    theta = data.new_zeros(num_classes, data.shape[1])

    def loss(at: Tensor) -> Tensor:
        fit = F.cross_entropy(data @ at.T, y, reduction="none")
        return (fit * share[:, 0]).sum() + (pull * at.square()).sum() / 2

    value = loss(theta)
    for _ in range(200):
        p = (data @ theta.T).softmax(1)
        slope = (share * (p - F.one_hot(y, num_classes))).T @ data + pull * theta
        size = slope.abs().max().item()
        if size <= tolerance:
            break

        def product(v: Tensor, p: Tensor = p) -> Tensor:
            along = data @ v.T
            return (share * p * (along - (p * along).sum(1, keepdim=True))).T @ data + pull * v

        step = _conjugate_gradients(product, -slope, close=min(0.1, size**0.5))
        downhill, scale = (slope * step).sum(), 1.0
        while (reached := loss(theta + scale * step)) > value + 1e-4 * scale * downhill:
            scale /= 2
            if scale < 1e-8:  # float64 can tell no further step from this one
                break
        if scale < 1e-8:
            break
        theta, value = theta + scale * step, reached
    weight, bias = theta[:, :-1], theta[:, -1]
    return (weight if basis is None else weight @ basis.T), bias - bias.mean()


def balanced_weights(y: Tensor, num_classes: int) -> Tensor:
    """Weight of each class that makes all count alike: ``rows / (classes * rows of the class)``.

    Example:
        >>> balanced_weights(torch.tensor([0, 0, 0, 1]), 2).tolist()
        [0.66..., 2.0]
    """
    counts = torch.bincount(y, minlength=num_classes).double()
    return len(y) / (num_classes * counts)


def stratified_folds(y: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """Fold of each row, with every class spread evenly over the folds."""
    found = torch.empty(len(y), dtype=torch.int64)
    start = 0
    for kind in y.unique().tolist():
        rows = (y == kind).nonzero()[:, 0].cpu()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        found[rows] = (torch.arange(len(rows)) + start) % folds
        start += len(rows)
    return found


def choose_strength(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    weights: Tensor | None,
    seed: int,
) -> float:
    """Choose ``c`` of :func:`solve_logistic` by cross-validation.

    Five folds, or as many as the rarest class has rows; of more than 2,000 rows only one fold is
    held out. The ``c`` of the least log loss wins, the smaller one of two alike. Candidates are
    0.1, 1, 10, 100 and 1,000 over the mean squared length of the vectors. A class with a single
    row cannot be held out: then it is 10 over that length.
    """
    unit = 1.0 / max(x.double().square().sum(1).mean().item(), 1e-12)
    folds = min(_FOLDS, int(torch.bincount(y, minlength=num_classes).min()))
    if folds < 2:
        return 10.0 * unit
    fold = stratified_folds(y, folds, torch.Generator().manual_seed(seed)).to(y.device)
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for held in range(1 if len(y) > _MANY else folds):
        learn, check = fold != held, fold == held
        for strength in STRENGTHS:
            weight, bias = solve_logistic(
                x[learn],
                y[learn],
                num_classes=num_classes,
                c=strength * unit,
                weights=weights,
                tolerance=1e-6,
            )
            logits = F.linear(x[check].double(), weight, bias)
            loss = F.cross_entropy(
                logits,
                y[check],
                weight=None if weights is None else weights.to(logits),
                reduction="sum",
            )
            losses[strength] += loss.item()
    return min(STRENGTHS, key=lambda strength: losses[strength]) * unit


def fit_probe(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    c: float | Literal["auto"],
    balanced: bool,
    seed: int,
) -> tuple[Tensor, Tensor, float]:
    """Fit weights and bias, float64, and say which ``c`` was used."""
    weights = balanced_weights(y, num_classes) if balanced else None
    if c == "auto":
        c = choose_strength(x, y, num_classes=num_classes, weights=weights, seed=seed)
    weight, bias = solve_logistic(x, y, num_classes=num_classes, c=c, weights=weights)
    return weight, bias, c
