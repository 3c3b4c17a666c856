"""Batches of prompts through ``generate`` of transformers, within a budget of tokens."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._runtime import Budget, run_batches
from ._sampling import FiniteGuard, SeededSampling

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class Search:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        num_beams: Beams; 1 is greedy.
        returned: Answers kept of the beams.
        temperature: 0 is deterministic.
        top_p: Probability of the tokens among which to sample.
    """

    max_new_tokens: int
    num_beams: int = 1
    returned: int = 1
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} is not positive")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 is deterministic")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")
        if self.temperature and self.num_beams > 1:
            raise ValueError(
                f"temperature={self.temperature} samples and num_beams={self.num_beams} does not;"
                " use one of them"
            )
        if not self.temperature and self.top_p < 1:
            raise ValueError(f"top_p={self.top_p} needs sampling; set temperature=1.0 as well")


@dataclass(frozen=True)
class Answer:
    """New tokens, the end mark included, and whether there is one."""

    ids: list[int]
    finished: bool


def generation_config(model: "PreTrainedModel") -> "GenerationConfig":
    """The model's own settings.

    Raises:
        ValueError: If the model cannot generate.
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate; load a seq2seq or causal model")
    return config


class BatchDecoder:
    """Decodes rows of tokens with one model.

    Args:
        model: A model of transformers that generates.
        ends: Tokens that end an answer.
        pad_id: Token written into padding.
        name: What messages call the model.
    """

    def __init__(
        self, model: "PreTrainedModel", *, ends: list[int], pad_id: int, name: str
    ) -> None:
        self._model = model
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self._ends = ends
        self._pad_id = pad_id
        self._name = name

    def decode(
        self,
        rows: list[list[int]],
        keys: list[int] | None,
        search: Search,
        *,
        budget: Budget,
        done: Callable[[int], object],
    ) -> list[list[Answer]]:
        """Answer every row, in padded batches within the budget, the costliest rows first.

        When the device runs out of memory, the budget is halved (and stays halved) and the rows
        that are left are planned again.

        Args:
            rows: Token ids of each prompt.
            keys: Noise key of each row; None for a deterministic search.
            search: How to choose tokens.
            budget: Limits of a batch, new tokens and beams included; changed in place.
            done: Called with the number of rows of each batch.
        """
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        costs = (lengths + search.max_new_tokens) * search.num_beams
        found: list[list[Answer]] = [[] for _ in rows]

        def compute(indices: np.ndarray) -> None:
            chosen = indices.tolist()
            answers = self._batch(
                [rows[i] for i in chosen],
                None if keys is None else [keys[i] for i in chosen],
                search,
            )
            for index, answer in zip(chosen, answers, strict=True):
                found[index] = answer
            done(len(chosen))

        run_batches(costs, compute, budget=budget, device=self._model.device, padded=True)
        return found

    @torch.inference_mode()
    def _batch(
        self, rows: list[list[int]], keys: list[int] | None, search: Search
    ) -> list[list[Answer]]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad_id)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            # a causal model goes on at the right end
            place = slice(0, len(row)) if self._seq2seq else slice(width - len(row), width)
            ids[line, place] = torch.tensor(row, dtype=torch.int64)
            mask[line, place] = 1
        device = self._model.device
        guard = FiniteGuard()
        processors: list[Any] = [guard]
        if keys is not None:
            streams = torch.tensor(keys, device=device)
            processors.append(
                SeededSampling(streams, temperature=search.temperature, top_p=search.top_p)
            )
        model: Any = self._model
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._config(width, search),
            logits_processor=processors,
        )
        if guard.broken is not None and bool(guard.broken.any()):
            raise RuntimeError(
                f"{self._name} gave scores that are no numbers; load it with dtype='float32'"
            )
        new = out[:, 1 if self._seq2seq else width :].tolist()
        answers = [self._until_end(row) for row in new]
        step = search.returned
        return [answers[i : i + step] for i in range(0, len(answers), step)]

    def _until_end(self, row: list[int]) -> Answer:
        for position, token in enumerate(row):
            if token in self._ends:
                return Answer(row[: position + 1], True)
        return Answer(row, False)

    def _config(self, width: int, search: Search) -> "GenerationConfig":
        """The model's own settings but for length and sampling, which are asked per call."""
        own = generation_config(self._model)
        config = copy.deepcopy(own)
        start = 1 if self._seq2seq else width
        # transformers grumbles if both limits are set, whichever of them the model came with
        total = own.max_length is not None and own.max_new_tokens is None
        config.max_length = start + search.max_new_tokens if total else own.max_length
        config.max_new_tokens = None if total else search.max_new_tokens
        config.do_sample = False
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
        config.num_beams, config.num_return_sequences = search.num_beams, search.returned
        if search.num_beams == 1:
            config.early_stopping, config.length_penalty = False, 1.0
        if own.min_length:
            config.min_length = min(own.min_length, start + search.max_new_tokens)
        if own.min_new_tokens:
            config.min_new_tokens = min(own.min_new_tokens, search.max_new_tokens)
        config.pad_token_id = self._pad_id
        config.eos_token_id = self._ends or None
        config.return_dict_in_generate = False
        return config
