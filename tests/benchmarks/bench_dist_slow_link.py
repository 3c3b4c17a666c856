"""Wall-clock to the uncompressed run's loss over a slow link: fp32, bf16 hook, Cast and Int8.

Two processes sit in two network namespaces joined by a pair of virtual interfaces; each end is
held to a rate by the kernel's token bucket filter. Needs Linux, root and iproute2 (`ip`, `tc`),
and says so where one is missing. Only the rate is emulated: no delay, no loss.

    python tests/benchmarks/bench_dist_slow_link.py --rates 100mbit 1gbit --json result.json
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import torsh_dist

CONTENDERS = ("fp32", "bf16 hook", "Cast(bfloat16)", "Int8()")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIDTH = 1024
BATCH = 64  # per rank


def missing() -> str | None:
    """Return why the link cannot be built here, or None."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"needs {tool} (iproute2)"
    return None


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class SlowLink:
    """Two namespaces joined by a link of ``rate``; removed on exit."""

    def __init__(self, rate: str) -> None:
        tag = f"torsh{os.getpid()}"
        self.rate = rate
        self.spaces = (f"{tag}a", f"{tag}b")
        self.ends = (f"tv{os.getpid()}a"[-15:], f"tv{os.getpid()}b"[-15:])

    def __enter__(self) -> "SlowLink":
        try:
            for space in self.spaces:
                sh("ip", "netns", "add", space)
            sh("ip", "link", "add", self.ends[0], "netns", self.spaces[0], "type", "veth",
               "peer", "name", self.ends[1], "netns", self.spaces[1])  # fmt: skip
            for space, end, address in zip(self.spaces, self.ends, ADDRESSES, strict=True):
                sh("ip", "-n", space, "addr", "add", f"{address}/24", "dev", end)
                sh("ip", "-n", space, "link", "set", end, "up")
                sh("ip", "-n", space, "link", "set", "lo", "up")
                sh("tc", "-n", space, "qdisc", "add", "dev", end, "root", "tbf",
                   "rate", self.rate, "burst", "256kb", "latency", "200ms")  # fmt: skip
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise SystemExit(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces:  # takes the interfaces with it
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def run(self, *arguments: str) -> list[dict[str, object]]:
        """Run this script as both ranks; return what each wrote."""
        results = [Path(tempfile.mkstemp(suffix=".json")[1]) for _ in self.spaces]
        workers = []
        for rank, (space, end, result) in enumerate(
            zip(self.spaces, self.ends, results, strict=True)
        ):
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": end,
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", space, sys.executable, __file__, *arguments]
            workers.append(subprocess.Popen([*command, "--result", str(result)], env=env))
        try:
            codes = [worker.wait() for worker in workers]
            if any(codes):
                raise SystemExit(f"the ranks exited with {codes}")
            return [json.loads(result.read_text()) for result in results]
        finally:
            for worker in workers:
                worker.kill()
            for result in results:
                result.unlink()


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def wrap(contender: str) -> tuple[DistributedDataParallel, torsh_dist.Compression | None]:
    model = DistributedDataParallel(network())
    if contender == "bf16 hook":
        model.register_comm_hook(None, bf16_compress_hook)
    elif contender == "Cast(bfloat16)":
        return model, torsh_dist.compress(model, torsh_dist.Cast())
    elif contender == "Int8()":
        return model, torsh_dist.compress(model, torsh_dist.Int8())
    return model, None


def goodput(nbytes: int = 1 << 23, repeats: int = 3) -> float:
    """Return the all-reduce goodput in bytes per second and direction."""
    data = torch.zeros(nbytes // 4)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        seconds.append(time.perf_counter() - start)
    return nbytes / statistics.median(seconds)  # 2 (W - 1) / W = 1 for two ranks


def sent_on_wire() -> int:
    end = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{end}/statistics/tx_bytes").read_text())


def train(contender: str, steps: int, target: float | None, rank: int) -> dict[str, object]:
    """Train until the loss over all digits is at ``target``, or for ``steps`` without one."""
    images, labels = digits()
    model, compression = wrap(contender)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    order = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    loss = float("inf")
    before = sent_on_wire()
    for _ in range(steps):
        index = torch.randperm(len(images), generator=order)[: 2 * BATCH][rank::2]
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        with torch.no_grad():  # outside the clock; replicas are equal, so both ranks stop alike
            loss = F.cross_entropy(model.module(images), labels).item()
        if target is not None and loss <= target:
            break
    wire = sent_on_wire() - before
    with model.no_sync():
        alone = []
        for _ in range(10):
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            alone.append(time.perf_counter() - start)
    stats = compression.stats() if compression else None
    return {
        "contender": contender,
        "steps": len(seconds),
        "seconds": sum(seconds),
        "step_ms": 1e3 * statistics.median(seconds[2:]),
        "step_iqr_ms": 1e3 * (quantile(seconds[2:], 0.75) - quantile(seconds[2:], 0.25)),
        "compute_ms": 1e3 * statistics.median(alone),
        "loss": loss,
        "reached": target is None or loss <= target,
        "wire_bytes_per_step": wire / len(seconds),
        "counted_bytes_per_step": stats.bytes_sent / stats.steps if stats else None,
    }


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def worker(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    context = torsh_dist.init("cpu", timeout=300)
    runs: list[dict[str, object]] = []
    measured = []
    target: float | None = None
    for _ in range(arguments.repeats):
        for contender in CONTENDERS:
            measured.append(goodput())
            limit = arguments.steps if contender == "fp32" else 2 * arguments.steps
            runs.append(train(contender, limit, target, context.rank))
            if target is None:
                target = float(str(runs[-1]["loss"]))  # what the first fp32 run ends with
    result = {"target_loss": target, "goodput_mbit": [8e-6 * one for one in measured], "runs": runs}
    context.close()
    Path(arguments.result).write_text(json.dumps(result))


def summary(rate: str, ranks: list[dict[str, object]]) -> dict[str, object]:
    first = json.loads(json.dumps(ranks[0]))
    link = statistics.median(first["goodput_mbit"])
    rows = []
    base = statistics.median(r["seconds"] for r in first["runs"] if r["contender"] == "fp32")
    for contender in CONTENDERS:
        runs = [r for r in first["runs"] if r["contender"] == contender]
        row = {"contender": contender, "reached": all(r["reached"] for r in runs)}
        for key in ("steps", "seconds", "step_ms", "step_iqr_ms", "compute_ms", "loss"):
            row[key] = statistics.median(r[key] for r in runs)
        row["wire_bytes_per_step"] = statistics.median(r["wire_bytes_per_step"] for r in runs)
        row["counted_bytes_per_step"] = runs[0]["counted_bytes_per_step"]
        ideal = row["compute_ms"] + 8e-3 * row["wire_bytes_per_step"] / link
        row["of_limit"] = ideal / row["step_ms"]
        row["speedup"] = base / row["seconds"]
        rows.append(row)
    return {"rate": rate, "goodput_mbit": link, "target_loss": first["target_loss"], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["100mbit"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result:
        worker(arguments)
        return
    if reason := missing():
        print(f"skipped: {reason}")
        return
    parameters = sum(param.numel() for param in network().parameters())
    report = {
        "command": " ".join(["python", "tests/benchmarks/bench_dist_slow_link.py", *sys.argv[1:]]),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "workload": f"MLP of {parameters} parameters on sklearn digits, {BATCH} rows a rank, AdamW",
    }
    print(f"{report['hardware']}; torch {torch.__version__}; {report['workload']}")
    for rate in arguments.rates:
        with SlowLink(rate) as link:
            ranks = link.run("--steps", str(arguments.steps), "--repeats", str(arguments.repeats))
        result = summary(rate, ranks)
        about = f"{rate}, measured {result['goodput_mbit']:.0f} Mbit/s"
        report[f"{about}: time to a loss of {result['target_loss']:.4f}"] = result["rows"]
        print(
            f"\n{rate}: measured {result['goodput_mbit']:.0f} Mbit/s; "
            f"time to a loss of {result['target_loss']:.4f}"
        )
        print(
            f"{'contender':<16}{'steps':>6}{'seconds':>9}{'speed-up':>9}{'ms/step':>9}{'IQR':>7}"
            f"{'compute':>9}{'MB/step':>9}{'of limit':>9}"
        )
        for row in result["rows"]:
            print(
                f"{row['contender']:<16}{row['steps']:>6.0f}{row['seconds']:>9.2f}"
                f"{row['speedup']:>8.2f}x{row['step_ms']:>9.1f}{row['step_iqr_ms']:>7.1f}"
                f"{row['compute_ms']:>9.1f}{1e-6 * row['wire_bytes_per_step']:>9.3f}"
                f"{row['of_limit']:>9.2f}" + ("" if row["reached"] else "  (not reached)")
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
