import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim.foreign_states import same
from torsh_optim._state_file import read_checkpoint, write_checkpoint

CONTENT = {
    "state": {0: {"step": 3, "exp_avg": torch.arange(6.0).view(2, 3)}, 1: {}},
    "param_groups": [
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": float("inf"), "params": [0, 1], "name": None},
        {"lr": torch.tensor(0.5), "fused": True, "params": []},
    ],
}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    content = {
        **CONTENT,
        "kinds": [
            torch.tensor([], dtype=torch.uint8),
            torch.ones(3, 2, dtype=torch.bfloat16).T,
            torch.tensor(True),
        ],
    }
    told: list[int] = []
    write_checkpoint(tmp_path / name, content, progress=told.append)
    assert same(read_checkpoint(tmp_path / name), content)
    assert sum(told) == (tmp_path / name).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_view_does_not_bring_what_it_is_a_view_of(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    write_checkpoint(tmp_path / "a.safetensors", {"part": torch.zeros(10**6)[:2]})
    assert (tmp_path / "a.safetensors").stat().st_size < 10**4


def test_a_mapped_file_is_copied_without_its_rest(tmp_path: Path) -> None:
    torch.save({"large": torch.zeros(10**6), "small": torch.ones(2)}, tmp_path / "a.pt")
    small = read_checkpoint(tmp_path / "a.pt")["small"]
    write_checkpoint(tmp_path / "b.pt", {"small": small})
    assert (tmp_path / "b.pt").stat().st_size < 10**4


def test_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "a.pt"), CONTENT)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    write_checkpoint(path, CONTENT)

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, {"state": torch.zeros(1000)}, progress=fail)
    assert same(read_checkpoint(path), CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pt", CONTENT)
    script = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from torsh_optim._state_file import write_checkpoint\n"
        "kill = lambda n: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_checkpoint(Path(sys.argv[1]), {'x': torch.zeros(10**5)}, progress=kill)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "a.pt"]
    run = subprocess.run(command, env={"PYTHONPATH": "torsh_optim/src"})
    assert run.returncode == -9
    assert same(read_checkpoint(tmp_path / "a.pt"), CONTENT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"b": {1, 2}}}, r"'a\.b' is a set, which only a \.pt file can hold"),
        ({"a": {(1, 2): 3}}, r"a has a key \(1, 2\); keep it in a \.pt file"),
    ],
)
def test_what_safetensors_cannot_hold(tmp_path: Path, content: Any, message: str) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "a.safetensors", content)
    assert list(tmp_path.iterdir()) == []


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _file(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _metadata(**values: str) -> Any:
    def change(data: bytes) -> bytes:
        header, rest = _header(data)
        header["__metadata__"] |= values
        return _file(header, rest)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"'.*' is damaged \(CRC\) or missing"),
        (lambda data: data[:-3], "is damaged, or is no safetensors file"),
        (lambda data: b"", "is damaged, or is no safetensors file"),
        (_metadata(content="[]"), r"the metadata is damaged \(CRC\)"),
        (_metadata(version="9"), "has version '9', this torsh-optim reads 1; update it"),
        (_metadata(format="pt"), "no common layout in safetensors"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, change: Any, message: str) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, CONTENT)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_damaged_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, CONTENT)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.pt is damaged, or is no file of torch\.save"):
        read_checkpoint(path)
