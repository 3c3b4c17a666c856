"""Batches that shrink when the device runs out of memory."""

import logging
from collections.abc import Callable

import numpy as np
import torch

from ._packing import plan_batches
from ._runtime import Budget

logger = logging.getLogger(__name__)


def run_batches(
    costs: np.ndarray,
    compute: Callable[[np.ndarray], None],
    *,
    budget: Budget,
    device: torch.device,
) -> None:
    """Call ``compute`` with the rows of each padded batch, the costliest first.

    When the device runs out of memory, the budget is halved (and stays halved) and the rows that
    are left are planned again.

    Args:
        costs: Tokens of each row, new ones included, int64 ``(rows,)``.
        compute: Computes the rows whose indices it is given.
        budget: Limits of a batch; changed in place.
        device: Whose memory it is.
    """
    left = np.arange(len(costs))
    while len(left):
        plan = plan_batches(
            costs[left], max_tokens=budget.max_tokens, max_rows=budget.max_rows, padded=True
        )
        done = 0
        for positions in plan:
            rows = left[positions]
            try:
                compute(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
            else:
                done += 1
                continue
            # outside the handler: its traceback would keep the failed batch's tensors alive
            budget.halve(len(rows) * int(costs[rows].max()))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            logger.info("out of memory; going on with %d tokens a batch", budget.max_tokens)
            break
        left = np.concatenate([left[p] for p in plan[done:]]) if done < len(plan) else left[:0]
