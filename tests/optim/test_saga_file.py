"""Files of tables: lossless, checked, and whole at every moment."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torsh_optim
from torsh_optim import _saga_file
from torsh_optim._saga_file import read_tensors, write_tensors


def _some_tensors() -> dict[str, Tensor]:
    return {
        "0/output_grad": torch.randn(50, 10),
        "0/gradient_mean": torch.randn(10, 64, dtype=torch.float64),
        "1/output_grad": torch.randn(7, 3).bfloat16(),
        "2/gradient": torch.randint(-127, 128, (9, 5), dtype=torch.int8),
        "2/scalar": torch.tensor(1.5),
        "2/empty": torch.zeros(0, 4),
    }


def _same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.cpu(), theirs[name])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "table.saga"
    tensors = _some_tensors()
    tensors["strided"] = torch.randn(6, 8)[:, ::2].T
    write_tensors(path, tensors, {"num_samples": 50})
    found, facts = read_tensors(path)
    _same(tensors, found)
    assert facts == {"num_samples": 50}
    assert [file.name for file in tmp_path.iterdir()] == ["table.saga"]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(list(_saga_file._DTYPES.values())),
    seed=st.integers(0, 1000),
)
def test_round_trip_of_any_bits(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    path = tmp_path_factory.mktemp("bits") / "table"
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    tensor = bits.view(dtype).reshape(shape)  # NaN payloads and denormal numbers too
    write_tensors(path, {"t": tensor}, {})
    found = read_tensors(path)[0]["t"]
    assert torch.equal(found.view(-1).view(torch.uint8), bits)


def test_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_saga_file, "_CHUNK_BYTES", 1 << 10)
    tensors = {"t": torch.randn(1000, dtype=torch.float64), "u": torch.randn(128)}
    write_tensors(tmp_path / "t", tensors, {})
    _same(tensors, read_tensors(tmp_path / "t")[0])


def test_smooth_numbers_become_small(tmp_path: Path) -> None:
    """Gradients near an optimum share signs and exponents; zlib alone finds little in them."""
    values = 1 + torch.rand(20_000)
    write_tensors(tmp_path / "t", {"t": values}, {})
    plain = len(zlib.compress(bytes(values.view(torch.uint8).tolist()), 6))
    assert (tmp_path / "t").stat().st_size < 0.95 * plain


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t"
    tensors = {"a": torch.randn(10, 3), "b": torch.arange(5).to(torch.int8)}
    write_tensors(path, tensors, {"num_samples": 10})
    good = path.read_bytes()
    seen: set[str] = set()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises(ValueError, match=r"is not a torsh|is damaged \(CRC\)") as error:
            read_tensors(path)
        seen.add(str(error.value).removeprefix(f"{path}"))
    assert seen == {
        " is not a torsh-saga-table file",
        ": the preamble is damaged (CRC); use an older copy",
        ": the index is damaged (CRC); use an older copy",
        ": chunk 0 of 'a' is damaged (CRC); use an older copy",
        ": chunk 0 of 'b' is damaged (CRC); use an older copy",
    }


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.randn(10, 3)}, {})
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"is not a torsh-saga-table|is truncated or not"):
            read_tensors(path)
    path.write_bytes(good + b"x")
    with pytest.raises(ValueError, match="is truncated or not complete"):
        read_tensors(path)


def _forge(path: Path, index: object, chunks: bytes, version: int = 1) -> None:
    """Write a file whose checksums are all right."""
    raw = json.dumps(index).encode()
    fields = struct.pack(
        "<8sIQQI", b"TORSHSGA", version, 36 + len(chunks), len(raw), zlib.crc32(raw)
    )
    path.write_bytes(fields + struct.pack("<I", zlib.crc32(fields)) + chunks + raw)


def _index(shape: list[int], chunks: list[list[int]], **other: object) -> dict[str, object]:
    entry = {"dtype": "float32", "shape": shape, "chunks": chunks}
    return {"format": "torsh-saga-table", "facts": {}, "tensors": {"t": entry}, **other}


def test_sizes_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "t"
    bomb = zlib.compress(bytes(1 << 22), 9)
    crc = zlib.crc32(bomb)
    _forge(path, _index([1 << 20], [[1 << 22, len(bomb), crc]]), bomb)
    assert not read_tensors(path)[0]["t"].any()  # the forgery is right in itself

    for index, message in (
        (_index([1 << 40], [[1 << 22, len(bomb), crc]]), "the chunks of 't' do not make up"),
        (_index([1 << 20], [[1 << 22, 100, 0]]), "100 bytes of 't' cannot hold 4194304"),
        (_index([1 << 20], [[1 << 22, len(bomb) - 1, crc]]), "chunks end at .* the index begins"),
        (_index([-1, -4], [[16, len(bomb), crc]]), "do not make up"),
        (_index([4], [[16, len(bomb), crc]], format="other"), "format 'other'"),
        (_index([4], [[16, len(bomb), crc]], tensors=[1]), "index is not valid"),
        ([], "index is not valid"),
    ):
        _forge(path, index, bomb)
        with pytest.raises(ValueError, match=message):
            read_tensors(path)


def test_chunks_hold_what_the_index_says(tmp_path: Path) -> None:
    path = tmp_path / "t"
    for content, message in (
        (zlib.compress(bytes(20)), "chunk 0 of 't' does not hold 16 bytes"),
        (zlib.compress(bytes(12)), "chunk 0 of 't' does not hold 16 bytes"),
        (zlib.compress(bytes(16)) + b"tail", "chunk 0 of 't' does not hold 16 bytes"),
        (b"no zlib at all..", "chunk 0 of 't' cannot be decompressed"),
    ):
        _forge(path, _index([4], [[16, len(content), zlib.crc32(content)]]), content)
        with pytest.raises(ValueError, match=message):
            read_tensors(path)


def test_a_chunk_is_not_unpacked_beyond_its_size(tmp_path: Path) -> None:
    path = tmp_path / "t"
    content = zlib.compress(bytes(1 << 26), 9)
    _forge(path, _index([4], [[16, len(content), zlib.crc32(content)]]), content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not hold 16 bytes"):
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22  # of 64 MiB


def test_newer_versions_are_refused(tmp_path: Path) -> None:
    _forge(tmp_path / "t", _index([0], []), b"", version=2)
    with pytest.raises(ValueError, match="has version 2, this torsh-optim reads 1"):
        read_tensors(tmp_path / "t")


_WRITER = """
import sys, torch
from pathlib import Path
from torsh_optim._saga_file import write_tensors
torch.set_num_threads(1)
number = 0
while True:
    number += 1
    generator = torch.Generator().manual_seed(number)
    write_tensors(Path(sys.argv[1]), {"t": torch.randn(60_000, generator=generator)}, {"n": number})
    if number == 1:
        print("ready", flush=True)
"""


def test_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    """A child that writes all the time is killed at random moments."""
    path = tmp_path / "table"
    chance = random.Random(0)
    source = str(Path(torsh_optim.__file__).parents[1])
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)],
            env={**os.environ, "PYTHONPATH": source},
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        tensors, facts = read_tensors(path)
        generator = torch.Generator().manual_seed(facts["n"])
        assert torch.equal(tensors["t"], torch.randn(60_000, generator=generator))


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table"
    write_tensors(path, {"t": torch.ones(3)}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_tensors(path, {"t": torch.zeros(3)}, {"bad": object()})
    assert read_tensors(path)[0]["t"].tolist() == [1, 1, 1]
