"""The check, at load time, that a model keeps packed rows apart."""

import copy
import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention import ATTENTION, last_states, packed_inputs, packed_path, register_attention
from ._packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_HALF = (torch.float16, torch.bfloat16)
_verdicts: dict[tuple[object, ...], str | None] = {}


def longest_window(backbone: "PreTrainedModel") -> int:
    """Largest sliding window of any layer in tokens; 0 without windows."""
    holders = [backbone.config, *backbone.modules()]  # some layers ask the config
    windows = (getattr(holder, "sliding_window", None) for holder in holders)
    return max((w for w in windows if isinstance(w, int)), default=0)


def attention_dropout(backbone: "PreTrainedModel") -> float:
    """Attention dropout of a model in training; 0 if it has none."""
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    return max(float(getattr(backbone.config, name, None) or 0.0) for name in names)


def check_rows(vocab_size: int, pad_id: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (min(33, longest), min(5, longest), longest, min(17, longest)):
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        rows.append(torch.where(ids == pad_id, (pad_id + 1) % vocab_size, ids).tolist())
    return rows


def disagreement(packed: Tensor, padded: Tensor) -> str | None:
    """Compare token states ``(tokens, dim)`` of both ways; say what is wrong, or None.

    float32 has to agree to 1e-4 of the largest value: rounding stays below 1e-5, a row that sees
    its neighbour is off by more than 5e-3. TensorFloat-32 rounds to 1e-3, hence the other limit.
    Half precision has to agree in direction, as two right bfloat16 kernels round differently.
    """
    if not packed.isfinite().all():
        return "packed rows give NaN or infinity"
    if packed.dtype in _HALF:
        cosine = F.cosine_similarity(packed.float(), padded.float(), dim=-1).mean().item()
        return None if cosine >= 0.999 else f"cosine to the padded result is only {cosine:.4f}"
    rounded = packed.is_cuda and torch.get_float32_matmul_precision() != "highest"
    error = ((packed - padded).abs().max() / padded.abs().max()).item()
    return None if error <= (5e-3 if rounded else 1e-4) else f"packed rows are off by {error:.1e}"


def shallow_copy(backbone: "PreTrainedModel") -> "PreTrainedModel":
    """Return a float32 copy of a model's first layers: two, or enough for each kind of layer.

    What is wrong with a family's packing shows there, without three times the model's memory.
    """
    config = copy.deepcopy(backbone.config)
    text_config = config.get_text_config()
    kinds = getattr(text_config, "layer_types", None) or ["all"]
    layers = max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))
    layers = min(layers, text_config.num_hidden_layers)
    text_config.num_hidden_layers = layers
    if len(kinds) > layers:
        text_config.layer_types = kinds[:layers]
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        small = type(backbone)(config)
    weights = backbone.state_dict()
    with torch.no_grad():
        for name, mine in small.state_dict().items():
            if name in weights and weights[name].shape == mine.shape:
                mine.copy_(weights[name])
    torch.nn.Module.to(small, next(backbone.parameters()).device, torch.float32)
    return small.eval()


@torch.no_grad()
def _compare(backbone: "PreTrainedModel", batch: PackedBatch, pad_id: int) -> str | None:
    device = next(backbone.parameters()).device
    batch = batch.to(device)
    inputs = batch.padded(pad_id)
    backbone.set_attn_implementation("sdpa")
    padded = last_states(backbone, inputs)[inputs["attention_mask"].bool()]
    try:
        backbone.set_attn_implementation(ATTENTION)
        if backbone.config._attn_implementation != ATTENTION:
            return "transformers cannot switch its attention"
        packed = last_states(backbone, packed_inputs(batch))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any model's code runs here; whatever it raises, padding works
        logger.debug("packed self-check", exc_info=True)
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        backbone.set_attn_implementation("sdpa")
    return disagreement(packed, padded)


def adopt_packed_attention(
    backbone: "PreTrainedModel", *, first_position: int, max_length: int, pad_id: int
) -> str | None:
    """Switch a model to packed attention if four ragged random rows come out as when padded.

    One row is longer than every sliding window that ``max_length`` allows to fill. The wiring is
    checked in float32 and, where another kernel runs in the model's own dtype, that kernel too.
    Half-precision models are wired as a float32 copy of their first layers. Verdicts are
    remembered for the process, by configuration, unless memory ran out.

    Returns:
        None if the model now runs packed, else why it must stay padded.
    """
    original = backbone.config._attn_implementation
    if original not in ("sdpa", ATTENTION):
        return f"its attention is {original!r}, not scaled_dot_product_attention"
    register_attention()
    weight = next(backbone.parameters())
    longest = min(max(48, longest_window(backbone) + 17), max_length)
    config = backbone.config
    config_text = config.to_json_string()
    key = (type(backbone), config_text, weight.device.type, weight.dtype, longest, first_position)
    if key not in _verdicts:
        rows = check_rows(config.get_text_config().vocab_size, pad_id, longest)
        batch = PackedBatch.pack(rows, first_position=first_position)
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        try:
            with torch.autocast(weight.device.type, enabled=False):
                exact = shallow_copy(backbone) if weight.dtype in _HALF else backbone
                verdict = _compare(exact, batch, pad_id)
                del exact
                if verdict is None and packed_path(weight.device, weight.dtype).name == "varlen":
                    verdict = _compare(backbone, batch, pad_id)
        except torch.OutOfMemoryError:
            return "memory ran out while packed rows were checked"
        finally:
            backbone.set_attn_implementation("sdpa")
            for module, training in modes:
                module.training = training
        _verdicts[key] = verdict
    if _verdicts[key] is None:
        backbone.set_attn_implementation(ATTENTION)
    return _verdicts[key]
