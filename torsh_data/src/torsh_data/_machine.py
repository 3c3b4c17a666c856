"""What this process may use of the machine: processors, memory, its share among ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for no limit


def ranks_here() -> int:
    """How many ranks of the job share this machine, from LOCAL_WORLD_SIZE."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(value) if value.isdecimal() and int(value) > 0 else 1


def usable_cpus(root: Path = _CGROUPS, own: Path = _OWN) -> float:
    """Processors by the affinity mask and the quotas of control groups (v1 and v2)."""
    cpus = float(len(os.sched_getaffinity(0)))
    for folder in _groups(root, own, "cpu"):
        quota, period = _numbers(folder / "cpu.max") or (None, None)  # v2: "max 100000" is no limit
        if quota is None:
            quota = (_numbers(folder / "cpu.cfs_quota_us") or (None,))[0]
            period = (_numbers(folder / "cpu.cfs_period_us") or (None,))[0]
        if quota and period and quota > 0:
            cpus = min(cpus, quota / period)
    return cpus


def usable_memory(root: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Bytes that can still be taken: of the machine, and of the control groups (v1 and v2)."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for folder in _groups(root, own, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = (_numbers(folder / limit_name) or (None,))[0]
            used = (_numbers(folder / used_name) or (None,))[0]
            if limit is not None and used is not None and limit < _UNLIMITED:
                # What was read from files long ago counts as used and is given up for the asking.
                cached = _statistic(folder / "memory.stat", cache_name)
                free = min(free, limit - max(0, used - cached))
    return max(0, free)


def _groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all that it lies in."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        if controllers and not base.exists():
            base = root / controller
        folder = base / name.lstrip("/")
        if not folder.exists():  # a container sees its own group as the root
            folder = base
        while True:
            yield folder
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _numbers(path: Path) -> tuple[int | None, ...] | None:
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return tuple(int(word) if word.lstrip("-").isdecimal() else None for word in words) or None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
