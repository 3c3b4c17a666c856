"""What every search strategy offers, and the checks they share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torsh_nas._activation import find_choices
from torsh_nas._architecture import Architecture
from torsh_nas._choice import Choice
from torsh_nas._penalty import LatencyPenalty
from torsh_nas._solve import maximise
from torsh_nas._space import Space, space

Loss = Callable[[Any, Any], Tensor]
Batch = Sequence[Any]


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters for your weight optimizer: those that require gradients.

    The architecture parameters are not among them. They live in the strategy, with an optimizer
    of their own, so they cannot be trained or decayed by accident.

    Args:
        model: A model with choices.

    Example:
        >>> from torsh_nas import Choice, weights
        >>> from torch import nn
        >>> model = nn.Sequential(Choice([nn.Linear(2, 2), nn.Identity()]), nn.Linear(2, 1))
        >>> [tuple(p.shape) for p in weights(model)]
        [(2, 2), (2,), (1, 2), (1,)]
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter that requires gradients")
    return found


class Strategy(ABC):
    """How probabilities over the options are learned; base of :class:`DARTS`.

    A :class:`Search` binds the strategy to a model once, then calls :meth:`step` for each pair of
    batches. The strategy owns the architecture parameters, their optimizer and the order of the
    two updates; the search owns loaders, logs and checkpoints.
    """

    def __init__(self) -> None:
        self._bound = False

    def bind(
        self,
        model: nn.Module,
        loss: Loss,
        weight_optimizer: torch.optim.Optimizer,
        *,
        penalty: LatencyPenalty | None = None,
        seed: int = 0,
    ) -> None:
        """Attach to a model; called once, by :class:`Search`.

        Raises:
            RuntimeError: Already bound.
            ValueError: The optimizer holds parameters that are not the model's, or misses some.
        """
        if self._bound:
            raise RuntimeError(
                f"this {type(self).__name__} is bound to a model already; make a new one"
            )
        self._space = space(model)
        self._found: dict[str, list[Choice]] = find_choices(model)
        self._model, self._loss, self._optimizer = model, loss, weight_optimizer
        self._penalty = penalty
        self._setup(torch.Generator().manual_seed(seed))
        _check_optimizer(model, weight_optimizer)
        self._bound = True

    @property
    def space(self) -> Space:
        """Space of the bound model."""
        self._check_bound()
        return self._space

    @abstractmethod
    def _setup(self, generator: torch.Generator) -> None:
        """Make the architecture parameters."""

    @abstractmethod
    def step(self, train_batch: Batch, val_batch: Batch, *, epoch: int = 0) -> dict[str, Tensor]:
        """Update architecture and weights once; return 0-dim tensors, without device sync."""

    @abstractmethod
    def probabilities(self) -> dict[str, Tensor]:
        """Return the present probability of each option, ``(options,)`` by label, detached."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all state that the coming steps depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""

    def scores(self) -> dict[str, Tensor]:
        """Return what :func:`solve` maximises: the log-probability of each option.

        At nodes with ``keep`` the option ``"none"`` scores 0 and does not compete with the
        operations: the best sum then keeps the edges whose best operation is most probable.
        """
        result: dict[str, Tensor] = {}
        grouped = {label for group in self.space.groups for label in group.labels}
        for label, p in self.probabilities().items():
            scores = p.double().clamp_min(torch.finfo(torch.float64).tiny).log().cpu()
            if label in grouped:
                scores[-1] = 0.0
            result[label] = scores
        return result

    def best(self) -> Architecture:
        """Return the architecture with the highest sum of :meth:`scores`."""
        return maximise(self.space, self.scores())

    def _check_bound(self) -> None:
        if not self._bound:
            raise RuntimeError(
                f"this {type(self).__name__} has no model yet; pass it to torsh_nas.Search"
            )


def run(model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    """Return the loss of a batch: the last entry is the target, the others are the inputs."""
    value = loss(model(*batch[:-1]), batch[-1])
    if value.dim() != 0:
        raise ValueError(f"loss returned shape {tuple(value.shape)}; it must return one number")
    return value


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for parameter in optimizer_parameters(optimizer)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    foreign = held - names.keys()
    if foreign:
        raise ValueError(
            f"weight_optimizer holds {len(foreign)} tensor(s) that are no parameters of the model: "
            "architecture parameters, or those of another copy of it; "
            "build it from torsh_nas.weights(model)"
        )
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"weight_optimizer lacks {len(missing)} parameter(s) of the model, first "
            f"{missing[0]!r}; build it from torsh_nas.weights(model) or set requires_grad=False"
        )
