"""Rows of numbers stored for each sample, in float or in eight bits with a scale."""

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

TABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int8)


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes that one row of ``width`` numbers takes, with its scale."""
    return width * dtype.itemsize + (4 if dtype == torch.int8 else 0)


def check_size(
    kind: str,
    num_samples: int,
    widths: Iterable[int],
    dtype: torch.dtype,
    limit: int,
    checked: bool = False,
) -> None:
    """Refuse a table before anything of it is allocated.

    Args:
        kind: ``scalar``, ``factored`` or ``full``, for the message.
        num_samples: Rows of each part of the table.
        widths: Numbers in a row of each part.
        dtype: Element type.
        limit: The most bytes allowed.
        checked: Whether a float64 checksum of the input is kept for each sample.

    Raises:
        ValueError: The table is larger than ``limit``.
    """
    widths = list(widths)
    size = num_samples * (sum(row_bytes(width, dtype) for width in widths) + 8 * checked)
    if size <= limit:
        return
    remedies = {
        "full": "table='factored' (linear layers only), a smaller table_dtype, or fixed "
        "minibatches that share a row",
        "factored": "a smaller table_dtype, or table='scalar' for a single linear layer",
        "scalar": "a smaller table_dtype",
    }
    raise ValueError(
        f"the {kind} table needs {size:,} bytes ({num_samples:,} samples of {sum(widths):,} "
        f"numbers in {dtype}), more than max_table_bytes={limit:,}; raise the limit or use "
        f"{remedies[kind]}; SVRG keeps no table"
    )


def encode(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Round rows to what the table stores.

    Eight-bit rows share one scale, the largest magnitude over 127. Rounding is to nearest: what
    is read back later is exactly ``decode`` of this, so rounding biases no estimate.

    Args:
        values: Rows ``(batch, width)``.
        dtype: One of ``TABLE_DTYPES``.

    Returns:
        Codes ``(batch, width)`` and, for int8, scales ``(batch,)`` in float32.

    Example:
        >>> codes, scale = encode(torch.tensor([[12.7, -0.04, 0.06]]), torch.int8)
        >>> codes
        tensor([[127,   0,   1]], dtype=torch.int8)
        >>> round(scale.item(), 6)
        0.1
    """
    if dtype != torch.int8:
        return values.to(dtype), None
    scale = (values.abs().amax(dim=1, keepdim=True) / 127).to(torch.float32)
    codes = (values / torch.where(scale > 0, scale, 1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale.squeeze(1)


def decode(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Return stored rows in float64, which holds them exactly.

    Args:
        codes: Stored rows ``(batch, width)``.
        scale: Their scales ``(batch,)``, for int8.
    """
    values = codes.to(torch.float64)
    return values if scale is None else values.mul_(scale.to(torch.float64).unsqueeze(1))


def allocate(
    state: MutableMapping[str, Any],
    key: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Create zero rows as ``state[key]``, and for int8 their scales as ``state[key_scale]``.

    Args:
        state: Where the tensors go.
        key: Name of the part of the table.
        shape: ``(num_samples, width)``.
        dtype: One of ``TABLE_DTYPES``.
        device: Where the table lives.
    """
    state[key] = torch.zeros(shape, dtype=dtype, device=device)
    if dtype == torch.int8:
        state[f"{key}_scale"] = torch.zeros(shape[0], dtype=torch.float32, device=device)


def read(state: MutableMapping[str, Any], key: str, index: Tensor) -> Tensor:
    """Return the rows at ``index`` in float64, ``(batch, width)``."""
    scale = state.get(f"{key}_scale")
    return decode(state[key][index], None if scale is None else scale[index])


def write(
    state: MutableMapping[str, Any], key: str, index: Tensor, codes: Tensor, scale: Tensor | None
) -> None:
    """Store encoded rows; ``index`` must not name a row twice."""
    state[key].index_copy_(0, index, codes)
    if scale is not None:
        state[f"{key}_scale"].index_copy_(0, index, scale)


def input_sums(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a number for each input that changes when the input does, and how far it may be off.

    It is a weighted sum in float64, not a hash of the bits: a sample that has passed through fixed
    layers differs in its last bits between batches of other sizes, and must not count as another
    one. Differences up to 1e-12 of the input in float64, 1e-5 in float32 and 1e-2 in half
    precision are taken as rounding.

    Args:
        inputs: ``(batch, features)``.

    Returns:
        Sums and tolerances ``(batch,)``, in float64. A sum is never 0, which stands for an input
        not seen yet.

    Example:
        >>> sums, tolerance = input_sums(torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]]))
        >>> bool((sums[0] - sums[1]).abs() > tolerance[0])
        True
        >>> bool(sums[2] > 0)
        True
    """
    values = inputs.to(torch.float64)
    order = torch.arange(1, values.shape[1] + 1, dtype=torch.float64, device=values.device)
    # between 1 and 2 and without a pattern, so that elements cannot trade places unseen
    weights = 1 + (order * order * 0.6180339887498949).frac()
    sums = values @ weights
    part = {torch.float64: 1e-12, torch.float32: 1e-5}.get(inputs.dtype, 1e-2)
    return torch.where(sums == 0, 2.0**-1000, sums), values.abs() @ weights * part


def check_saved(groups: Iterable[dict[str, Any]], version: int) -> None:
    """Refuse groups of a loaded state that are not those of a SAGA.

    Args:
        groups: ``param_groups`` of the state.
        version: Newest ``torsh_version`` that can be loaded.

    Raises:
        ValueError: Another optimizer saved the groups, or another format of SAGA.
    """
    for group in groups:
        if "num_samples" not in group:
            options = sorted(group.keys() - {"params", "param_names", "torsh_version"})
            raise ValueError(
                "the loaded state is that of another optimizer: its groups have no num_samples, "
                f"but {', '.join(options) or 'nothing'}; load what state_dict() of a SAGA returned"
            )
        found = group.get("torsh_version")
        if found not in range(1, version + 1):
            raise ValueError(
                f"torsh_version={found!r} of the loaded state is not between 1 and {version}: no "
                "SAGA of this torsh-optim saved it"
            )


def fitted(key: str, value: Any, param: Tensor, name: str, options: dict[str, Any]) -> Tensor:
    """Check a loaded part of the table against its parameter and copy it to its device.

    Args:
        key: Name of the part.
        value: What was loaded for it.
        param: The parameter.
        name: How to call the parameter in messages.
        options: ``num_samples``, ``table`` and ``table_dtype`` of the loaded table.

    Raises:
        ValueError: The key is unknown, or shape or type do not fit.
    """
    rows, dtype = options["num_samples"], options["table_dtype"]
    outputs = param.shape[0] if param.dim() else 1
    inputs = param.shape[1] if param.dim() == 2 else 0
    known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "gradient_mean": (tuple(param.shape), torch.float64)
    }
    parts = {
        "scalar": {"output_grad": outputs},
        "factored": {"output_grad": outputs, "input": inputs},
        "full": {"gradient": param.numel()},
    }
    for part, width in parts.get(options["table"], {}).items():
        known[part] = ((rows, width), dtype)
        if dtype == torch.int8:
            known[f"{part}_scale"] = ((rows,), torch.float32)
    if options["table"] == "scalar" and param.dim() == 2:
        known["input_sum"] = ((rows,), torch.float64)
    if key not in known:
        raise ValueError(
            f"{key!r} of {name} does not belong in a {options['table']} table, which has "
            f"{sorted(known)}"
        )
    shape, kind = known[key]
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != kind:
        found = (
            f"{tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else repr(value)
        )
        raise ValueError(
            f"{key!r} of {name} is {found}, not {shape} in {kind}; load a table saved for this "
            "model and data"
        )
    return value.detach().to(param.device, copy=True)
