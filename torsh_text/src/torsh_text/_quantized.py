"""Vectors in a quarter or a thirty-second of the memory."""

import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ._arrays import as_tensor, rows_at_a_time
from ._writing import write_bytes

Quantization = Literal["int8", "binary"]
_FORMAT = "torsh-text-quantized"
_VERSION = "1"


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedVectors:
    """Vectors as small codes: ``int8`` (a quarter of float32) or ``binary`` (a 32nd).

    They are indexed like a tensor: an integer gives one vector, a slice, a list of rows, a tensor
    or an array gives several. :func:`torsh_text.search`, ``similarity``, ``mine_pairs`` and
    ``near_duplicates`` take them as they are; for all else there is :meth:`dequantize`.

    Codes of int8 stand for ``codes * scale``, with the vector's own scale, its largest entry over
    127. So vectors can be added one by one, nothing is ever clipped and no sample of the corpus is
    needed; one scale for each *dimension* (as sentence-transformers has) needs a sample and clips
    what lies outside of it. Binary codes are the signs, 1 for an entry above zero, eight to a
    byte, the first in the highest bit: ``numpy.packbits`` and sentence-transformers' ``"ubinary"``
    write the same bytes.

    Args:
        codes: int8 ``(rows, dim)``, or uint8 ``(rows, ceil(dim / 8))``; for one vector without
            the first axis. Bits beyond ``dim`` are ignored.
        dim: Entries of a vector.
        scales: float32 ``(rows,)`` of int8 codes; None for binary ones.

    Raises:
        ValueError: If the parts do not fit each other.
    """

    codes: Tensor
    dim: int
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        codes, scales = self.codes, self.scales
        if codes.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"codes are {codes.dtype}; expected int8, or uint8 for packed bits")
        width = self.dim if self.kind == "int8" else -(-self.dim // 8)
        if self.dim < 1 or codes.ndim not in (1, 2) or codes.shape[-1] != width:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; {self.kind} codes of dim={self.dim} have"
                f" (rows, {width}) or ({width},)"
            )
        if self.kind == "binary" and scales is not None:
            raise ValueError("scales are given with uint8 codes; binary vectors have none")
        if self.kind == "int8" and (
            scales is None or scales.dtype != torch.float32 or scales.shape != codes.shape[:-1]
        ):
            found = "missing" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
            raise ValueError(f"scales are {found}; expected float32 {tuple(codes.shape[:-1])}")

    @property
    def kind(self) -> Quantization:
        """``"int8"`` or ``"binary"``."""
        return "int8" if self.codes.dtype == torch.int8 else "binary"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, dim)``, or ``(dim,)`` for one vector."""
        return (*self.codes.shape[:-1], self.dim)

    @property
    def ndim(self) -> int:
        """2, or 1 for one vector."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __len__(self) -> int:
        if self.ndim == 1:
            raise TypeError("this is one vector: it has no length; see dim")
        return len(self.codes)

    def __repr__(self) -> str:
        return f"QuantizedVectors({self.kind}, {self.shape}, {self.nbytes:,} bytes)"

    def __getitem__(
        self, rows: int | slice | Sequence[int] | Tensor | np.ndarray
    ) -> "QuantizedVectors":
        if self.ndim == 1 or isinstance(rows, tuple):
            raise TypeError("only the rows of several vectors can be indexed; see dequantize()")
        index: int | slice | Tensor
        if isinstance(rows, slice):
            index = rows
        elif isinstance(rows, Sequence) or (isinstance(rows, Tensor | np.ndarray) and rows.ndim):
            index = torch.as_tensor(rows, dtype=None if len(rows) else torch.int64)
        else:
            index = operator.index(rows)
        scales = None if self.scales is None else self.scales[index]
        return replace(self, codes=self.codes[index], scales=scales)

    def __iter__(self) -> Iterator["QuantizedVectors"]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            "QuantizedVectors would become many times as large as an array; ask for it with"
            " .dequantize().numpy(), or take .codes"
        )

    def to(self, device: torch.device | str) -> "QuantizedVectors":
        """Return the same on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, codes=self.codes.to(device), scales=scales)

    def dequantize(self) -> Tensor:
        """Return float32 vectors ``(rows, dim)``: codes times scale, or -1 and 1."""
        values = _values(self)
        return values if self.scales is None else values.mul_(self.scales.unsqueeze(-1))

    @staticmethod
    def cat(parts: Iterable["QuantizedVectors"]) -> "QuantizedVectors":
        """Put the rows of several into one.

        Args:
            parts: At least one; of one kind, one ``dim`` and on one device.

        Raises:
            ValueError: If there is none, or they differ.
        """
        parts = list(parts)
        kinds = sorted({f"{part.kind} of {part.dim}" for part in parts})
        if len(kinds) != 1 or any(part.ndim == 1 for part in parts):
            found = "one vector without rows" if len(kinds) == 1 else " and ".join(kinds) or "none"
            raise ValueError(f"parts are {found}; pass (rows, dim) of one kind and one dim")
        scales = [part.scales for part in parts if part.scales is not None]
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat(scales) if scales else None,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in one step; :meth:`load` reads it.

        Its tensors are ``codes`` and, for int8, ``scales``; the metadata holds the format's name
        and version, ``dim`` and the BLAKE2b sum of all these.
        """
        from safetensors.torch import save

        tensors = {"codes": self.codes.cpu().contiguous()}
        if self.scales is not None:
            tensors["scales"] = self.scales.cpu().contiguous()
        description = {
            "format": _FORMAT,
            "version": _VERSION,
            "dim": str(self.dim),
        }
        description["blake2b"] = _checksum(tensors, description)
        write_bytes(Path(path), save(tensors, metadata=description))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "QuantizedVectors":
        """Read a file that :meth:`save` wrote, to the CPU.

        Raises:
            ValueError: If the file is of another kind, of a later version, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}; the file is damaged or no safetensors") from error
        if about.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no quantized vectors; QuantizedVectors.save writes them"
            )
        if about.get("version") != _VERSION:
            raise ValueError(
                f"{path} has version {about.get('version')}; this torsh_text reads {_VERSION}"
            )
        if _checksum(tensors, about) != about.get("blake2b"):
            raise ValueError(f"{path}: blake2b does not match; the file is damaged")
        return QuantizedVectors(tensors["codes"], int(about["dim"]), tensors.get("scales"))


def _checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    total = hashlib.blake2b(digest_size=16)
    shapes = {name: (str(x.dtype), *x.shape) for name, x in tensors.items()}
    words = {name: word for name, word in about.items() if name != "blake2b"}
    total.update(json.dumps([words, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(tensors[name].numpy().data)
    return total.hexdigest()


@cache
def _signs(device: torch.device) -> Tensor:
    """The eight signs of every byte, the highest bit first: ``(256, 8)``."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(7, -1, -1) & 1
    return (2 * bits - 1).to(device, torch.float32)


def _values(x: QuantizedVectors) -> Tensor:
    """Codes as float32 ``(..., dim)``, without the scales; new memory."""
    if x.kind == "int8":
        return x.codes.to(torch.float32)
    signs = _signs(x.device)
    if x.device.type == "cpu":  # numpy's take is twice as fast as torch's
        eights = torch.from_numpy(np.take(signs.numpy(), x.codes.numpy(), axis=0))
    else:
        eights = signs[x.codes.int()]
    return eights.flatten(-2)[..., : x.dim]


def values_and_factors(x: QuantizedVectors, metric: str) -> tuple[Tensor, Tensor]:
    """Split rows into whole numbers and what their products are to be multiplied by.

    Products of whole numbers are exact in float32 (of two int8 vectors up to 1,040 entries), so
    that equal codes get equal scores; the codes need no pass that scales them.

    Args:
        x: Several vectors.
        metric: ``"cosine"`` or ``"dot"``.

    Returns:
        Float32 values ``(rows, dim)`` and factors ``(rows,)``, such that ``factors * values`` are
        the vectors, of length one (or 0) for ``"cosine"``.
    """
    values = _values(x)
    if x.kind == "binary":
        factor = 1 / math.sqrt(x.dim) if metric == "cosine" else 1.0
        return values, torch.full((len(values),), factor, device=values.device)
    assert x.scales is not None
    if metric == "dot":
        return values, x.scales
    lengths = torch.linalg.vector_norm(values, dim=1).mul_(x.scales)
    return values, x.scales / lengths.clamp_min_(1e-12)  # as F.normalize has it


def sign_products(a: QuantizedVectors, b: QuantizedVectors) -> Tensor:
    """Products of binary vectors on the CPU: ``dim - 2 * (bits that differ)``, by counting bits.

    Args:
        a: Few vectors.
        b: Many.

    Returns:
        Whole numbers in float32 ``(a, b)``, those of ``a.dequantize() @ b.dequantize().T``.
    """
    differ = np.bitwise_xor(a.codes.numpy()[:, None], b.codes.numpy())
    if a.dim % 8:
        differ[..., -1] &= 0xFF << (8 - a.dim % 8) & 0xFF
    words = differ.view(np.uint64) if differ.shape[-1] % 8 == 0 else differ
    return a.dim - 2.0 * torch.from_numpy(np.bitwise_count(words)).sum(-1)


@torch.no_grad()
def quantize(vectors: Tensor | np.ndarray, to: Quantization) -> QuantizedVectors:
    """Make vectors small: ``"int8"`` takes a quarter of float32, ``"binary"`` a 32nd.

    Works on blocks of rows, so a memory-mapped array may be larger than the memory. See
    :class:`QuantizedVectors` for what the codes are.

    Args:
        vectors: ``(rows, dim)`` or ``(dim,)``, a tensor or a numpy array, in any precision.
        to: ``"int8"``: an entry moves by at most 1/254 of the largest of its vector. ``"binary"``:
            only signs are left; for candidates that are ranked again by finer vectors, see
            ``rescore`` of :func:`torsh_text.search`.

    Returns:
        The codes, on the device of ``vectors``.

    Raises:
        TypeError: If ``vectors`` is neither a tensor nor an array of numbers.
        ValueError: If a vector is not finite in float32, or an option does not fit.

    Example:
        >>> small = quantize(torch.tensor([[0.5, -1.27, 0.004, 0.006]]), "int8")
        >>> small.codes.tolist(), small.nbytes
        ([[50, -127, 0, 1]], 8)
        >>> quantize(torch.tensor([[0.5, -1.27, 0.0, 0.006]]), "binary").codes.tolist()  # 1001
        [[144]]
    """
    x = as_tensor(vectors, "vectors")
    if x.ndim not in (1, 2) or not x.shape[-1]:
        raise ValueError(f"vectors has shape {tuple(x.shape)}; expected (rows, dim) or (dim,)")
    if x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"vectors holds {x.dtype}; pass floats, such as float32")
    if to not in ("int8", "binary"):
        raise ValueError(f"to={to!r} is neither 'int8' nor 'binary'")
    several = torch.atleast_2d(x)
    rows, dim = several.shape
    block = rows_at_a_time(dim, x.device)
    int8 = to == "int8"
    codes = torch.empty(
        rows,
        dim if int8 else -(-dim // 8),
        dtype=torch.int8 if int8 else torch.uint8,
        device=x.device,
    )
    scales = torch.empty(rows, device=x.device) if int8 else None
    bits = 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=x.device)
    for start in range(0, rows, block):
        part = several[start : start + block].float()
        finite = part.isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(f"vectors[{start + int((~finite).nonzero()[0])}] is not finite")
        here = slice(start, start + len(part))
        if scales is None:
            positive = torch.nn.functional.pad((part > 0).to(torch.uint8), (0, -dim % 8))
            codes[here] = (positive.unflatten(1, (-1, 8)) * bits).sum(-1, dtype=torch.uint8)
        else:
            # by a tensor: CUDA multiplies by the inverse of a number
            scale = part.abs().amax(1) / part.new_tensor(127.0)
            scales[here] = scale
            steps = torch.where(scale > 0, scale, 1).unsqueeze(1)
            codes[here] = (part / steps).round().clamp(-127, 127).to(torch.int8)
    if x.ndim == 1:
        return QuantizedVectors(codes[0], dim, None if scales is None else scales[0])
    return QuantizedVectors(codes, dim, scales)
