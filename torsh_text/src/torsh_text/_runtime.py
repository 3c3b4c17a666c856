"""The engine under everything that reads text: tokenize, plan, pack, compute, put back in order."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._packing import PackedBatch, plan_batches
from ._tokenizing import Long, RowTokenizer, TokenRows

logger = logging.getLogger(__name__)

WINDOW = 4096  # texts tokenized at a time: memory stays bounded and the device never waits long
KEPT_WINDOW = 1024  # on a CPU with a cache: what kill -9 loses, seconds of work


@dataclass
class Budget:
    """How much one batch may hold; remembers what ran out of memory.

    Attributes:
        max_tokens: Most tokens in a batch, padding included where there is any.
        max_rows: Most rows in a batch.
    """

    max_tokens: int
    max_rows: int = 8192

    def halve(self, tokens: int) -> None:
        """Learn that a batch of ``tokens`` tokens was too much."""
        self.max_tokens = max(1, min(self.max_tokens, tokens) // 2)


def default_max_tokens(device: torch.device, dtype: torch.dtype) -> int:
    """Budget that was fastest where measured.

    CPU: activations of 512 to 1,024 tokens stay in the caches; 4,096 is slower than padding. CUDA
    in half precision: 65,536 keeps an H100 busy; float32 runs more and smaller kernels.
    """
    if device.type != "cuda":
        return 768
    return 65_536 if dtype in (torch.float16, torch.bfloat16) else 16_384


def check_max_tokens(max_tokens: object) -> None:
    """Refuse what is neither ``"auto"`` nor a positive integer."""
    if max_tokens == "auto":
        return
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise TypeError(f"max_tokens={max_tokens!r} is neither 'auto' nor an integer")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} is not positive; use 'auto' or a larger number")


def check_device(device: object, *models: object) -> None:
    """Refuse a device where every model is loaded already."""
    if device is not None and not any(isinstance(one, (str, os.PathLike)) for one in models):
        raise ValueError(f"device={str(device)!r} is for a path or hub id; move the model itself")


def check_options(*, out: object, long: object, dim: object, size: int) -> None:
    """Refuse options of ``encode`` that do not fit vectors of ``size`` entries."""
    if out not in ("torch", "numpy"):
        raise ValueError(f"out={out!r} is neither 'torch' nor 'numpy'")
    if long not in ("truncate", "error", "mean"):
        raise ValueError(f"long={long!r} is none of 'truncate', 'error', 'mean'")
    if dim is None:
        return
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim={dim!r} is neither None nor an integer")
    if not 1 <= dim <= size:
        raise ValueError(f"dim={dim} is not between 1 and the model's {size}")


def tokenized_windows(
    texts: Sequence[str], tokenizer: RowTokenizer, *, long: Long, window: int | None = None
) -> Iterator[tuple[int, TokenRows]]:
    """Yield ``(first text, rows)`` window by window, tokenizing one ahead in a thread."""
    step = WINDOW if window is None else window
    starts = range(0, len(texts), step)
    if len(starts) < 2:
        for start in starts:
            yield start, tokenizer.rows(texts, long=long)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="torsh_text") as pool:
        work = [
            pool.submit(tokenizer.rows, texts[start : start + step], long=long)
            for start in starts[:2]
        ]
        for start in starts:
            rows = work.pop(0).result()
            later = start + 2 * step
            if later < len(texts):
                work.append(pool.submit(tokenizer.rows, texts[later : later + step], long=long))
            yield start, rows


def compute_rows(
    rows: TokenRows,
    compute: Callable[[PackedBatch, Tensor], None],
    *,
    budget: Budget,
    device: torch.device,
    first_position: int,
    padded: bool,
) -> None:
    """Run every row exactly once, in batches within the budget, as :func:`run_batches` does.

    Args:
        rows: Tokenized rows.
        compute: Called with each batch and the indices of its rows, both on ``device``.
        budget: Limits of a batch; changed in place.
        device: Where the batches go.
        first_position: See :class:`PackedBatch`.
        padded: Whether ``compute`` pads, so that padding counts.
    """

    def one(indices: np.ndarray) -> None:
        batch = rows.batch(indices, first_position=first_position)
        where = torch.from_numpy(indices)
        if device.type == "cuda":
            batch, where = batch.pin_memory(), where.pin_memory()
        compute(batch.to(device, non_blocking=True), where.to(device, non_blocking=True))

    run_batches(rows.lengths, one, budget=budget, device=device, padded=padded)


def run_batches(
    costs: np.ndarray,
    compute: Callable[[np.ndarray], None],
    *,
    budget: Budget,
    device: torch.device,
    padded: bool,
) -> None:
    """Call ``compute`` with the rows of each batch, the costliest rows first.

    When the device runs out of memory, the budget is halved (and stays halved) and the rows that
    are left are planned again.

    Args:
        costs: Tokens of each row, new ones included, int64 ``(rows,)``.
        compute: Computes the rows whose indices it is given.
        budget: Limits of a batch; changed in place.
        device: Whose memory it is.
        padded: Whether batches are padded, so that padding counts.
    """
    left = np.arange(len(costs))
    while len(left):
        plan = plan_batches(
            costs[left], max_tokens=budget.max_tokens, max_rows=budget.max_rows, padded=padded
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
            tried = costs[rows]
            budget.halve(int(len(rows) * tried.max() if padded else tried.sum()))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            logger.info("out of memory; going on with %d tokens a batch", budget.max_tokens)
            break
        left = np.concatenate([left[p] for p in plan[done:]]) if done < len(plan) else left[:0]


def progress_bar(total: int, *, shown: bool) -> Any:
    """Return a bar that counts texts."""
    from tqdm.auto import tqdm  # comes with transformers

    return tqdm(total=total, disable=not shown, unit="text", leave=False)


def join_pieces(vectors: Tensor, rows: TokenRows) -> Tensor:
    """Average each text's pieces by their tokens: ``(rows, dim)`` to ``(texts, dim)``."""
    if len(rows.pieces) == len(rows.lengths):
        return vectors
    weights = torch.from_numpy(rows.lengths).to(vectors.device, vectors.dtype).unsqueeze(1)
    pieces = torch.from_numpy(rows.pieces).to(vectors.device)

    def total(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", lengths=pieces, axis=0, unsafe=True)

    return total(vectors * weights) / total(weights)
