"""One direction of a translation, by any model of transformers that writes."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor

from torsh_data._rng import uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORD_STEP = 0xD1B54A32D192ED03 - 2**64
_TOKENIZING = Lock()
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# by model: the sums of its tensors, and the digest of their content
_DIGESTS: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, ...], str]] = WeakKeyDictionary()
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


@dataclass(frozen=True)
class Translator:
    """A model that translates one way, and how it is asked.

    Attributes:
        model: A hub id, a folder, or a seq2seq or causal model of transformers.
        tokenizer: Its tokenizer; None if `model` is an id or a folder.
        source: Code of the language it reads, for models with one vocabulary for many languages
            ("eng_Latn" for NLLB, "en_XX" for mBART).
        target: Code of the language it writes, for the same.
        prompt: What the model reads, with `{text}` for the text:
            `"translate English to German: {text}"` for T5, `">>deu<< {text}"` for Marian models
            with several targets. Chat models get it as one message through their template.
    """

    model: "str | os.PathLike[str] | PreTrainedModel"
    tokenizer: Any = None
    source: str | None = None
    target: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Search:
    """How tokens are chosen: sampled if `temperature` is above 0, else by beams."""

    num_beams: int
    returned: int
    temperature: float


class Direction:
    """A loaded translator.

    Args:
        translator: What to load.
        name: What messages call it.
        device: None for CUDA if there is one; a model that was given stays where it is.
        dtype: "auto" for bfloat16 on CUDA and float32 elsewhere; a model that was given stays as
            it is.
        batch_tokens: Most tokens of a batch, new ones and beams included; halved for good when
            memory runs out.
        loaded: Models and tokenizers by their id: what is there is not loaded again.
    """

    def __init__(
        self,
        translator: Translator,
        *,
        name: str,
        device: torch.device | str | None,
        dtype: torch.dtype | str,
        batch_tokens: int,
        loaded: dict[str, tuple[Any, Any]],
    ) -> None:
        self.model: Any
        self._spec = translator
        self._name = name
        self._asked = self.batch_tokens = batch_tokens
        if isinstance(translator.model, (str, os.PathLike)):
            if translator.tokenizer is not None:
                raise ValueError(f"{name}: a tokenizer is only given with a model, not with its id")
            key = os.fspath(translator.model)
            if key not in loaded:
                loaded[key] = _load(translator.model, device, dtype, name)
            self.model, self._tokenizer = loaded[key]
        else:
            if translator.tokenizer is None:
                raise ValueError(
                    f"{name}: a model needs its tokenizer: Translator(model, tokenizer)"
                )
            self.model = cast("Any", translator.model)
            self._tokenizer = translator.tokenizer
            if device is not None or dtype != "auto":
                kind = None if dtype == "auto" else _dtype(dtype)
                self.model.to(device=device, dtype=kind)
        if not self.model.can_generate():
            raise ValueError(f"{name}: {type(self.model).__name__} cannot write text")
        self._seq2seq = bool(self.model.config.is_encoder_decoder)
        self._chat = not self._seq2seq and bool(getattr(self._tokenizer, "chat_template", None))
        self._head, self._tail = self._frame()
        self._forced = self._forced_start()
        self._vocabulary: str | None = None
        own = self.model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        self._ends: list[int] = [] if ends is None else ends if isinstance(ends, list) else [ends]
        pads = (own.pad_token_id, self._tokenizer.pad_token_id, *self._ends, 0)
        self._pad: int = next(one for one in pads if one is not None)
        limits = [getattr(self.model.config, "max_position_embeddings", None)]
        limits.append(getattr(self._tokenizer, "model_max_length", None))
        self.limit = min([one for one in limits if isinstance(one, int) and one > 0] or [10**9])

    def __getstate__(self) -> dict[str, Any]:
        # as made: what calls have learnt would change the hash that names a data set's cache
        return {**self.__dict__, "batch_tokens": self._asked, "_vocabulary": None}

    def _frame(self) -> tuple[str, str]:
        prompt = self._spec.prompt
        if prompt is None:
            if not self._seq2seq:
                raise ValueError(
                    f"{self._name}: a causal model needs to be told what to do, such as "
                    "Translator(..., prompt='Translate into German: {text}\\nGerman:')"
                )
            return "", ""
        if prompt.count("{text}") != 1:
            raise ValueError(f"{self._name}: prompt={prompt!r} must hold {{text}} once")
        if self._chat:
            mark = "\ue000text\ue001"
            message = {"role": "user", "content": prompt.replace("{text}", mark)}
            prompt = self._tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            ).replace(mark, "{text}")
            if prompt.count("{text}") != 1:
                raise ValueError(f"{self._name}: the chat template drops or repeats the message")
        head, tail = prompt.split("{text}")
        return head, tail

    def _forced_start(self) -> int | None:
        source, target = self._spec.source, self._spec.target
        known = set(self._tokenizer.get_vocab())
        for label, code in (("source", source), ("target", target)):
            if code is not None and code not in known:
                raise ValueError(f"{self._name}: {label}={code!r} is no token of its tokenizer")
        if source is not None and not hasattr(self._tokenizer, "src_lang"):
            raise ValueError(
                f"{self._name}: source={source!r}, but {type(self._tokenizer).__name__} knows no "
                "source languages; leave source out, or say it in the prompt"
            )
        return None if target is None else int(self._tokenizer.convert_tokens_to_ids(target))

    def fingerprint(self) -> str:
        """Changes if weights, vocabulary, settings or prompt change.

        The weights are looked at with each call, and any change of them is noticed.
        """
        if self._vocabulary is None:
            rust = getattr(self._tokenizer, "backend_tokenizer", None)
            words = self._tokenizer.get_vocab().items() if rust is None else rust.to_str()
            content = json.dumps(sorted(words) if rust is None else words)
            self._vocabulary = xxhash.xxh3_128_hexdigest(content.encode())
        config = self.model.generation_config.to_json_string(use_diff=False)
        spec = (self._head, self._tail, self._spec.source, self._spec.target)
        parts = [_weights(self.model), self._vocabulary, config, spec]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt."""
        if not texts:
            return []
        prompts = [self._head + text + self._tail for text in texts]
        source = self._spec.source
        with _TOKENIZING:  # a tokenizer may be shared, and its source language is a state of it
            before = None if source is None else self._tokenizer.src_lang
            if source != before:
                self._tokenizer.src_lang = source
            try:
                # a chat template has written the special tokens itself
                found = self._tokenizer(prompts, add_special_tokens=not self._chat, verbose=False)
            finally:
                if source != before and before is not None:  # None cannot be set
                    self._tokenizer.src_lang = before
        return found["input_ids"]

    def write(
        self,
        rows: Sequence[list[int]],
        keys: Sequence[int],
        search: Search,
        done: Callable[[list[int], list[list[tuple[str, bool]]]], None],
    ) -> None:
        """Answer rows, the longest first, and hand each batch's (text, finished) to `done`."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            widest = self._cost(len(rows[order[0]]), search)
            batch = order[: max(1, self.batch_tokens // widest)]
            try:
                answers = self._batch([rows[i] for i in batch], [keys[i] for i in batch], search)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not any(sign in str(error) for sign in _OUT_OF_MEMORY) or len(batch) == 1:
                    raise
                answers = None  # below, where the error no longer holds on to the tensors
            if answers is None:
                self.batch_tokens = max(1, len(batch) // 2 * widest)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            done(batch, answers)
            order = order[len(batch) :]

    def _cost(self, length: int, search: Search) -> int:
        return (length + self._room(length)) * search.num_beams

    def _room(self, length: int) -> int:
        """Tokens of an answer, by the length of its own prompt: the same in any batch."""
        room = 16 + 2 * length
        left = self.limit - 1 if self._seq2seq else self.limit - length
        return max(1, min(room, left))

    @torch.inference_mode()
    def _batch(
        self, rows: list[list[int]], keys: list[int], search: Search
    ) -> list[list[tuple[str, bool]]]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):  # a causal model goes on at the right end
            place = slice(0, len(row)) if self._seq2seq else slice(width - len(row), width)
            ids[line, place] = torch.tensor(row, dtype=torch.int64)
            mask[line, place] = 1
        device = self.model.device
        choice = _Choice(torch.tensor(keys, device=device), search.temperature)
        room = max(self._room(len(row)) for row in rows)
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._config(1 if self._seq2seq else width, room, search),
            logits_processor=[choice],
        )
        if bool(choice.broken):
            raise RuntimeError(f"{self._name}: the scores are no numbers; use dtype='float32'")
        new = out[:, 1 if self._seq2seq else width :].tolist()
        found: list[tuple[list[int], bool]] = []
        for line, row in enumerate(new):
            own = self._room(len(rows[line // search.returned]))
            end = next((k for k, token in enumerate(row) if token in self._ends), None)
            finished = end is not None and end < own
            found.append((row[: end if finished else own], finished))
        texts = self._tokenizer.batch_decode([row for row, _ in found], skip_special_tokens=True)
        pairs = [(text.strip(), end) for text, (_, end) in zip(texts, found, strict=True)]
        step = search.returned
        return [pairs[i : i + step] for i in range(0, len(pairs), step)]

    def _config(self, start: int, room: int, search: Search) -> Any:
        """The model's own settings but for length and search, which are ours."""
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = None, start + room
        config.do_sample, config.temperature, config.top_p, config.top_k = False, 1.0, 1.0, 50
        config.num_beams, config.num_return_sequences = search.num_beams, search.returned
        if search.num_beams == 1:
            config.early_stopping, config.length_penalty = False, 1.0
        if self._forced is not None:
            config.forced_bos_token_id = self._forced
        if config.forced_eos_token_id is not None:
            config.forced_eos_token_id = None  # an answer that was cut off must not look finished
        config.pad_token_id, config.eos_token_id = self._pad, self._ends or None
        config.return_dict_in_generate = False
        return config


class _Choice:
    """Turns greedy search into sampling: a logits processor of transformers.

    The largest of `scores / temperature + Gumbel noise` is a sample of the softmax. The noise of a
    row comes from its key alone, whatever stands beside it in the batch.
    """

    def __init__(self, keys: Tensor, temperature: float) -> None:
        self._keys = keys
        self._temperature = temperature
        self._step = 0
        self.broken = torch.zeros((), dtype=torch.bool, device=keys.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.broken |= scores.isnan().any()
        if not self._temperature:
            return scores
        words = torch.arange(scores.shape[-1], device=scores.device) * _WORD_STEP
        noise = uniform(self._keys[:, None] + words, self._step)
        self._step += 1
        gumbel = -(-(noise + 2.0**-54).log()).log()
        return scores.float() / self._temperature + gumbel.float()


def _weights(model: torch.nn.Module) -> str:
    """A digest of all weights.

    To read them is less work than to write one token. Where they would have to be copied to the CPU
    first, they are only when the sums of their bits changed: versions of tensors do not count what
    fused optimizers and `.data` do.
    """
    tensors = model.state_dict().values()
    if all(one.is_cpu for one in tensors):
        return _digest(model)
    state = _sums(tensors)
    known = _DIGESTS.get(model)
    if known is None or known[0] != state:
        _DIGESTS[model] = known = (state, _digest(model))
    return known[1]


def _sums(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The sum of each tensor's bits as integers."""
    sums = [one.detach().view(_INTEGERS[one.element_size()]).sum() for one in tensors]
    return tuple(int(one) for one in sums)


def _digest(model: torch.nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r}; use 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def _load(
    name: "str | os.PathLike[str]",
    device: torch.device | str | None,
    dtype: torch.dtype | str,
    role: str,
) -> tuple[Any, Any]:
    try:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )
    except ImportError as error:
        raise ImportError(
            "BackTranslator needs transformers: pip install 'torsh-data[text]'"
        ) from error
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    auto = torch.bfloat16 if place.type == "cuda" else torch.float32
    kind = auto if dtype == "auto" else _dtype(dtype)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = loader.from_pretrained(
        name, dtype=kind, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{role}={str(name)!r} lacks {len(missing)} weights (first: {missing[0]!r}), which "
            "would be random; load a model that was trained to write"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model.to(place).eval(), tokenizer
