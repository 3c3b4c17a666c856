"""The encoder: texts or batches in, vectors out."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _backbone
from ._attention import last_states, positioned
from ._cache import EmbeddingCache, open_cache
from ._fingerprint import arithmetic, weights_seen
from ._packing import PackedBatch
from ._pooling import POOLINGS, Pooling, pool_packed, pool_padded
from ._quantized import Quantization, QuantizedVectors
from ._quantized import quantize as quantized
from ._runtime import (
    KEPT_WINDOW,
    check_max_tokens,
    check_options,
    join_pieces,
    progress_bar,
    tokenized_windows,
)
from ._saving import write_model
from ._shelf import Shelf
from ._token_model import Attention, Cut, TokenModel
from ._tokenizing import Long

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_CUT = "; use long='mean' or long='error'"


class Encoder(TokenModel):
    """A transformer that turns texts into vectors, without padding.

    As a layer (:meth:`forward`) it maps a batch of tokens to vectors and lets gradients flow. As a
    tool (:meth:`encode`) it maps texts to vectors in input order. Most people start with
    :meth:`from_pretrained`; this constructor takes parts that are already loaded.

    At construction, and at first use on another kind of device or in another dtype, four random
    rows run packed and padded. A model that differs runs padded, and a warning says so.

    Args:
        backbone: A model of transformers that returns ``last_hidden_state``.
        tokenizer: Its tokenizer.
        pooling: How token states become one vector: ``"mean"``, ``"cls"``, ``"max"``,
            ``"lasttoken"``, ``"weightedmean"`` or ``"mean_sqrt_len_tokens"``; several are
            concatenated in sentence-transformers' order.
        normalize: Whether vectors are scaled to length one.
        max_length: Tokens after which a text is cut, special tokens included; None for as many as
            the model and tokenizer allow.
        dense: Layers behind the pooling.
        lower_case: Whether texts are lower-cased first.
        prompts: Named prefixes the model was trained with.
        default_prompt: Name of the prefix put before texts if :meth:`encode` gets none.
        attn: ``"auto"``, ``"packed"`` (raise where the check fails) or ``"padded"``.
        name: What messages call the model.

    Attributes:
        backbone: The transformer; its ``state_dict()`` is that of transformers.
        tokenizer: The tokenizer as it was given.
        dim: Size of the vectors.
        prompts: Named prefixes.
        first_position: Position of a row's first token.

    Raises:
        ValueError: If an argument does not fit the model.
        RuntimeError: If ``attn="packed"`` and the model cannot run packed.
    """

    _kind = "encoder"

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: Any,
        *,
        pooling: Pooling | Sequence[Pooling] = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        dense: Iterable[_backbone.Dense] = (),
        lower_case: bool = False,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        attn: Attention = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__()
        modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        if not modes or set(modes) - set(POOLINGS):
            raise ValueError(f"pooling={pooling!r} is none of {', '.join(map(repr, POOLINGS))}")
        self.backbone: PreTrainedModel = backbone
        self.prompts = dict(prompts or {})
        self._modes: tuple[str, ...] = tuple(mode for mode in POOLINGS if mode in modes)
        self._normalize = normalize
        self._default_prompt = default_prompt
        self._dim_in: int = backbone.config.get_text_config().hidden_size * len(self._modes)
        layers = list(dense)
        self.dense = nn.ModuleList(layers)
        self.dim: int = layers[-1].linear.out_features if layers else self._dim_in
        self._fingerprint: tuple[object, str] = (None, "")
        self._read_with(
            tokenizer, max_length=max_length, lower_case=lower_case, attn=attn, name=name
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        pooling: Pooling | Sequence[Pooling] | Literal["auto"] = "auto",
        normalize: bool | Literal["auto"] = "auto",
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        attn: Attention = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> "Encoder":
        """Load a sentence-transformers or plain transformers model, in eval mode.

        Weights are read from safetensors, or with ``weights_only=True``; nothing is unpickled.

        Args:
            name: Hub id such as ``"sentence-transformers/all-MiniLM-L6-v2"``, or a folder.
            pooling: ``"auto"`` reads the folder's ``modules.json``; without one it is ``"mean"``.
            normalize: ``"auto"`` likewise; without ``modules.json`` it is False.
            max_length: Tokens after which a text is cut; None reads it from the folder.
            dtype: ``"auto"`` is bfloat16 on CUDA and float32 elsewhere; or a torch dtype or its
                name. For training in mixed precision, load float32 and use autocast.
            device: None for CUDA if there is one, else the CPU.
            attn: ``"auto"`` packs where the check at load passes; ``"packed"`` insists;
                ``"padded"`` never packs.
            revision: Branch, tag or commit on the hub.
            local_files_only: Do not ask the hub.
            trust_remote_code: Let the model's own code run on this machine.

        Raises:
            FileNotFoundError: If the model is neither a folder nor to be had from the hub.
            ValueError: If its files are damaged or of a kind this encoder has not.
        """
        place = _backbone.resolve_device(device)
        parts = _backbone.load_parts(
            name,
            dtype=_backbone.resolve_dtype(dtype, place),
            device=place,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        layout = parts.layout
        encoder = cls(
            parts.backbone,
            parts.tokenizer,
            pooling=layout.pooling if pooling == "auto" else pooling,
            normalize=bool(layout.normalize) if normalize == "auto" else normalize,
            max_length=layout.max_length if max_length is None else max_length,
            dense=parts.dense,
            lower_case=layout.lower_case,
            prompts=layout.prompts,
            default_prompt=layout.default_prompt,
            attn=attn,
            name=str(name),
        )
        return encoder.eval()

    def forward(self, batch: PackedBatch | Mapping[str, Tensor]) -> Tensor:
        """Map a batch of tokens to vectors; gradients flow.

        Args:
            batch: A :class:`PackedBatch` (see :meth:`pack`), or a padded mapping with
                ``input_ids`` ``(rows, length)`` and, unless nothing is padded,
                ``attention_mask``; padding may be on either side.

        Returns:
            float32 ``(rows, dim)``, of length one if the model normalizes.
        """
        self._check_tokens(batch)
        return self._finish(self._pooled(batch))

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = ...,
        dim: int | None = ...,
        quantize: None = ...,
        out: Literal["torch"] = ...,
        max_tokens: int | Literal["auto"] = ...,
        long: Long = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = ...,
        dim: int | None = ...,
        quantize: None = ...,
        out: Literal["numpy"],
        max_tokens: int | Literal["auto"] = ...,
        long: Long = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = ...,
        dim: int | None = ...,
        quantize: Quantization,
        out: Literal["torch"] = ...,
        max_tokens: int | Literal["auto"] = ...,
        long: Long = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> QuantizedVectors: ...

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        dim: int | None = None,
        quantize: Quantization | None = None,
        out: Literal["torch", "numpy"] = "torch",
        max_tokens: int | Literal["auto"] = "auto",
        long: Long = "truncate",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Tensor | np.ndarray | QuantizedVectors:
        """Map texts to vectors in input order, without gradients.

        Equal texts are computed once. Batches hold as many rows as fit a budget of tokens, the
        longest first; if the device runs out of memory, the budget is halved and stays so.
        Empty texts are legal: they get the vector of the special tokens alone.

        Args:
            texts: The texts, or one text.
            prompt: Text put before each text, such as ``enc.prompts["query"]``; None for the
                model's default, if it has one.
            dim: Keep this many leading entries, before normalizing (for models trained so that
                prefixes of their vectors are vectors).
            quantize: ``"int8"`` or ``"binary"`` for :class:`QuantizedVectors` that take a quarter
                or a 32nd of the memory, on the model's device; see :func:`quantize`. Their codes
                are tensors (``codes.cpu().numpy()`` gives the array), so ``out`` stays
                ``"torch"``. A cache keeps whole vectors and serves every ``quantize``.
            out: ``"torch"`` for a float32 tensor on the model's device, ``"numpy"`` for an array.
            max_tokens: Most tokens in a batch; ``"auto"`` is 768 on the CPU, 65,536 on CUDA in
                half precision.
            long: What happens to texts beyond ``max_length``: ``"truncate"`` cuts them and warns
                with their number, ``"error"`` raises, ``"mean"`` averages the vectors of
                consecutive pieces, weighted by their tokens.
            cache: An :class:`EmbeddingCache`, or the path of one: texts that it knows for this
                model and these settings are read, the others are computed and added, 1,024 at a
                time (4,096 on CUDA). A run that an exception or Ctrl-C ends keeps all that it
                computed. Any ``dim`` is served.
            progress: Show a progress bar.

        Returns:
            ``(texts, dim)``; ``(dim,)`` for one text.

        Raises:
            TypeError: If an item is not a string, or ``dim`` or ``max_tokens`` no integer.
            ValueError: If an option does not fit, or a text is no Unicode or too long.
            RuntimeError: If the encoder is in training mode, or a vector is not finite.
        """
        check_max_tokens(max_tokens)
        check_options(out=out, long=long, dim=dim, size=self.dim)
        if quantize not in (None, "int8", "binary"):
            raise ValueError(f"quantize={quantize!r} is neither None, 'int8' nor 'binary'")
        if quantize is not None and out == "numpy":
            raise ValueError(
                f"out='numpy' is given with quantize={quantize!r}; leave it out and take the"
                " result's codes.cpu().numpy()"
            )
        vectors, where, cut = self._read(
            texts,
            prompt=prompt,
            dim=dim,
            max_tokens=max_tokens,
            long=long,
            cache=cache,
            progress=progress,
        )
        if long == "truncate":
            self._warn_cut(len(cut), f"{len(vectors)} different texts", _NOT_CUT)
        repeats = len(vectors) != len(where)
        if quantize is not None:
            small = quantized(vectors, quantize)
            small = small[where] if repeats else small
            return small[0] if isinstance(texts, str) else small
        if repeats:
            vectors = vectors[torch.tensor(where, device=vectors.device)]
        if isinstance(texts, str):
            vectors = vectors[0]
        return vectors.cpu().numpy() if out == "numpy" else vectors

    def vectors_and_cuts(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | Literal["auto"],
        long: Long,
        cache: EmbeddingCache | str | os.PathLike[str] | None,
        progress: bool,
    ) -> tuple[Tensor, list[bool], Cut]:
        """Encode, and say of each text whether its end was left unread, and what to warn of."""
        check_max_tokens(max_tokens)
        check_options(out="torch", long=long, dim=None, size=self.dim)
        vectors, where, cut = self._read(
            texts, max_tokens=max_tokens, long=long, cache=cache, progress=progress
        )
        left_out = cut if long == "truncate" else set[int]()
        why = Cut(len(left_out), f"{len(vectors)} different texts", self.max_length, _NOT_CUT)
        rows = torch.tensor(where, dtype=torch.int64, device=vectors.device)
        return vectors[rows], [i in left_out for i in where], why

    def _read(
        self,
        texts: str | Iterable[str],
        *,
        max_tokens: int | Literal["auto"],
        long: Long,
        cache: EmbeddingCache | str | os.PathLike[str] | None,
        progress: bool,
        prompt: str | None = None,
        dim: int | None = None,
    ) -> tuple[Tensor, list[int], set[int]]:
        """Vectors of the different texts, which of them each text has, and which were too long."""
        items, prefix = self._prepared(texts, prompt)
        unique: dict[str, int] = {}
        where = [unique.setdefault(prefix + text, len(unique)) for text in items]
        keys = list(unique)
        shelf = None if cache is None else self._shelf(cache, long)
        # allocated outside inference mode, so that callers may train on it
        vectors = torch.empty(len(keys), self.dim, device=self.backbone.device)
        left, cut = np.arange(len(keys)), set[int]()
        if shelf is not None:
            left, known_to_be_cut = shelf.read(keys, vectors)
            cut.update(known_to_be_cut.tolist())
            if cut and long == "error":
                raise self._too_long(where.index(int(known_to_be_cut[0])))
        todo = [keys[i] for i in left] if shelf is not None else keys
        with torch.inference_mode(), progress_bar(len(todo), shown=progress) as bar:
            for start, rows in tokenized_windows(
                todo, self.row_tokenizer, long=long, window=self._window(shelf)
            ):
                cut.update(left[start + np.array(rows.too_long, dtype=np.int64)].tolist())
                if cut and long == "error":
                    raise self._too_long(where.index(int(left[start + rows.too_long[0]])))
                pooled = torch.empty(len(rows.lengths), self.dim, device=vectors.device)
                done: list[Tensor] = []

                def compute(
                    batch: PackedBatch,
                    indices: Tensor,
                    pooled: Tensor = pooled,
                    done: list[Tensor] = done,
                ) -> None:
                    pooled.index_copy_(0, indices, self._pooled(batch))
                    done.append(indices)
                    bar.update(len(indices))

                here = left[start : start + len(rows.pieces)]
                try:
                    self._compute(rows, compute, max_tokens)
                except BaseException:  # an interruption, too
                    if shelf is not None and done:
                        whole = rows.finished(torch.cat(done).cpu().numpy())
                        found = join_pieces(pooled, rows)[torch.from_numpy(whole)]
                        shelf.write(here[whole], found, here[rows.too_long])
                    raise
                found = join_pieces(pooled, rows)
                if shelf is not None:
                    found = shelf.write(here, found, here[rows.too_long])
                if len(here) == len(keys):
                    vectors.copy_(found)
                else:
                    vectors[torch.from_numpy(here).to(vectors.device)] = found
        vectors = self._finish(vectors, dim)
        finite = vectors.isfinite().all(1)
        if not bool(finite.all()):
            index = where.index(int((~finite).nonzero()[0]))
            raise RuntimeError(
                f"the vector of texts[{index}] is not finite; load the model with dtype='float32'"
            )
        return vectors, where, cut

    @overload
    def token_embeddings(
        self, texts: str, *, max_tokens: int | Literal["auto"] = ...
    ) -> Tensor: ...

    @overload
    def token_embeddings(
        self, texts: Iterable[str], *, max_tokens: int | Literal["auto"] = ...
    ) -> list[Tensor]: ...

    def token_embeddings(
        self, texts: str | Iterable[str], *, max_tokens: int | Literal["auto"] = "auto"
    ) -> Tensor | list[Tensor]:
        """Return the last state of every token, special tokens included, without gradients.

        Args:
            texts: The texts, or one text; those beyond ``max_length`` are cut, with a warning.
            max_tokens: As for :meth:`encode`.

        Returns:
            For each text a float32 tensor ``(tokens, hidden)`` on the model's device; for one text
            its tensor.

        Raises:
            TypeError: If an item is not a string, or ``max_tokens`` no integer.
            ValueError: If a text is no Unicode.
            RuntimeError: If the encoder is in training mode, or a state is not finite.
        """
        check_max_tokens(max_tokens)
        items, prefix = self._prepared(texts, None)
        device = self.backbone.device
        found: list[Tensor] = [torch.empty(0, device=device)] * len(items)
        cut = 0
        with torch.no_grad():
            for start, rows in tokenized_windows(
                [prefix + text for text in items], self.row_tokenizer, long="truncate"
            ):
                cut += len(rows.too_long)

                def compute(batch: PackedBatch, indices: Tensor, start: int = start) -> None:
                    states = self._token_states(batch).float()
                    finite = states.isfinite().all(1)
                    for index, state, good in zip(
                        indices.tolist(),
                        states.split(batch.lengths),
                        finite.cpu().split(batch.lengths),
                        strict=True,
                    ):
                        if not bool(good.all()):
                            raise RuntimeError(
                                f"a token state of texts[{start + index}] is not finite; load the"
                                " model with dtype='float32'"
                            )
                        found[start + index] = state

                self._compute(rows, compute, max_tokens)
        self._warn_cut(cut, f"{len(items)} texts")
        return found[0] if isinstance(texts, str) else found

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and settings.

        Equal vectors of equal texts need equal fingerprints. The weights are read again when they
        have changed: in place, by ``load_state_dict``, by ``to``, or by an optimizer. Writing a
        few single entries through ``parameter.data``, which hides changes from autograd, is not
        noticed.
        """
        dense = [repr(layer) for layer in self.dense]  # names the activations
        settings = repr(
            (self._modes, self._normalize, self.max_length, self._lower_case, self._prefix, dense)
        )
        config = json.loads(self.backbone.config.to_json_string())
        config.pop("transformers_version", None)  # of this machine, not of the model
        about = settings + json.dumps(config, sort_keys=True)
        weights = weights_seen(self)
        seen = (weights, self.row_tokenizer, len(self.tokenizer), about)
        if weights is None or self._fingerprint[0] != seen:
            words = self.row_tokenizer.described()
            self._fingerprint = (seen, _backbone.digest(self.state_dict(), words, about))
        return self._fingerprint[1]

    def _facts(self) -> dict[str, str]:
        pooling = "+".join(self._modes) + " pooling" + (", length one" if self._normalize else "")
        return {"vectors": f"{self.dim} entries, {pooling}"}

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that :meth:`from_pretrained` and sentence-transformers load."""
        write_model(
            Path(path),
            backbone=self.backbone,
            tokenizer=self.tokenizer,
            dim_in=self._dim_in // len(self._modes),
            pooling=self._modes,
            dense=self.dense,
            normalize=self._normalize,
            max_length=self.max_length,
            lower_case=self._lower_case,
            prompts=self.prompts,
            default_prompt=self._default_prompt,
        )

    def _window(self, shelf: Shelf | None) -> int | None:
        slow = shelf is not None and self.backbone.device.type == "cpu"
        return KEPT_WINDOW if slow else None

    def _shelf(self, cache: EmbeddingCache | str | os.PathLike[str], long: Long) -> Shelf:
        exactness = arithmetic(self.backbone.device, self.backbone.dtype)
        # "error" gives the vectors of "truncate" or none
        settings = f"{exactness}, long texts {'averaged' if long == 'mean' else 'cut'}"
        return Shelf(open_cache(cache), self.fingerprint, settings)

    def _too_long(self, index: int) -> ValueError:
        return ValueError(
            f"texts[{index}] has more than max_length={self.max_length} tokens; use"
            " long='truncate', long='mean' or a larger max_length"
        )

    def _prepared(self, texts: str | Iterable[str], prompt: str | None) -> tuple[list[str], str]:
        if prompt is None:
            return self._texts(texts), self._prefix
        if not isinstance(prompt, str):
            raise TypeError(f"prompt={prompt!r} is neither None nor a string")
        if prompt in self.prompts:
            raise ValueError(
                f"prompt={prompt!r} is the name of a prompt; pass its text, .prompts[{prompt!r}]"
            )
        return self._texts(texts), prompt

    @property
    def _prefix(self) -> str:
        return self.prompts.get(self._default_prompt or "", "")

    def _pooled(self, batch: PackedBatch | Mapping[str, Tensor]) -> Tensor:
        if isinstance(batch, PackedBatch):
            vectors = pool_packed(self._token_states(batch), batch.cu_seqlens, self._modes)
        else:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            inputs = {"input_ids": ids, "attention_mask": mask}
            inputs = positioned(self.backbone, inputs, self.first_position)
            states = last_states(self.backbone, inputs)
            vectors = pool_padded(states, mask, self._modes)
        for layer in self.dense:
            vectors = layer(vectors).float()
        return vectors

    def _finish(self, vectors: Tensor, dim: int | None = None) -> Tensor:
        vectors = vectors if dim is None else vectors[:, :dim]
        return F.normalize(vectors, dim=-1) if self._normalize else vectors
