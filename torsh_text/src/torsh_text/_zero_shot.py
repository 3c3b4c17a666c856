"""Classification without training examples, three ways."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from . import _backbone
from ._cache import EmbeddingCache
from ._classify import Classifier
from ._encoder import Encoder
from ._generate import Generator
from ._generator_loading import load_generator
from ._heads import MissingHeadError
from ._label_likelihood import check_tree, label_likelihoods, likelihoods_one_by_one
from ._labels import Label, check_ranking, checked_names, ranked
from ._runtime import Budget, check_device, check_max_tokens, default_max_tokens
from ._similarity import similarity
from ._token_model import warn_cut
from ._tokenizing import Long, checked_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Via = Literal["auto", "nli", "embed", "lm"]
TEMPLATE = "This text is about {}."
_PAIRS = 4096  # at a time: memory stays bounded however many texts and labels there are
_HOLE = "\ue000\ue001\ue000"  # private use: no template and hardly a text has it


class ZeroShot(nn.Module):
    """Give texts labels that no one has trained, only named.

    - ``"nli"``: a classifier trained on textual entailment reads each text with each label's
      sentence. Slowest (texts times labels) and the most precise.
    - ``"embed"``: an encoder compares each text with each label's sentence; labels are encoded
      once, so it costs one pass over the texts.
    - ``"lm"``: a causal language model is asked, and the labels' probabilities as its answer are
      compared, per token, so that long labels have no handicap.

    Args:
        model: A :class:`Classifier` (entailment), an :class:`Encoder`, a :class:`Generator` or
            causal language model of transformers, or a hub id or folder of one, which is loaded
            with its defaults.
        via: Which way; ``"auto"`` is told by the kind of model.
        tokenizer: Tokenizer of a language model that was passed as an object.
        temperature: What scores are divided by before the softmax; None for 1, and for 0.05 with
            ``"embed"``, as cosines lie close together (the scale 20 of sentence-transformers).
        device: Where a path or hub id is loaded; None for CUDA if there is one, else the CPU.

    Attributes:
        model: The classifier, encoder or language model.
        via: ``"nli"``, ``"embed"`` or ``"lm"``.

    Raises:
        TypeError: If the model is of a kind that ``via`` cannot use.
        ValueError: If a classifier knows no entailment, a folder holds no model for ``via``, or an
            option does not fit.

    Reference:
        Yin, Hay, Roth: Benchmarking zero-shot text classification. 2019. arXiv:1909.00161.
    """

    def __init__(
        self,
        model: "Classifier | Encoder | Generator | PreTrainedModel | str | os.PathLike[str]",
        *,
        via: Via = "auto",
        tokenizer: Any = None,
        temperature: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if via not in ("auto", "nli", "embed", "lm"):
            raise ValueError(f"via={via!r} is none of 'auto', 'nli', 'embed', 'lm'")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature={temperature} is not positive")
        check_device(device, model)
        used: Any = model
        if isinstance(model, (str, os.PathLike)):
            used, tokenizer = _load(model, via, _backbone.resolve_device(device))
        elif isinstance(model, Generator):
            used, tokenizer = model.model, model.tokenizer
        self._use(used, via, tokenizer, temperature)

    def _use(self, model: Any, via: Via, tokenizer: Any, temperature: float | None) -> None:
        kind = _kind_of(model)
        if via not in ("auto", kind):
            raise TypeError(
                f"via={via!r} cannot use a {type(model).__name__}; it fits via={kind!r}"
            )
        if kind == "lm" and model.config.is_encoder_decoder:
            raise TypeError(f"via='lm' needs a causal model, {type(model).__name__} is seq2seq")
        if kind == "lm" and tokenizer is None:
            raise ValueError("tokenizer is missing: a language model needs its tokenizer")
        self.model: Any = model
        self.training = model.training
        self.via: str = kind
        self._tokenizer = tokenizer
        self._temperature = temperature or (0.05 if kind == "embed" else 1.0)
        if kind == "nli":
            self._entailed, self._contradicted = entailment_indices(model)
        elif kind == "lm":
            self._why_slow = check_tree(model)
            if self._why_slow is not None:
                warnings.warn(
                    f"{type(model).__name__} is asked label by label, which is slower:"
                    f" {self._why_slow}",
                    stacklevel=3,
                )

    @overload
    def predict(
        self,
        texts: str,
        labels: Iterable[str],
        *,
        template: str = ...,
        multi_label: bool = ...,
        top_k: int | None = ...,
        min_score: float | None = ...,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> Label | list[Label]: ...

    @overload
    def predict(
        self,
        texts: Iterable[str],
        labels: Iterable[str],
        *,
        template: str = ...,
        multi_label: bool = ...,
        top_k: int | None = ...,
        min_score: float | None = ...,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> list[Label] | list[list[Label]]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        labels: Iterable[str],
        *,
        template: str = TEMPLATE,
        multi_label: bool = False,
        top_k: int | None = None,
        min_score: float | None = None,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Label | list[Label] | list[list[Label]]:
        """Give each text its label, in input order.

        Args:
            texts: The texts, or one text.
            labels: What a text may be about; two or more (one is enough with ``multi_label``).
            template: Sentence that a label becomes, with ``{}`` for the label; not for ``"lm"``,
                which answers with the label itself.
            multi_label: Whether a text may have several labels or none; only ``"nli"`` can say.
            top_k: That many labels for each text, best first, as a list. None: the best label
                alone, or with ``multi_label`` the list of those that reach ``min_score``.
            min_score: Labels below it are left out of the lists, 0 to 1. None is 0.5 with
                ``multi_label`` and without ``top_k``, else 0. Refused where each text gets its
                best label alone.
            long: What happens to texts that are too long: ``"truncate"`` cuts them and warns with
                their number, ``"error"`` raises; ``"mean"`` is for ``"embed"`` only.
            max_tokens: Most tokens in a batch; ``"auto"`` suits the device.
            cache: Where the texts' vectors are kept, as for :meth:`Encoder.encode`; for
                ``"embed"`` only.
            progress: Show a progress bar (not for ``"lm"``).

        Returns:
            For each text a :class:`Label` or a list of them; for one text, what it has.

        Raises:
            TypeError: If a text or label is not a string.
            ValueError: If labels, template or an option does not fit.
            RuntimeError: If the model is in training mode.
        """
        names = checked_names(labels, least=1 if multi_label else 2)
        check_ranking(top_k=top_k, min_score=min_score, several=multi_label, count=len(names))
        items = checked_texts([texts] if isinstance(texts, str) else texts, unicode=True)
        scores, cut = self._scored(
            items, names, template, multi_label, long, max_tokens, cache, progress
        )
        truncated = [text in cut for text in items]
        found = ranked(
            scores,
            names,
            top_k=top_k,
            several=multi_label,
            min_score=min_score,
            truncated=truncated,
        )
        return found[0] if isinstance(texts, str) else found

    def scores(
        self,
        texts: str | Iterable[str],
        labels: Iterable[str],
        *,
        template: str = TEMPLATE,
        multi_label: bool = False,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Probability of every label for every text.

        Takes what :meth:`predict` takes. Rows sum to one, unless ``multi_label``.

        Returns:
            float32 ``(texts, labels)``, or ``(labels,)`` for one text.
        """
        names = checked_names(labels, least=1 if multi_label else 2)
        items = checked_texts([texts] if isinstance(texts, str) else texts, unicode=True)
        scores, _ = self._scored(
            items, names, template, multi_label, long, max_tokens, cache, progress
        )
        return scores[0] if isinstance(texts, str) else scores

    def _scored(
        self,
        texts: list[str],
        names: list[str],
        template: str,
        multi_label: bool,
        long: Long,
        max_tokens: int | Literal["auto"],
        cache: EmbeddingCache | str | os.PathLike[str] | None,
        progress: bool,
    ) -> tuple[Tensor, set[str]]:
        """Scores, and the texts that were cut, of which a warning has said the number."""
        check_max_tokens(max_tokens)
        known = ("truncate", "error", "mean") if self.via == "embed" else ("truncate", "error")
        if long not in known:
            raise ValueError(f"long={long!r} is none of {known}, which via={self.via!r} knows")
        if multi_label and self.via != "nli":
            raise ValueError(
                f"multi_label=True needs via='nli': via={self.via!r} only compares labels with"
                " each other"
            )
        if cache is not None and self.via != "embed":
            raise ValueError(f"cache keeps vectors, and via={self.via!r} makes none; leave it out")
        if template.count("{}") != 1:
            raise ValueError(f"template={template!r} has to hold {{}} once, for the label")
        if self.via == "lm" and template != TEMPLATE:
            raise ValueError("template is not used with via='lm'; leave it out")
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("the model is in training mode; call .eval() first")
        sentences = [template.replace("{}", name) for name in names]
        first = {text: number for number, text in reversed(list(enumerate(texts)))}
        unique = list(dict.fromkeys(texts))
        numbers = [first[text] for text in unique]
        if self.via == "embed":
            labels = self.model.encode(sentences)
            vectors, left_out, why = self.model.vectors_and_cuts(
                texts, long=long, max_tokens=max_tokens, cache=cache, progress=progress
            )
            warn_cut(*why)
            cut = {text for text, is_cut in zip(texts, left_out, strict=True) if is_cut}
            return (similarity(vectors, labels) / self._temperature).softmax(-1), cut
        if self.via == "nli":
            scores, cut = self._entail(
                unique, numbers, sentences, multi_label, long, max_tokens, progress
            )
        else:
            scores, cut = self._ask(unique, numbers, names, long, max_tokens)
        _warn_cut(cut)
        places = {text: index for index, text in enumerate(unique)}
        where = torch.tensor([places[text] for text in texts], dtype=torch.int64)
        return scores[where.to(scores.device)], cut

    def _entail(
        self,
        texts: list[str],
        numbers: list[int],
        sentences: list[str],
        multi_label: bool,
        long: Long,
        max_tokens: int | Literal["auto"],
        progress: bool,
    ) -> tuple[Tensor, set[str]]:
        if multi_label and self._contradicted is None:
            raise ValueError(
                f"multi_label=True weighs entailment against contradiction, which {self.model.name}"
                f" has not among its labels {self.model.labels}"
            )
        classifier: Classifier = self.model
        step = max(1, _PAIRS // len(sentences))
        logits = torch.empty(
            len(texts), len(sentences), len(classifier.labels), device=classifier.backbone.device
        )
        cut = set[str]()
        for start in range(0, len(texts), step):
            some = texts[start : start + step]
            pairs = [(text, sentence) for text in some for sentence in sentences]
            rows, long_pairs = classifier.logits_of_pairs(
                pairs,
                numbers=[n for n in numbers[start : start + step] for _ in sentences],
                long=long,
                max_tokens=max_tokens,
                progress=progress,
            )
            logits[start : start + step] = rows.view(len(some), len(sentences), -1)
            cut.update(text for text, _ in long_pairs)
        logits = logits / self._temperature
        entailed = logits[..., self._entailed]
        if not multi_label:
            return entailed.softmax(-1), cut
        return (entailed - logits[..., self._contradicted]).sigmoid(), cut

    def _ask(
        self,
        texts: list[str],
        numbers: list[int],
        names: list[str],
        long: Long,
        max_tokens: int | Literal["auto"],
    ) -> tuple[Tensor, set[str]]:
        answers = [self._ids(name if self._chats else f" {name}") for name in names]
        before, after = self._frame(names)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = (limit or 10**9) - len(before) - len(after) - max(map(len, answers))
        if room < 1:
            raise ValueError(
                f"labels and question leave no room for the text in the {limit} positions of the"
                " model; use fewer or shorter labels"
            )
        found: list[list[int]] = []
        cut = set[str]()
        for number, text in zip(numbers, texts, strict=True):
            ids = self._ids(text, plain=True)
            if len(ids) > room:
                cut.add(text)
                if long == "error":
                    raise ValueError(
                        f"texts[{number}] has {len(ids)} tokens, {room} fit; use long='truncate'"
                    )
            found.append([*before, *ids[:room], *after])
        device, dtype = self.model.device, self.model.dtype
        most = default_max_tokens(device, dtype) if max_tokens == "auto" else max_tokens
        with torch.inference_mode():
            if self._why_slow is None:
                logs = label_likelihoods(self.model, found, answers, budget=Budget(most))
            else:
                logs = likelihoods_one_by_one(self.model, found, answers)
        if not bool(logs.isfinite().all()):
            raise RuntimeError("a log-probability is not finite; load the model in float32")
        return (logs / self._temperature).softmax(-1).clone(), cut

    @property
    def _chats(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def _frame(self, names: list[str]) -> tuple[list[int], list[int]]:
        """Token ids before and behind the text; the text itself never meets a template."""
        question = (
            "Which label fits the text best? Answer with the label alone.\n\nLabels: "
            f"{', '.join(names)}\n\nText: {_HOLE}"
        )
        if any(_HOLE in name for name in names):
            raise ValueError("a label holds the private characters U+E000 U+E001 U+E000")
        if not self._chats:
            before = question.removesuffix(_HOLE)
            return self._ids(before, first=True), self._ids("\n\nLabel:")
        prompt: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = prompt.partition(_HOLE)
        return self._ids(before), self._ids(after)

    def _ids(self, text: str, *, plain: bool = False, first: bool = False) -> list[int]:
        """Token ids; in ``plain`` text the names of special tokens are ordinary characters."""
        found = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain, verbose=False
        )["input_ids"]
        start = self._tokenizer.bos_token_id
        return [start, *found] if first and start is not None else list(found)


def entailment_indices(classifier: Classifier) -> tuple[int, int | None]:
    """Find entailment and contradiction among a classifier's labels, by name, not by place.

    Raises:
        ValueError: If no label is called entailment.
    """
    names = [name.casefold().replace("-", "_").replace(" ", "_") for name in classifier.labels]
    entailed = [i for i, name in enumerate(names) if name.startswith("entail")]
    if len(entailed) != 1:
        raise ValueError(
            f"{classifier.name} has the labels {classifier.labels}, of which not one is"
            " 'entailment'; use a model trained on natural language inference, or via='embed'"
        )
    against = [
        i
        for i, name in enumerate(names)
        if name.startswith(("contradict", "not_entail", "non_entail"))
    ]
    return entailed[0], against[0] if len(against) == 1 else None


def _warn_cut(cut: set[str]) -> None:
    if cut:
        warnings.warn(f"{len(cut)} texts were too long for the model and were cut", stacklevel=4)


def _kind_of(model: Any) -> str:
    if isinstance(model, Classifier):
        return "nli"
    if isinstance(model, Encoder):
        return "embed"
    if callable(getattr(model, "generate", None)) and hasattr(model, "config"):
        return "lm"
    raise TypeError(
        f"model is a {type(model).__name__}; pass a Classifier, an Encoder, a causal language model"
        " of transformers, or a hub id or folder"
    )


def _load(name: str | os.PathLike[str], via: Via, device: torch.device) -> tuple[Any, Any]:
    """Load what a hub id or a folder holds, as ``via`` says or as its configuration does."""
    if via == "auto" and Path(name).suffix == ".gguf":
        via = "lm"
    if via == "auto":
        folder = _backbone.find_model(
            name, revision=None, local_files_only=False, trust_remote_code=False
        )
        via = _via_of(folder)
    if via == "nli":
        try:
            return Classifier.from_pretrained(name, device=device), None
        except MissingHeadError as error:
            raise MissingHeadError(
                error.lack,
                "Use a model trained on natural language inference, such as"
                " 'MoritzLaurer/ModernBERT-base-zeroshot-v2.0', or via='embed'",
            ) from error
    if via == "embed":
        return Encoder.from_pretrained(name, device=device), None
    model, tokenizer = load_generator(
        name,
        dtype=_backbone.resolve_dtype("auto", device),
        gguf_file=None,
        revision=None,
        local_files_only=False,
        trust_remote_code=False,
    )
    nn.Module.to(model, device)
    return model, tokenizer


def _via_of(folder: Path) -> Via:
    if (folder / "modules.json").exists():
        return "embed"
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return "nli"
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return "lm"
    return "embed"
