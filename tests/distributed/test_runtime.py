import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torsh_dist import init

SOURCES = str(Path(__file__).parents[2] / "torsh_dist" / "src")
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
import torsh_dist as td
with td.init("cpu", timeout=60) as context:
    total = torch.tensor(float(context.rank))
    dist.all_reduce(total)
    result = [context.rank, context.world_size, context.local_rank, context.backend, float(total),
              os.environ["NCCL_NVLS_ENABLE"], os.environ.get("GLOO_SOCKET_IFNAME")]
    Path(sys.argv[1], str(context.rank)).write_text(json.dumps(result))
assert not dist.is_initialized()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "results").mkdir()
    return path


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    return kept | {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"} | more


def read(script):
    return [json.loads(p.read_text()) for p in sorted((script.parent / "results").iterdir())]


def test_alone_is_a_world_of_one():
    with init("cpu") as context:
        assert (context.rank, context.world_size, context.local_rank) == (0, 1, 0)
        assert (context.device, context.backend) == (torch.device("cpu"), "gloo")
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
    assert not dist.is_initialized()
    context.close()  # again


def test_the_same_again_is_the_same_context():
    with init("cpu", timeout=30) as context:
        assert init() is context
        assert init("cpu", "gloo", 30) is context
        with pytest.raises(RuntimeError, match="before with timeout='30' and now with"):
            init(timeout=31)
    with init("cpu") as other:
        assert other is not context


def test_a_foreign_process_group_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="was not made by torsh_dist"):
            init()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 0.0}, "timeout=0.0 is not a number of seconds"),
        ({"device": "meta"}, "device='meta' is not supported"),
        ({"device": "cuda:99"}, "needs CUDA device 99, found"),
        ({"device": "cpu", "backend": "mpi"}, "backend='mpi' is not one of"),
        ({"device": "cpu", "backend": "nccl"}, "backend='nccl' cannot move CPU tensors"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        init(**arguments)
    assert not dist.is_initialized()


def test_torchrun(script):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(script.parent / "results")]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    results = read(script)
    assert [result[:5] for result in results] == [[0, 2, 0, "gloo", 1.0], [1, 2, 1, "gloo", 1.0]]


def test_slurm_step(script):
    from socket import socket

    with socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = environment(
            SLURM_STEP_NUM_TASKS="2",
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_STEP_NODELIST="localhost",
            SLURM_JOB_ID="7",
            MASTER_PORT=str(port),
        )
        command = [sys.executable, str(script), str(script.parent / "results")]
        ranks.append(subprocess.Popen(command, env=env))
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    expected = [[rank, 2, rank, "gloo", 1.0, "0", "lo"] for rank in range(2)]
    assert read(script) == expected


@pytest.mark.gpu
def test_one_gpu():
    with init() as context:
        assert (context.device, context.backend) == (torch.device("cuda", 0), "nccl")
        total = torch.ones(2, device=context.device)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
