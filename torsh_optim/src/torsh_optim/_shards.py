"""Parameters spread over processes: torch's DTensor, read without its dispatcher."""

from typing import Any, cast

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Give the part of a DTensor that this process holds; any other tensor as it is."""
    return cast(Tensor, getattr(tensor, "_local_tensor", tensor))


class Shards:
    """How some parameters are spread over a device mesh.

    Args:
        mesh: The device mesh.
        placements: How the tensors lie on each of its dimensions.
    """

    def __init__(self, mesh: Any, placements: tuple[Any, ...]) -> None:
        self._mesh = mesh
        self._placements = placements
        self._split = [i for i, placement in enumerate(placements) if placement.is_shard()]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for tensors that are spread alike."""
        return (self._mesh, self._placements)

    def local_grads(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Give the local part of the gradients, which are spread as their parameters are."""
        return [None if grad is None else self._local_grad(grad) for grad in grads]

    def _local_grad(self, grad: Any) -> Tensor:
        if not hasattr(grad, "_local_tensor"):
            raise RuntimeError(
                "the gradient of a DTensor parameter is a plain tensor; set a DTensor on "
                f"{self._mesh}, or take the step before the model is distributed"
            )
        if grad.placements != self._placements or grad.device_mesh != self._mesh:
            grad = grad.redistribute(self._mesh, self._placements)
        part = local(grad)
        wait = getattr(part, "wait", None)  # a collective that has not finished
        return part if wait is None else cast(Tensor, wait())

    def add_up(self, sums: Tensor) -> None:
        """Add sums over local elements, in place, to sums over all elements."""
        for dimension in self._split:
            torch.distributed.all_reduce(sums, group=self._mesh.get_group(dimension))


def shards_of(tensor: Tensor) -> Shards | None:
    """How a tensor is spread; None if it is whole.

    Raises:
        RuntimeError: A placement is neither sharded nor replicated.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None or not hasattr(tensor, "_local_tensor"):
        return None
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(f"a parameter has placements {placements}; redistribute it first")
    return Shards(cast(Any, tensor).device_mesh, placements)
