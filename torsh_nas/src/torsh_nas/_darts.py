"""Differentiable architecture search."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torsh_nas._activation import mixed
from torsh_nas._strategy import Batch, Strategy, optimizer_parameters, run


class DARTS(Strategy):
    """First-order DARTS: a softmax over the options, learned on validation batches.

    Each step first moves the architecture parameters ``alpha`` down the gradient of the
    validation loss at the present weights (Adam), then the weights down the gradient of the
    training loss (your optimizer). The chosen operation of an edge is its most probable one,
    ``"none"`` left out at nodes with ``keep``; the edges that stay are those whose chosen
    operations are most probable.

    The two gradients never mix: the first pass computes gradients for ``alpha`` only, so ``.grad``
    of the weights is untouched by it and weight gradients of convolutions are not even computed;
    the second treats the probabilities as constants.

    Args:
        order: 1, the first-order approximation, is the order there is.
        lr: Learning rate of ``alpha``.
        betas: Adam's averaging coefficients for ``alpha``.
        weight_decay: L2 penalty on ``alpha``.
        warmup_epochs: Epochs at the start that train the weights alone. Zero as published; a few
            epochs keep parameter-free options from winning before the others are trained.
        grad_clip: Largest norm of the weight gradient; ``None`` does not clip.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from torsh_nas import DARTS, Choice, Search, weights
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(Choice({"lin": nn.Linear(1, 1), "skip": nn.Identity()}))
        >>> darts = DARTS(lr=0.1)
        >>> sgd = torch.optim.SGD(weights(model), lr=0.1)
        >>> search = Search(model, darts, nn.functional.mse_loss, sgd)
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> for _ in range(20):  # the identity solves y = x at once
        ...     _ = search.step((x, x), (x.flip(0), x.flip(0)))
        >>> search.best()["0"]
        'skip'

    Reference:
        Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", 2018, arXiv:1806.09055.
        The defaults are those of its CIFAR-10 search. There the validation pass also accumulates
        gradients on the weights, which are then discarded; here they are not computed.
    """

    def __init__(
        self,
        *,
        order: int = 1,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
        warmup_epochs: int = 0,
        grad_clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        if order != 1:
            raise ValueError(f"order={order!r} is not available; use order=1")
        if lr <= 0 or weight_decay < 0 or warmup_epochs < 0:
            raise ValueError(
                "need lr > 0, weight_decay >= 0 and warmup_epochs >= 0, got "
                f"{lr}, {weight_decay} and {warmup_epochs}"
            )
        if grad_clip is not None and grad_clip <= 0:
            raise ValueError(f"grad_clip={grad_clip} must be positive; None does not clip")
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_epochs, self.grad_clip = warmup_epochs, grad_clip

    def _setup(self, generator: torch.Generator) -> None:
        parameter = next(self._model.parameters(), torch.empty(0))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._alphas = {
            label: (1e-3 * torch.randn(len(options), generator=generator, dtype=torch.float64))
            .to(parameter.device, dtype)
            .requires_grad_()
            for label, options in self._space.choices.items()
        }
        self._alpha_optimizer = torch.optim.Adam(
            self._alphas.values(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )

    def step(self, train_batch: Batch, val_batch: Batch, *, epoch: int = 0) -> dict[str, Tensor]:
        """Update ``alpha`` on the validation batch, then the weights on the training batch.

        Args:
            train_batch: Inputs and, last, the target.
            val_batch: The same from data the weights are not trained on.
            epoch: Number of the epoch, counted from 0; decides whether warm-up is over.

        Returns:
            ``train_loss`` and, after warm-up, ``val_loss`` and with a penalty its ``expected_ms``:
            0-dim tensors, detached and not yet synchronised.
        """
        self._check_bound()
        report = self._alpha_step(val_batch) if epoch >= self.warmup_epochs else {}
        report["train_loss"] = self._weight_step(train_batch)
        return report

    def _alpha_step(self, batch: Batch) -> dict[str, Tensor]:
        probabilities = {label: a.softmax(0) for label, a in self._alphas.items()}
        with mixed(self._found, probabilities):
            loss = run(self._model, self._loss, batch)
            report = {"val_loss": loss.detach()}
            if self._penalty is not None:
                value, expected = self._penalty.evaluate(probabilities)
                loss = loss + value
                report["expected_ms"] = expected.detach()
            alphas = list(self._alphas.values())
            grads = torch.autograd.grad(loss, alphas, allow_unused=True)
        for (label, alpha), grad in zip(self._alphas.items(), grads, strict=True):
            if grad is None:
                raise ValueError(f"the loss does not depend on the choice labelled {label!r}")
            alpha.grad = grad
        self._alpha_optimizer.step()
        self._alpha_optimizer.zero_grad()
        if self._penalty is not None:
            self._penalty.update(report["expected_ms"])
        return report

    def _weight_step(self, batch: Batch) -> Tensor:
        self._optimizer.zero_grad()
        with mixed(self._found, self.probabilities()):
            loss = run(self._model, self._loss, batch)
            loss.backward()
        if self.grad_clip is not None:
            parameters = optimizer_parameters(self._optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        self._optimizer.step()
        return loss.detach()

    def probabilities(self) -> dict[str, Tensor]:
        """Return the softmax of ``alpha`` by label, each of shape ``(options,)``."""
        self._check_bound()
        return {label: alpha.detach().softmax(0) for label, alpha in self._alphas.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return ``alpha`` by label and the state of its optimizer."""
        self._check_bound()
        return {
            "version": 1,
            "space_id": self._space.space_id,
            "alphas": {label: alpha.detach().clone() for label, alpha in self._alphas.items()},
            # torch hands out, and takes in, the live moment tensors.
            "optimizer": copy.deepcopy(self._alpha_optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: Another version, or the state of another space.
        """
        self._check_bound()
        if state.get("version") != 1:
            raise ValueError(f"DARTS state version {state.get('version')!r}; this reads version 1")
        if state["space_id"] != self._space.space_id:
            raise ValueError(
                f"the state belongs to space {state['space_id']}, not to {self._space.space_id}"
            )
        with torch.no_grad():
            for label, alpha in self._alphas.items():
                alpha.copy_(state["alphas"][label])
        self._alpha_optimizer.load_state_dict(dict(state["optimizer"]))
