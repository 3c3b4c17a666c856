"""Many checks per group of processes: starting one costs seconds."""

import hashlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def run(checks: Sequence[Callable[[], Any]]) -> dict[str, str]:
    """Run each check on this rank; return its name with "" or the traceback."""
    results = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            check()
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
    return results


def judge(results: Sequence[dict[str, str]], name: str) -> None:
    """Fail with the tracebacks of ``name``."""
    assert name in results[0]
    failures = [f"rank {rank}: {one[name]}" for rank, one in enumerate(results) if one[name]]
    assert not failures, "\n".join(failures)


def fingerprint(model: nn.Module) -> str:
    """Return a digest of every bit of the parameters."""
    raw = b"".join(bytes(p.detach().view(torch.uint8).flatten().tolist()) for p in _flat(model))
    return hashlib.sha256(raw).hexdigest()


def _flat(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().flatten() for param in model.parameters()]
