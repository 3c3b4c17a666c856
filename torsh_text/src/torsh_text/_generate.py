"""Text generation in batches, around ``generate`` of transformers."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from . import _backbone
from ._decoding import BatchDecoder, Search, generation_config
from ._generator_loading import load_generator
from ._prompts import PromptFrame, Prompts
from ._runtime import Budget, check_max_tokens, progress_bar
from ._sampling import stream_key
from ._tokenizing import checked_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BUDGETS = {"cpu": 4096, "cuda": 65_536}
_MOST_ROWS = 512


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
        text: The text, without special tokens and outer white space.
        tokens: New tokens, the end mark included.
        finished: Whether the model ended by itself; False if ``max_new_tokens`` stopped it.
        truncated: Whether the end of the prompt's text did not fit and was cut off.
    """

    text: str
    tokens: int
    finished: bool
    truncated: bool


class Generator(nn.Module):
    """A model that writes: T5, BART, Pegasus and their like, or a causal or chat model.

    :meth:`forward` maps a batch of tokens to scores and lets gradients flow; :meth:`generate` maps
    texts to texts. Chat models get each text as one user message through their own template.

    Args:
        model: A seq2seq or causal model of transformers.
        tokenizer: Its tokenizer.
        max_length: Tokens a prompt may have; for causal models the new tokens count in it too.
            None for as many as the model and tokenizer allow.
        name: What messages call the model.

    Attributes:
        model: The model.
        tokenizer: The tokenizer as it was given.
        chat: Whether texts go through a chat template.
        max_length: Tokens a prompt may have; may be set.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: Any,
        *,
        max_length: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.training = model.training
        self.tokenizer = tokenizer
        self.name = name or type(model).__name__
        self.max_length = _backbone.resolve_max_length(model, tokenizer, max_length)
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self.chat: bool = not self._seq2seq and bool(getattr(tokenizer, "chat_template", None))
        own = generation_config(model)
        ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        pads = (own.pad_token_id, tokenizer.pad_token_id, *ends, 0)
        pad_id: int = next(i for i in pads if i is not None)
        self._decoder = BatchDecoder(model, ends=ends, pad_id=pad_id, name=self.name)
        self._budgets: dict[tuple[torch.device, torch.dtype], Budget] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> "Generator":
        """Load a seq2seq or causal model, in eval mode.

        Weights are read from safetensors, with ``weights_only=True``, or from a GGUF file, which
        is expanded to ``dtype``; nothing is unpickled.

        Args:
            name: Hub id such as ``"google/flan-t5-base"``, a folder, or a path to a ``.gguf`` file.
            max_length: Tokens a prompt may have, for causal models with the new tokens; None for
                as many as the model and tokenizer allow.
            dtype: ``"auto"`` is bfloat16 on CUDA and float32 elsewhere; or a torch dtype or its
                name.
            device: None for CUDA if there is one, else the CPU.
            gguf_file: Name of a GGUF file within the folder or repository (causal models only).
            revision: Branch, tag or commit on the hub.
            local_files_only: Do not ask the hub.
            trust_remote_code: Let the model's own code run on this machine.

        Raises:
            FileNotFoundError: If the model is neither a folder nor to be had from the hub.
            ValueError: If it cannot write, or lacks weights.
            ImportError: If a GGUF file is asked for without the extra ``gguf``.
        """
        place = _backbone.resolve_device(device)
        model, tokenizer = load_generator(
            name,
            dtype=_backbone.resolve_dtype(dtype, place),
            gguf_file=gguf_file,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        nn.Module.to(model, place)
        return cls(model, tokenizer, max_length=max_length, name=str(name)).eval()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Map a padded batch of tokens to scores of the next token; gradients flow.

        Args:
            batch: ``input_ids`` and ``attention_mask`` ``(rows, length)``; for seq2seq models also
                ``labels`` or ``decoder_input_ids`` ``(rows, length)``.

        Returns:
            ``(rows, length, vocabulary)``.
        """
        return self.model(**batch).logits

    @overload
    def generate(
        self,
        texts: str,
        *,
        max_new_tokens: int = ...,
        instruction: str = ...,
        system: str | None = ...,
        num_beams: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        max_tokens: int | Literal["auto"] = ...,
        long: Literal["truncate", "error"] = ...,
        progress: bool = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        texts: Iterable[str],
        *,
        max_new_tokens: int = ...,
        instruction: str = ...,
        system: str | None = ...,
        num_beams: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        max_tokens: int | Literal["auto"] = ...,
        long: Literal["truncate", "error"] = ...,
        progress: bool = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        texts: str | Iterable[str],
        *,
        max_new_tokens: int = 128,
        instruction: str = "",
        system: str | None = None,
        num_beams: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        max_tokens: int | Literal["auto"] = "auto",
        long: Literal["truncate", "error"] = "truncate",
        progress: bool = False,
    ) -> Generation | list[Generation]:
        """Write one answer to each text, in input order.

        The same call gives the same answers: without ``temperature`` the search is greedy or by
        beams; with it, each answer depends on ``seed`` and its own text, not on what else is in
        the batch (but for rounding). Other settings of the model's ``generation_config``, such as
        ``no_repeat_ngram_size``, hold; its sampling settings do not.

        Args:
            texts: The texts, or one text.
            max_new_tokens: Most tokens of an answer.
            instruction: Put before each text, such as T5's ``"summarize: "``; never cut.
            system: System message, for chat models.
            num_beams: Beams of a deterministic search; None for what the model's
                ``generation_config`` says, 1 is greedy.
            temperature: 0 is deterministic; above, tokens are sampled, at 1 from the model's own
                distribution.
            top_p: Sample among the most likely tokens that reach this probability together.
            seed: Seed of the sampling.
            max_tokens: Most tokens in a batch, new ones and beams included; ``"auto"`` is 4,096 on
                the CPU, 65,536 on CUDA, halved whenever memory runs out.
            long: ``"truncate"`` cuts the end of texts that do not fit and warns with their number;
                ``"error"`` raises.
            progress: Show a progress bar.

        Returns:
            A :class:`Generation` for each text; one for one text.

        Raises:
            TypeError: If an item is no string.
            ValueError: If an option does not fit, or a text is too long with ``long="error"``.
            RuntimeError: If the model is in training mode, or a score is no number.
        """
        beams = generation_config(self.model).num_beams or 1 if num_beams is None else num_beams
        if num_beams is None and temperature:
            beams = 1
        search = Search(max_new_tokens, beams, 1, temperature, top_p)
        found = self._answers(
            texts,
            search,
            copies=1,
            frame=self._frame(instruction, system),
            seed=seed,
            max_tokens=max_tokens,
            long=long,
            progress=progress,
        )
        answers = [one for (one,) in found]
        return answers[0] if isinstance(texts, str) else answers

    @overload
    def candidates(
        self,
        texts: str,
        n: int,
        *,
        method: Literal["sample", "beam"] = ...,
        max_new_tokens: int = ...,
        instruction: str = ...,
        system: str | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        max_tokens: int | Literal["auto"] = ...,
        long: Literal["truncate", "error"] = ...,
        progress: bool = ...,
    ) -> list[Generation]: ...

    @overload
    def candidates(
        self,
        texts: Iterable[str],
        n: int,
        *,
        method: Literal["sample", "beam"] = ...,
        max_new_tokens: int = ...,
        instruction: str = ...,
        system: str | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        max_tokens: int | Literal["auto"] = ...,
        long: Literal["truncate", "error"] = ...,
        progress: bool = ...,
    ) -> list[list[Generation]]: ...

    def candidates(
        self,
        texts: str | Iterable[str],
        n: int,
        *,
        method: Literal["sample", "beam"] = "sample",
        max_new_tokens: int = 128,
        instruction: str = "",
        system: str | None = None,
        temperature: float = 1.0,
        top_p: float = 0.95,
        seed: int = 0,
        max_tokens: int | Literal["auto"] = "auto",
        long: Literal["truncate", "error"] = "truncate",
        progress: bool = False,
    ) -> list[Generation] | list[list[Generation]]:
        """Write ``n`` answers to each text: independent samples, or the ``n`` best beams.

        Args:
            texts: The texts, or one text.
            n: Answers for each.
            method: ``"sample"``, or ``"beam"`` (deterministic, likelier and more alike;
                ``temperature``, ``top_p`` and ``seed`` have no part in it).
            max_new_tokens: As for :meth:`generate`, like all options that follow.
            instruction: See there.
            system: See there.
            temperature: Above 0.
            top_p: See there.
            seed: See there.
            max_tokens: See there.
            long: See there.
            progress: See there.

        Returns:
            A list of ``n`` :class:`Generation` for each text; one list for one text.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n={n!r} is no positive integer")
        if method not in ("sample", "beam"):
            raise ValueError(f"method={method!r} is neither 'sample' nor 'beam'")
        if method == "sample" and not temperature > 0:
            raise ValueError(f"temperature={temperature} is not above 0; use method='beam'")
        sample = method == "sample"
        search = (
            Search(max_new_tokens, 1, 1, temperature, top_p)
            if sample
            else Search(max_new_tokens, n, n, 0.0, 1.0)
        )
        found = self._answers(
            texts,
            search,
            copies=n if sample else 1,
            frame=self._frame(instruction, system),
            seed=seed,
            max_tokens=max_tokens,
            long=long,
            progress=progress,
        )
        return found[0] if isinstance(texts, str) else found

    def room(self, max_new_tokens: int, *, instruction: str = "", system: str | None = None) -> int:
        """Tokens a text may have so that nothing of it is cut."""
        return self._room(max_new_tokens) - self._frame(instruction, system).overhead()

    def rooms(
        self, texts: Sequence[str], *, instruction: str = "", system: str | None = None
    ) -> list[int]:
        """Most new tokens for each text so that nothing of it is cut; below 1 if none fits."""
        prompts = self._frame(instruction, system).fit(list(texts), 10**9)
        if not self._seq2seq:
            return [self.max_length - len(row) for row in prompts.rows]
        limit = _backbone.longest_row(self.model) or 10**9
        return [limit - 1 if len(row) <= self.max_length else 0 for row in prompts.rows]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text alone, without special tokens."""
        if not texts:
            return []
        found = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [len(ids) for ids in found["input_ids"]]

    def _frame(self, instruction: str, system: str | None) -> PromptFrame:
        return PromptFrame(self.tokenizer, chat=self.chat, instruction=instruction, system=system)

    def _room(self, max_new_tokens: int) -> int:
        """Tokens a whole prompt may have."""
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
            raise TypeError(f"max_new_tokens={max_new_tokens!r} is no integer")
        limit = _backbone.longest_row(self.model) if self._seq2seq else self.max_length
        most = None if limit is None else limit - 1
        if max_new_tokens < 1 or (most is not None and max_new_tokens > most):
            valid = "at least 1" if most is None else f"between 1 and {most} for {self.name}"
            raise ValueError(f"max_new_tokens={max_new_tokens}; it has to be {valid}")
        return self.max_length if self._seq2seq else self.max_length - max_new_tokens

    def _budget(self, max_tokens: int | Literal["auto"]) -> Budget:
        """What a batch may hold: as asked, or as learnt on this device."""
        if max_tokens != "auto":
            return Budget(max_tokens, max_rows=_MOST_ROWS)
        kind = (self.model.device, self.model.dtype)
        default = _BUDGETS.get(kind[0].type, _BUDGETS["cpu"])
        return self._budgets.setdefault(kind, Budget(default, max_rows=_MOST_ROWS))

    def _answers(
        self,
        texts: str | Iterable[str],
        search: Search,
        *,
        copies: int,
        frame: PromptFrame,
        seed: int,
        max_tokens: int | Literal["auto"],
        long: str,
        progress: bool,
    ) -> list[list[Generation]]:
        """Check, tokenize each different text once, search, and put answers in input order."""
        if any(module.training for module in self.modules()):
            raise RuntimeError(
                "the generator is in training mode (or a part of it), where dropout would change"
                " the answers; call .eval() first, or call the generator on a batch"
            )
        check_max_tokens(max_tokens)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed={seed!r} is no integer")
        if long not in ("truncate", "error"):
            raise ValueError(f"long={long!r} is neither 'truncate' nor 'error'")
        items = [texts] if isinstance(texts, str) else checked_texts(texts)
        unique: dict[str, int] = {}
        where = [unique.setdefault(text, len(unique)) for text in items]
        prompts = frame.fit(list(unique), self._room(search.max_new_tokens))
        _report_cuts(prompts, where, long)
        if not search.temperature:
            owners, keys = list(range(len(unique))), None
        else:  # the second time a text comes, its samples are others
            owners, keys, seen = list[int](), list[int](), [0] * len(unique)
            for prompt in where:
                for _ in range(copies):
                    owners.append(prompt)
                    keys.append(stream_key(seed, prompts.rows[prompt], seen[prompt]))
                    seen[prompt] += 1
        with progress_bar(len(owners), shown=progress) as bar:
            found = self._decoder.decode(
                [prompts.rows[i] for i in owners],
                keys,
                search,
                budget=self._budget(max_tokens),
                done=bar.update,
            )
        texts_of = self.tokenizer.batch_decode(
            [answer.ids for row in found for answer in row], skip_special_tokens=True
        )
        decoded = iter(texts_of)
        answers = [
            [
                Generation(next(decoded).strip(), len(a.ids), a.finished, prompts.cut[owner])
                for a in row
            ]
            for owner, row in zip(owners, found, strict=True)
        ]
        if keys is None:
            return [answers[i] for i in where]
        return [
            [one for (one,) in answers[start : start + copies]]
            for start in range(0, len(answers), copies)
        ]


def _report_cuts(prompts: Prompts, where: list[int], long: str) -> None:
    """Raise or warn if a text did not fit."""
    cut = sum(prompts.cut)
    if not cut:
        return
    if long == "error":
        index = next(i for i, prompt in enumerate(where) if prompts.cut[prompt])
        raise ValueError(
            f"texts[{index}] does not fit the model beside its prompt and max_new_tokens; use"
            " long='truncate', a shorter text or a model with a longer context"
        )
    warnings.warn(
        f"{cut} of {len(prompts.cut)} different texts did not fit the model and lost their end;"
        " long='error' refuses them",
        stacklevel=4,
    )
