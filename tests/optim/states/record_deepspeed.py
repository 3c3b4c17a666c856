"""Write deepspeed_<version>.pt: ZeRO optimizer states of two ranks, made by DeepSpeed on the CPU.

Run it in an environment with deepspeed: ``python record_deepspeed.py``. Both ranks see the same
batches, so a run of ``torch.optim`` on one process must come to the same moments. DeepSpeed's own
classes are replaced by plain numbers, for ``torch.load(weights_only=True)``.
"""

import os
import socket
from pathlib import Path
from typing import Any

import torch

LR = (0.01, 0.02)


def run(rank: int, port: int, stage: int, out: str) -> None:
    """Train three steps on one of two ranks and save its optimizer state."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in zip(model[::2], LR, strict=True)]
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [torch.randn(4, 5) for _ in range(3)]
    optimizer = torch.optim.AdamW(groups)
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "round_robin_gradients": stage == 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for batch in batches:
        engine.backward(engine(batch).square().mean())
        engine.step()
    state = zero.state_dict()
    del state["loss_scaler"]
    state["zero_stage"] = int(state["zero_stage"])
    state["param_slice_mappings"] = [
        {name: (address.numel, address.start) for name, address in group.items()}
        for group in state["param_slice_mappings"]
    ]
    state["single_partition_of_fp32_groups"] = [
        partition.detach().clone() for partition in state["single_partition_of_fp32_groups"]
    ]
    trained = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    saved = {"state": state, "initial": initial, "batches": batches, "trained": trained}
    torch.save(saved, f"{out}.{rank}")


def main() -> None:
    """Record ZeRO stages 1 and 2 in one file next to this script."""
    import deepspeed

    path = Path(__file__).parent / f"deepspeed_{deepspeed.__version__}.pt"
    recorded: dict[str, Any] = {}
    for stage in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(
            run, (port, stage, str(path)), nprocs=2, start_method="spawn"
        )
        parts = [Path(f"{path}.{rank}") for rank in range(2)]
        ranks = [torch.load(part, weights_only=True) for part in parts]
        for part in parts:
            part.unlink()
        recorded[f"stage{stage}"] = {**ranks[0], "state": [saved["state"] for saved in ranks]}
    torch.save(recorded, path)


if __name__ == "__main__":
    main()
