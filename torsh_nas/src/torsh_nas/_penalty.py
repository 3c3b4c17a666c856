"""A latency term in the loss of the architecture parameters."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from torsh_nas._latency import LatencyTable


class LatencyPenalty:
    """Make slow options cost loss while the architecture parameters are learned.

    With ``r = expected latency / target_ms``, both kinds are differentiable in the probabilities
    and independent of the unit of time:

    - ``"add"`` adds ``weight * r``: always pushes towards faster options.
    - ``"lagrangian"`` adds ``m * (r - 1)`` with a multiplier ``m`` that grows by
      ``weight * (r - 1)`` after each step and never falls below 0: it pushes only as hard as the
      target needs, and there is nothing to tune.

    Neither guarantees anything about the derived model; a :class:`Budget` does.

    Args:
        source: Table that predicts latencies.
        target_ms: Latency to aim at, in milliseconds.
        kind: ``"add"`` or ``"lagrangian"``.
        weight: Factor of ``"add"``, or step size of the multiplier.

    Raises:
        ValueError: ``target_ms`` or ``weight`` not positive, or an unknown ``kind``.

    Example:
        >>> from torsh_nas import LatencyPenalty, LatencyTable, Space
        >>> import torch
        >>> table = LatencyTable(Space({"a": ("slow", "fast")}), {"a": (3.0, 1.0)})
        >>> penalty = LatencyPenalty(table, target_ms=1.0, kind="add", weight=0.5)
        >>> value, expected_ms = penalty.evaluate({"a": torch.tensor([0.5, 0.5])})
        >>> value.item(), expected_ms.item()
        (1.0, 2.0)

    Reference:
        Cai, Zhu, Han, "ProxylessNAS", 2018, arXiv:1812.00332 (expected latency as a loss). Their
        term is in milliseconds, ours is relative to the target.
    """

    def __init__(
        self,
        source: LatencyTable,
        target_ms: float,
        kind: Literal["add", "lagrangian"] = "lagrangian",
        weight: float = 0.05,
    ) -> None:
        if not target_ms > 0 or not weight > 0:
            raise ValueError(
                f"target_ms={target_ms} and weight={weight} must be positive "
                "(target_ms in milliseconds)"
            )
        if kind not in ("add", "lagrangian"):
            raise ValueError(f"kind={kind!r}; use 'add' or 'lagrangian'")
        self.source, self.target_ms, self.kind, self.weight = source, target_ms, kind, weight
        self._multiplier: Tensor | None = None

    @property
    def multiplier(self) -> float:
        """Present factor of the constraint (``weight`` for ``"add"``); synchronises."""
        if self.kind == "add":
            return self.weight
        return 0.0 if self._multiplier is None else self._multiplier.item()

    def evaluate(self, probabilities: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the term to add to the loss and the expected latency in milliseconds."""
        expected = self.source.expected(probabilities)
        ratio = expected / self.target_ms
        if self.kind == "add":
            return self.weight * ratio, expected
        if self._multiplier is None:
            self._multiplier = torch.zeros_like(ratio)
        return self._multiplier.to(ratio) * (ratio - 1), expected

    def update(self, expected_ms: Tensor) -> None:
        """Move the multiplier by how far the expected latency is from the target."""
        if self._multiplier is not None:
            step = self.weight * (expected_ms.detach() / self.target_ms - 1)
            # A new tensor: the old one may be part of a graph.
            self._multiplier = (self._multiplier + step).clamp_min(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier."""
        return {"version": 1, "kind": self.kind, "multiplier": self._multiplier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: Another version or kind.
        """
        if state.get("version") != 1 or state.get("kind") != self.kind:
            raise ValueError(
                f"penalty state is version {state.get('version')!r}, kind {state.get('kind')!r}; "
                f"expected version 1, kind {self.kind!r}"
            )
        self._multiplier = state["multiplier"]
