"""Heads of token classification models: loading them, and whether they take packed rows."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._attention import packed_inputs
from ._backbone import read_layout
from ._heads import load_headed
from ._packing import PackedBatch
from ._selfcheck import disagreement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def label_names(config: Any) -> list[str]:
    """Names of a model's outputs, in their order."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def load_token_model(
    folder: Path,
    *,
    labels: Sequence[str] | None,
    seed: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> "tuple[PreTrainedModel, Any, bool]":
    """Load a model and its tokenizer on the CPU, in eval mode.

    Weights come from safetensors, or from a ``.bin`` file read with ``weights_only=True``.

    Args:
        folder: Folder of transformers, or of sentence-transformers (whose pooling is left out).
        labels: Names of the tags; None for the folder's. A head with other tags is made anew.
        seed: Decides the weights of a fresh head.
        dtype: Of the weights.
        trust_remote_code: Let the model's own code run on this machine.

    Returns:
        The model, the tokenizer, and whether the head is fresh.

    Raises:
        ValueError: If weights are missing, or there is no head and ``labels`` is None.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    folder = read_layout(folder).transformer
    model, fresh = load_headed(
        AutoModelForTokenClassification,
        folder,
        labels=labels,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model, tokenizer, fresh


@torch.no_grad()
def check_token_head(
    model: "PreTrainedModel", *, pad_id: int, first_position: int, longest: int
) -> str | None:
    """Say what is wrong if the head does not see packed rows as it sees padded ones."""
    size = model.config.get_text_config().vocab_size
    rows = [[(7 * i + 5) % size for i in range(min(n, longest))] for n in (9, 3, 9)]
    batch = PackedBatch.pack(rows, first_position=first_position)
    batch = batch.to(model.device)
    inputs = batch.padded(pad_id)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        apart = model(**inputs).logits.float()[inputs["attention_mask"].bool()]
        together = model(**packed_inputs(batch)).logits.float()[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any model's code runs here; whatever it raises, padding works
        logger.debug("head check", exc_info=True)
        why = (str(error).splitlines() or [""])[0][:200]
        return f"its head does not take packed rows ({type(error).__name__}: {why})"
    finally:
        for module, training in modes:
            module.training = training
    why = disagreement(together, apart)
    return None if why is None else f"its head does not hand the rows on ({why})"
