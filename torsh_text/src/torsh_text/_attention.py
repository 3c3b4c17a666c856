"""Attention over packed rows, plugged into transformers, and the check that a model obeys it."""

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "torsh_packed"
_HALF = (torch.float16, torch.bfloat16)


class AttentionPath(NamedTuple):
    """Which attention runs, and why."""

    name: Literal["varlen", "grouped", "padded"]
    why: str


def varlen_options() -> frozenset[str]:
    """Keyword options of this torch's ``varlen_attn``; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def _flash_capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def packed_path(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    dropout: float = 0.0,
    windowed: bool = False,
) -> AttentionPath:
    """Say which packed attention runs for tensors of this device, dtype and head size."""
    if device.type != "cuda":
        return AttentionPath(
            "grouped", f"rows of equal length share one SDPA call on {device.type}"
        )
    options = varlen_options()
    if not options:
        why = "this torch has no torch.nn.attention.varlen (torch 2.11 and later do)"
    elif dtype not in _HALF:
        why = f"variable-length kernels need float16 or bfloat16, not {dtype}; pass dtype='auto'"
    elif not _flash_capable(device):
        why = "variable-length kernels need compute capability 8.0 or later"
    elif head_dim % 8 or head_dim > 256:
        why = f"variable-length kernels need a head size divisible by 8 up to 256, not {head_dim}"
    elif dropout:
        why = (
            f"variable-length kernels have no attention dropout (this model trains with {dropout})"
        )
    elif windowed and "window_size" not in options:
        why = "varlen_attn of this torch has no window_size; upgrade torch for sliding windows"
    else:
        return AttentionPath("varlen", "torch.nn.attention.varlen on the packed rows")
    return AttentionPath("grouped", why)


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedBatch,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    """Attend with one kernel over all rows; query ``(tokens, heads, head_dim)``."""
    from torch.nn.attention.varlen import varlen_attn

    options = varlen_options()
    arguments: dict[str, Any] = {"scale": scale}
    if "window_size" in options:
        arguments["window_size"] = window
    else:
        arguments["is_causal"] = causal
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in options:
            arguments["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
    cu_seqlens, longest = packed.cu_seqlens, packed.max_length
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **arguments)
    return cast("Tensor", out)


def _window_mask(length: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    """Boolean ``(length, length)``, True where a query may look; None where it sees all."""
    left, right = window
    if (left < 0 or left >= length - 1) and (right < 0 or right >= length - 1):
        return None
    distance = torch.arange(length, device=device)
    distance = distance - distance.unsqueeze(1)
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def _grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedBatch,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    dropout: float,
) -> Tensor:
    """Attend with one SDPA call for each run of equally long rows: the slow, plain twin."""
    outputs = []
    start = 0
    gqa = query.shape[1] != key.shape[1]
    for rows, length in packed.runs:
        stop = start + rows * length
        q, k, v = (
            x[start:stop].unflatten(0, (rows, length)).transpose(1, 2) for x in (query, key, value)
        )
        plain_causal = causal and (window[0] < 0 or window[0] >= length - 1)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain_causal else _window_mask(length, window, query.device),
            dropout_p=dropout,
            is_causal=plain_causal,
            scale=scale,
            enable_gqa=gqa,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed: PackedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with transformers; rows never see each other.

    Without ``packed`` this is the SDPA attention of transformers, so the same model runs padded
    and packed batches without switching anything.

    Args:
        module: The attention layer that calls.
        query: ``(1, heads, tokens, head_dim)`` if packed.
        key: ``(1, key_heads, tokens, head_dim)``; ``key_heads`` divides ``heads``.
        value: As ``key``.
        attention_mask: Mask of a padded batch; ignored if packed.
        dropout: Probability with which attention weights are dropped.
        scaling: Factor of the scores; None for ``head_dim ** -0.5``.
        sliding_window: How many tokens a query sees to each side, itself included.
        is_causal: Whether a token sees only itself and earlier ones; None to ask ``module``.
        packed: The batch, passed through the model as a keyword.
        **kwargs: Whatever else the model passes on.
    """
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"its attention uses {name}, which packed attention has not")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    side = -1 if sliding_window is None else sliding_window - 1
    window = (side, 0 if causal else side)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    path = packed_path(
        q.device,
        q.dtype,
        head_dim=max(q.shape[-1], v.shape[-1]),
        dropout=dropout,
        windowed=sliding_window is not None,
    )
    if path.name == "varlen" and q.shape[-1] == v.shape[-1]:
        out = _varlen_attention(q, k, v, packed, scaling, causal, window)
    else:
        out = _grouped_attention(q, k, v, packed, scaling, causal, window, dropout)
    return out.unsqueeze(0), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function registered with transformers: none for packed rows, SDPA's otherwise.

    A packed batch carries its row ends, so it passes a one-wide mask (:func:`packed_inputs`): no
    other mask without a cache is narrower than its queries.
    """
    from transformers.masking_utils import sdpa_mask

    bound = inspect.signature(sdpa_mask).bind_partial(*args, **kwargs).arguments
    if bound["kv_length"] < bound["q_length"]:
        return None
    return sdpa_mask(*args, **kwargs)


@functools.cache
def register_attention() -> None:
    """Make the packed attention known to transformers; does nothing the second time."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, _mask)


_PARAMETERS: dict[type[nn.Module], frozenset[str]] = {}


def _forward_parameters(model_type: type[nn.Module]) -> frozenset[str]:
    if model_type not in _PARAMETERS:  # torch.compile warns of functools.cache
        _PARAMETERS[model_type] = frozenset(inspect.signature(model_type.forward).parameters)
    return _PARAMETERS[model_type]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keywords with which a transformers model runs a packed batch."""
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids.long(),  # some models gather with them
        "attention_mask": torch.ones(1, 1, dtype=torch.bool, device=batch.device),
        "packed": batch,
    }
    if (types := batch.token_type_ids) is not None:
        inputs["token_type_ids"] = types.long()
    return inputs


def positioned(
    model: nn.Module, inputs: Mapping[str, Tensor], first_position: int
) -> dict[str, Tensor]:
    """Add each token's position, counted by the mask, so that padding may be on either side.

    A model that takes no positions gets none: it counts by the mask itself, or not at all.

    Args:
        model: What will be called with the inputs.
        inputs: ``input_ids`` and, unless nothing is padded, ``attention_mask``.
        first_position: Position of a row's first token.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, attention_mask, position_ids): ...
        >>> mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        >>> inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
        >>> positioned(Model(), inputs, 0)["position_ids"].tolist()
        [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    mask = inputs.get("attention_mask")
    if (
        mask is None
        or "position_ids" in inputs
        or "position_ids" not in _forward_parameters(type(model))
    ):
        return dict(inputs)
    positions = ((mask != 0).cumsum(1) - 1).clamp_min(0) + first_position
    return {**inputs, "position_ids": positions}


def left_aligned(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move padding behind the tokens of each row.

    Args:
        inputs: Tensors ``(rows, length)``, among them ``attention_mask`` unless nothing is padded.

    Example:
        >>> inputs = {"input_ids": torch.tensor([[0, 0, 7, 8], [5, 6, 7, 0]])}
        >>> left_aligned({**inputs, "attention_mask": inputs["input_ids"] != 0})["input_ids"]
        tensor([[7, 8, 0, 0],
                [5, 6, 7, 0]])
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(inputs)
    order = (mask == 0).byte().argsort(dim=1, stable=True)
    return {name: values.gather(1, order) for name, values in inputs.items()}


def last_states(backbone: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    """Run a transformers model without a cache of keys: ``(rows, length, hidden)``."""
    if "use_cache" in _forward_parameters(type(backbone)):
        inputs = {**inputs, "use_cache": False}
    return backbone(**inputs).last_hidden_state
