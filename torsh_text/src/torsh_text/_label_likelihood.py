"""How likely a causal language model finds each label behind each prompt."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._runtime import Budget, run_batches

_LOGIT_BYTES = 2**30


def likelihoods_one_by_one(
    model: Any, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> Tensor:
    """Mean log-probability of each label's tokens, one model call for each prompt and label.

    Args:
        model: A causal language model of transformers.
        prompts: Token ids of each prompt.
        labels: Token ids of each label.

    Returns:
        float32 ``(prompts, labels)``.
    """
    found = torch.empty(len(prompts), len(labels))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            ids = torch.tensor([[*prompt, *label]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            targets = ids[0, len(prompt) :].unsqueeze(1)
            found[row, column] = logits.log_softmax(-1).gather(1, targets).mean()
    return found


def _branches(labels: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Layout of all labels laid end to end behind a prompt.

    ``sees`` is the square mask among label tokens, ``depth`` their distance from the prompt's end,
    ``before`` the place that predicts them (0: the prompt's last token) and ``label`` whose they
    are.
    """
    lengths = torch.tensor([len(label) for label in labels])
    owner = torch.repeat_interleave(torch.arange(len(labels)), lengths)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    place = torch.arange(len(owner))
    return {
        "ids": torch.tensor([i for label in labels for i in label], device=device),
        "sees": ((owner.unsqueeze(0) == owner.unsqueeze(1)).tril()).to(device),
        "depth": (place - starts).to(device),
        "before": torch.where(place == starts, 0, place).to(device),
        "label": owner.to(device),
        "length": lengths.to(device),
    }


def _tree_batch(
    prompts: Sequence[Sequence[int]], branches: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Prompts padded on the left, the labels behind each, and who sees whom."""
    device = branches["ids"].device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest, behind = int(lengths.max()), len(branches["ids"])
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    pads = (longest - lengths).unsqueeze(1)
    real = (torch.arange(longest) >= pads).to(device)
    positions = (torch.arange(longest) - pads).clamp_min(0).to(device)
    total = longest + behind
    sees = torch.zeros(len(prompts), total, total, dtype=torch.bool, device=device)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    sees[:, :longest, :longest] = causal & real.unsqueeze(1)
    sees[:, longest:, :longest] = real.unsqueeze(1)
    sees[:, longest:, longest:] = branches["sees"]
    mask = torch.zeros(sees.shape, dtype=dtype, device=device)
    mask.masked_fill_(~sees, torch.finfo(dtype).min)
    return {
        "input_ids": torch.cat(
            [ids.to(device), branches["ids"].expand(len(prompts), behind)], dim=1
        ),
        "position_ids": torch.cat(
            [positions, lengths.to(device).unsqueeze(1) + branches["depth"]], dim=1
        ),
        "attention_mask": mask.unsqueeze(1),
    }


def likelihoods_as_tree(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    budget: Budget,
) -> Tensor:
    """As :func:`likelihoods_one_by_one`, with each prompt computed once.

    A prompt and all labels are one row: each label sees the prompt and itself, but no other label,
    through a mask of our own. Rows are batched, and logits computed for the labels only.

    Args:
        model: A causal language model of transformers whose attention takes a mask of four axes.
        prompts: Token ids of each prompt.
        labels: Token ids of each label.
        budget: Limits of a batch; changed in place when memory runs out.

    Returns:
        float32 ``(prompts, labels)`` on the CPU.
    """
    branches = _branches(labels, model.device)
    behind = len(branches["ids"])
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = behind + 1
    found = torch.empty(len(prompts), len(labels))
    vocabulary = model.config.get_text_config().vocab_size
    budget.max_rows = min(budget.max_rows, max(1, _LOGIT_BYTES // (8 * (behind + 1) * vocabulary)))

    def compute(indices: np.ndarray) -> None:
        chosen = indices.tolist()
        batch = _tree_batch([prompts[i] for i in chosen], branches, model.dtype)
        logits = model(**batch, **options).logits[:, -behind - 1 :].float()
        # normalised where they predict, not for each label token anew
        logs = logits - logits.logsumexp(-1, keepdim=True)
        tokens = logs[:, branches["before"], branches["ids"]]
        sums = torch.zeros(len(chosen), len(labels), device=tokens.device)
        sums.index_add_(1, branches["label"], tokens)
        found[chosen] = (sums / branches["length"]).cpu()

    costs = np.array([len(prompt) + behind for prompt in prompts], dtype=np.int64)
    run_batches(costs, compute, budget=budget, device=model.device, padded=True)
    return found


def label_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    budget: Budget,
) -> Tensor:
    """As a tree where the row fits the model's sliding window, else one by one."""
    holders = [model.config, *model.modules()]
    windows = (getattr(holder, "sliding_window", None) for holder in holders)
    window = min((w for w in windows if isinstance(w, int) and w > 0), default=10**9)
    behind = max(map(len, labels))
    found = torch.empty(len(prompts), len(labels))
    for fits in (True, False):
        chosen = [i for i, p in enumerate(prompts) if (len(p) + behind <= window) == fits]
        some = [prompts[i] for i in chosen]
        if fits and some:
            found[chosen] = likelihoods_as_tree(model, some, labels, budget=budget)
        elif some:
            found[chosen] = likelihoods_one_by_one(model, some, labels)
    return found


@torch.no_grad()
def check_tree(model: Any) -> str | None:
    """Compare both ways on random ids; None if they agree, else what is wrong.

    Log-probabilities have to agree to 1e-3 in
    float32 (rounding stays below 1e-4, a label that sees another is off by far more); in half
    precision to 0.1, as kernels round differently.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def draw(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    prompts, labels = [draw(9), draw(4)], [draw(1), draw(3), draw(2)]
    try:
        found = likelihoods_as_tree(model, prompts, labels, budget=Budget(40))
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # any model's code runs here; whatever it raises, the plain way works
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    expected = likelihoods_one_by_one(model, prompts, labels)
    off = (found - expected).abs().max().item()
    allowed = 1e-3 if model.dtype == torch.float32 else 0.1
    return None if off <= allowed else f"log-probabilities are off by {off:.1e}"
