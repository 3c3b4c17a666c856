"""Parameters spread over processes: torch's DTensor, read without its dispatcher.

Nothing here enters a collective that another process might leave out. What a process has gradients
for, and how its tensors are divided into buckets, may differ from the others'; the parameters of
the optimizer, their order and how they are spread do not, so that only these decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Give the part of a DTensor that this process holds; any other tensor as it is."""
    return cast(Tensor, getattr(tensor, "_local_tensor", tensor))


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def is_flat(param: Tensor) -> bool:
    """Whether a parameter is a part of a flat one, spread over processes without a DTensor."""
    flat = getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False)
    return bool(flat) and torch.distributed.get_world_size() > 1


@dataclass(frozen=True)
class Axes:
    """Dimensions of a device mesh over which tensors are cut.

    Attributes:
        mesh: The device mesh.
        dimensions: Numbers of the dimensions, without those of one process.
        device: Where sums are exchanged.
    """

    mesh: Any
    dimensions: tuple[int, ...]
    device: torch.device

    def add_up(self, sums: Tensor) -> None:
        """Turn sums over the local parts of tensors into sums over the tensors, in place.

        Replicas are counted once: their dimensions of the mesh are left out.
        """
        for dimension in self.dimensions:
            torch.distributed.all_reduce(sums, group=self.mesh.get_group(dimension))


def axes_of(tensor: Tensor) -> Axes | None:
    """Over which processes a tensor is cut; None if this process holds all of it.

    Raises:
        RuntimeError: The tensor is a sum that has not been taken yet.
    """
    if not is_spread(tensor):
        return None
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"a parameter has placements {placements}, so that no process holds its value; "
            "redistribute() it to Shard or Replicate before it is given to the optimizer"
        )
    # All that is not replicated is cut: is_shard() leaves out the strided shards that tensor
    # parallelism and FSDP have together.
    cut = (i for i, placement in enumerate(placements) if not placement.is_replicate())
    dimensions = tuple(i for i in cut if mesh.size(i) > 1)
    if not dimensions:
        return None
    device = local(tensor).device
    if device.type != mesh.device_type:  # offloaded, where the mesh cannot communicate
        device = torch.empty(0, device=mesh.device_type).device
    return Axes(mesh, dimensions, device)


class Summed(Protocol):
    """What has two sums for each of its tensors."""

    indices: list[int]
    axes: Axes | None
    sums: Tensor


class Spread:
    """How the parameters of an optimizer are spread over processes.

    Args:
        params: All parameters in the order of the groups.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._spread = [(i, cast(Any, param)) for i, param in enumerate(params) if is_spread(param)]
        self.axes = {i: axes for i, param in self._spread if (axes := axes_of(param)) is not None}
        self._rows: dict[Axes, dict[int, int]] = {}
        for i, axes in self.axes.items():
            rows = self._rows.setdefault(axes, {})
            rows[i] = len(rows)
        self._known: dict[tuple[Axes, tuple[int, ...]], Tensor] = {}

    def local_grads(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Give the gradients, of DTensors the part that belongs to the part of the parameter.

        Gradients that lie in another way, sums not taken yet among them, are redistributed.

        Raises:
            RuntimeError: A parameter is a DTensor and its gradient is not.
        """
        if not self._spread:
            return grads
        found = list(grads)
        for i, param in self._spread:
            grad = cast(Any, grads[i])
            if grad is None:
                continue
            if not is_spread(grad):
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} is a DTensor on "
                    f"{param.device_mesh}, but its gradient is a plain tensor; set a DTensor, "
                    "made by distribute_tensor() or DTensor.from_local()"
                )
            if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
                grad = grad.redistribute(param.device_mesh, param.placements)
            part = grad._local_tensor
            # a collective that has not finished
            found[i] = part.wait() if hasattr(part, "wait") else part
        return found

    def total(self, parts: Sequence[tuple[Axes | None, Tensor]], out: Tensor) -> None:
        """Add up sums that are parts of one over all parameters.

        Args:
            parts: Sums over local elements, and the axes over which the tensors are cut.
            out: Where the result goes, of the same shape.
        """
        out.zero_()
        for axes in (None, *self._rows):
            mine = [part for other, part in parts if other == axes]
            whole = out if axes is None else torch.zeros_like(out, device=axes.device)
            for part in mine:
                # without waiting only to where work is queued: the host would read too early
                whole.add_(part.to(whole.device, non_blocking=whole.is_cuda))
            if axes is not None:
                axes.add_up(whole)
                out.add_(whole.to(out.device, non_blocking=out.is_cuda))

    def share(self, buckets: Sequence[Summed]) -> None:
        """Turn the sums of the buckets over local elements into sums over whole tensors."""
        for axes, row_of in self._rows.items():
            mine = [bucket for bucket in buckets if bucket.axes == axes]
            whole = torch.zeros(len(row_of), 2, dtype=torch.float64, device=axes.device)
            rows = [self._places(axes, bucket.indices) for bucket in mine]
            for bucket, places in zip(mine, rows, strict=True):
                whole[places] = bucket.sums.to(whole)
            axes.add_up(whole)
            for bucket, places in zip(mine, rows, strict=True):
                bucket.sums.copy_(whole[places])

    def _places(self, axes: Axes, indices: list[int]) -> Tensor:
        """Rows of parameters among those cut over ``axes``, kept: copying them would wait."""
        key = (axes, tuple(indices))
        if key not in self._known:
            rows = [self._rows[axes][i] for i in indices]
            self._known[key] = torch.tensor(rows, dtype=torch.int64, device=axes.device)
        return self._known[key]


def spread_like(param: Tensor, value: Tensor, name: str) -> Tensor:
    """Copy a tensor to the device, memory layout and placements of a parameter.

    Args:
        param: The parameter.
        value: A tensor of the same shape, which keeps its element type. For a DTensor parameter it
            may also be whole and the same in all processes, or lie on the mesh in another way.
        name: How to call the value in messages.

    Raises:
        ValueError: The value is a DTensor, and the parameter is not or is on another mesh.
    """
    result = torch.empty_like(param, dtype=value.dtype).detach()
    if is_spread(value) and not (
        is_spread(param) and cast(Any, param).device_mesh == cast(Any, value).device_mesh
    ):
        where = cast(Any, param).device_mesh if is_spread(param) else "this process alone"
        raise ValueError(
            f"{name} is a DTensor on {cast(Any, value).device_mesh}, its parameter is on {where}; "
            "save with torch.distributed.checkpoint, which divides it anew, or load "
            "get_optimizer_state_dict() with StateDictOptions(full_state_dict=True)"
        )
    if is_spread(param):
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
        if not is_spread(value):
            everywhere = [Replicate()] * mesh.ndim
            value = value.to(local(param).device)
            value = DTensor.from_local(value, mesh, everywhere, run_check=False)
        if cast(Any, value).placements != placements:
            value = cast(Any, value).redistribute(mesh, placements)
    local(result).copy_(local(value))
    return result
