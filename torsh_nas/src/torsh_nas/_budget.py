"""A hard limit, and what happens when nothing fits under it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torsh_nas._latency import LatencyTable


class InfeasibleBudget(ValueError):  # noqa: N818
    """No architecture of the space meets the budget.

    Attributes:
        minimum_ms: Least latency that can be reached, in milliseconds.
    """

    def __init__(self, message: str, *, minimum_ms: float) -> None:
        super().__init__(message)
        self.minimum_ms = minimum_ms


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit that the found model must hold.

    Attributes:
        latency_ms: Largest latency in milliseconds.
        source: Table that predicts the latency of an architecture.

    Example:
        >>> from torsh_nas import Budget, LatencyTable, Space
        >>> table = LatencyTable(Space({"a": ("x", "y")}), {"a": (1.0, 2.0)})
        >>> Budget(latency_ms=1.5, source=table).latency_ms
        1.5
    """

    latency_ms: float
    source: "LatencyTable"

    def __post_init__(self) -> None:
        if not self.latency_ms > 0:
            raise ValueError(f"latency_ms={self.latency_ms} must be positive, in milliseconds")
