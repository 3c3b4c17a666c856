"""Writes ``peers.json``: what other packages make of the problems of ``recorded.py``.

Run in an environment with torch, scikit-learn, lion-pytorch, timm, pytorch-optimizer, prodigyopt:
``PYTHONPATH=. python tests/optim/states/record_peers.py``.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from tests.optim.recorded import FILE, STEPS, set_small_grads, small_params, train_logistic

PRODIGY = {
    "plain": {"weight_decay": 0.0},
    "decoupled": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.01, "decouple": False},
    "safeguard": {"weight_decay": 0.1, "safeguard_warmup": True},
}
LAMB = {
    "default": {},
    "no_decay": {"weight_decay": 0.0},
    "always_adapt": {"weight_decay": 0.0, "always_adapt": True},
    "trust_clip": {"trust_clip": True, "max_grad_norm": None, "weight_decay": 0.1},
    "raw": {"bias_correction": False, "grad_averaging": False, "max_grad_norm": None},
}


def small(make: Callable[..., Any], **options: Any) -> list[float]:
    params = small_params()
    opt = make(params, lr=0.05, betas=(0.8, 0.95), **options)
    for step in range(STEPS):
        set_small_grads(params, step)
        opt.step()
    return torch.cat([p.detach().flatten() for p in params]).tolist()


def prodigy(**options: Any) -> dict[str, list[float]]:
    from prodigyopt import Prodigy

    weights = [torch.nn.Parameter(torch.zeros(n)) for n in ((61, 10), (10,))]
    opt = Prodigy(weights, lr=1.0, **options)
    # Prodigy multiplies eps by the estimate after the step, ToRSh by the one before it
    opt.param_groups[0]["eps"] = 0.0
    estimates: list[float] = []
    warmup = 10 if options.get("safeguard_warmup") else 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / warmup))

    def after() -> None:
        estimates.append(opt.param_groups[0]["d"])
        scheduler.step()

    losses = train_logistic(weights, opt, 40, after)
    return {"losses": losses, "estimates": estimates}


def main() -> None:
    from lion_pytorch import Lion
    from pytorch_optimizer import Lamb as KozistrLamb
    from timm.optim import Lamb

    names = ("torch", "lion-pytorch", "timm", "pytorch-optimizer", "prodigyopt")
    found = {
        "versions": {name: version(name) for name in names},
        "lion": small(Lion, weight_decay=0.1),
        "timm_lamb": {
            name: small(Lamb, foreach=False, **options) for name, options in LAMB.items()
        },
        "pytorch_optimizer_lamb": small(  # adam_debias=True takes its bias correction out
            KozistrLamb, weight_decay=0.1, weight_decouple=False, adam_debias=True, foreach=False
        ),
        "prodigy": {name: prodigy(**options) for name, options in PRODIGY.items()},
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{FILE}\n")


if __name__ == "__main__":
    main()
