"""Heads of sequence classifiers, fed with the states of packed rows."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import last_states
from ._backbone import quiet_loading
from ._packing import PackedBatch
from ._pooling import pool_packed
from ._selfcheck import check_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class MissingHeadError(ValueError):
    """Weights without the head that was asked for; ``lack`` says it without the remedy."""

    def __init__(self, lack: str, remedy: str) -> None:
        super().__init__(f"{lack}. {remedy}")
        self.lack = lack


@dataclass(frozen=True)
class Head:
    """How a classifier of transformers comes from token states to logits.

    Attributes:
        reads: Which state of a row the head reads: that of the first or the last token, or the
            mean.
        logits: The layers of the head, from that state ``(rows, hidden)`` to ``(rows, labels)``.
    """

    reads: Literal["first", "last", "mean"]
    logits: Callable[[Tensor], Tensor]


def find_head(model: "PreTrainedModel") -> Head | None:
    """Recognise the head of a classifier by its layers; None for one that is not known.

    Known are those of BERT (pooler and classifier) and its relatives, RoBERTa and ELECTRA (a
    classification head of its own), DistilBERT, ModernBERT and the causal models (``score``). A
    family that looks the same and computes something else is found out by :func:`check_head`.
    """
    layers: dict[str, Any] = dict(model.named_children())
    classifier = layers.get("classifier")
    pooler = getattr(model.base_model, "pooler", None)
    if isinstance(layers.get("score"), nn.Linear):
        return Head("last", layers["score"])
    if classifier is None:
        return None
    if "pre_classifier" in layers:
        before, dropout = layers["pre_classifier"], layers["dropout"]
        return Head("first", lambda x: classifier(dropout(F.relu(before(x)))))
    if "head" in layers and "drop" in layers:
        reads = "mean" if model.config.classifier_pooling == "mean" else "first"
        head, dropout = layers["head"], layers["drop"]
        return Head(reads, lambda x: classifier(dropout(head(x))))
    if not isinstance(classifier, nn.Linear):
        return Head("first", lambda x: classifier(x.unsqueeze(1)))
    if pooler is None:
        return None
    dropout = layers.get("dropout", nn.Identity())
    if isinstance(pooler, nn.Linear):  # ALBERT
        activation: Any = model.base_model.pooler_activation
        return Head("first", lambda x: classifier(dropout(activation(pooler(x)))))
    return Head("first", lambda x: classifier(dropout(pooler(x.unsqueeze(1)))))


def _last_tokens(batch: PackedBatch, pad_id: int | None) -> Tensor:
    """Index of each row's last token that is no padding token, as transformers looks for it."""
    offsets = batch.cu_seqlens.long()
    starts = offsets[:-1]
    if pad_id is None:
        return offsets[1:] - 1
    place = torch.arange(batch.num_tokens, device=batch.device)
    row_starts = torch.repeat_interleave(starts, offsets.diff(), output_size=batch.num_tokens)
    rows = torch.repeat_interleave(
        torch.arange(len(batch), device=batch.device), offsets.diff(), output_size=batch.num_tokens
    )
    candidates = torch.where(batch.input_ids[0] == pad_id, row_starts, place)
    return starts.scatter_reduce(0, rows, candidates, "amax")


def head_logits(head: Head, states: Tensor, batch: PackedBatch, pad_id: int | None) -> Tensor:
    """Logits ``(rows, labels)`` from the token states of a packed batch; gradients flow.

    Args:
        head: What :func:`find_head` found.
        states: ``(tokens, hidden)``.
        batch: The rows.
        pad_id: Padding token of the model's configuration.
    """
    if head.reads == "mean":
        pooled = pool_packed(states, batch.cu_seqlens, ("mean",)).to(states.dtype)
    elif head.reads == "first":
        pooled = states[batch.cu_seqlens[:-1].long()]
    else:
        pooled = states[_last_tokens(batch, pad_id)]
    return head.logits(pooled)


@torch.no_grad()
def check_head(
    model: "PreTrainedModel", head: Head | None, *, pad_id: int, first_position: int, longest: int
) -> str | None:
    """Compare a head fed from packed states with the classifier of transformers.

    Four ragged random rows run through the padded model; then the states that its backbone gave
    for the real tokens run through the head. The same numbers in another order: float32 has to
    agree to 1e-4 of the largest logit, half precision to 2e-2.

    Returns:
        None if they agree, else what is wrong.
    """
    if head is None:
        return f"the head of {type(model).__name__} is not one that reads packed rows"
    vocab_size: int = model.config.get_text_config().vocab_size
    rows = check_rows(vocab_size, pad_id, min(48, longest))
    batch = PackedBatch.pack(rows, first_position=first_position).to(model.device)
    inputs = batch.padded(pad_id)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            expected = model(**inputs).logits.float()
            backbone = cast("PreTrainedModel", model.base_model)
            states = last_states(backbone, inputs)[inputs["attention_mask"].bool()]
            found = head_logits(head, states, batch, pad_id).float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any model's code runs here; whatever it raises, padding works
        logger.debug("head check", exc_info=True)
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        for module, training in modes:
            module.training = training
    if found.shape != expected.shape:
        return f"the head gives {tuple(found.shape)}, the model {tuple(expected.shape)}"
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()
    limit = 1e-4 if model.dtype == torch.float32 else 2e-2
    if model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        limit = max(limit, 5e-3)
    return None if error <= limit else f"logits from packed rows are off by {error:.1e}"


def _renew_head(model: "PreTrainedModel") -> None:
    """Draw all weights outside the transformer anew."""
    for layer in model.children():
        if layer is not model.base_model:
            for module in layer.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()


_LABELLED = {"Classifier": "whole texts", "Tagger": "each token"}


def _other_head(config: Any, auto: Any) -> str | None:
    """Return the class whose weights these are, if it has a head of another kind than ``auto``."""
    kinds = ("ForSequenceClassification", "ForTokenClassification")
    wanted = auto.__name__.removeprefix("AutoModel")
    for name in config.architectures or ():
        if name.endswith(kinds) and not name.endswith(wanted):
            return name
    return None


def load_headed(
    auto: Any,
    folder: Path,
    *,
    labels: Sequence[str] | None,
    seed: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> "tuple[PreTrainedModel, bool]":
    """Load a transformer and its head on the CPU, in eval mode; with ``labels``, maybe a new head.

    The head that the weights hold is kept if it is of this kind and has as many labels and these
    names, or only placeholders (``LABEL_0``).

    Args:
        auto: Class of transformers that loads it, such as ``AutoModelForTokenClassification``.
        folder: Folder of transformers.
        labels: Names of the outputs; None for the folder's.
        seed: Decides the weights of a new head.
        dtype: Of the weights.
        trust_remote_code: Let the model's own code run on this machine.

    Returns:
        The model, and whether its head is new.

    Raises:
        ValueError: If weights are missing.
        MissingHeadError: If there is no head, or one of another kind, and ``labels`` is None.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    other = _other_head(config, auto)
    if other is not None and labels is None:
        owner = "Tagger" if other.endswith("ForTokenClassification") else "Classifier"
        raise MissingHeadError(
            f"{folder} holds a {other}, which labels {_LABELLED[owner]}",
            f"Load it with {owner}.from_pretrained, or pass labels=[...] to train a new head on its"
            " transformer",
        )
    kept = True
    old: list[str] = []
    if labels is not None:
        old = [str(config.id2label[i]) for i in range(config.num_labels)]
        unnamed = old == [f"LABEL_{i}" for i in range(len(labels))]
        kept = other is None and (unnamed or old == list(labels))
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    # without reports: what is missing is said below, or shall be new
    with quiet_loading(reports=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,  # not .to(dtype): that would round rotary tables too
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
        missing = sorted(report["missing_keys"])
        if not kept and (other is not None or not missing):
            _renew_head(model)
    inside = f"{model.base_model_prefix}."
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    lost = [key for key in (*missing, *mismatched) if key.startswith(inside)]
    lost = [key for key in lost if "pooler." not in key]
    if lost or (missing and labels is None):
        lack = (
            f"the weights in {folder} lack {len(lost or missing)} tensors of"
            f" {type(model).__name__} (first: {(lost or missing)[0]!r}); they would be random"
        )
        if lost:
            raise ValueError(f"{lack}. Save it with its weights")
        raise MissingHeadError(lack, "Pass labels=[...] to train a new head")
    if not kept and not missing and other is None:
        warnings.warn(
            f"{folder} has a head for {old}; for labels={list(labels or ())} it got a new one, to"
            " be trained. Leave labels out to use the head that is there",
            stacklevel=4,
        )
    return model.eval(), bool(missing) or not kept


def load_classifier(
    folder: Path,
    *,
    labels: list[str] | None,
    multi_label: bool,
    seed: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> "PreTrainedModel":
    """Load a sequence classifier as :func:`load_headed` does.

    A head that is kept stays single- or multi-label as it was trained, unless ``multi_label``.
    """
    from transformers import AutoModelForSequenceClassification

    model, fresh = load_headed(
        AutoModelForSequenceClassification,
        folder,
        labels=labels,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if labels is not None and (fresh or multi_label):
        model.config.problem_type = (
            "multi_label_classification" if multi_label else "single_label_classification"
        )
    return model
