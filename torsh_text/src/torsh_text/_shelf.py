"""A cache as one call of an encoder sees it: numbers of texts in, tensors out."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._cache import EmbeddingCache


class Shelf:
    """Reads what a cache knows of some texts and adds what was computed.

    Args:
        cache: The cache.
        model: Fingerprint of the encoder.
        settings: All else that changes its vectors.
    """

    def __init__(self, cache: EmbeddingCache, model: str, settings: str) -> None:
        self._cache = cache
        self._model = model
        self._settings = settings
        self._keys = np.empty((0, 2), np.uint64)
        self._writes = not cache.readonly

    def read(self, texts: Sequence[str], out: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Fill the rows of ``out`` that are known.

        Args:
            texts: Different texts, as the model gets them.
            out: ``(texts, dim)``.

        Returns:
            Numbers of the texts that are not known, and of the known ones that had been cut.
        """
        self._keys = self._cache.keys(self._model, texts, settings=self._settings)
        hits = self._cache.lookup(self._model, out.shape[1], self._keys)
        known = np.flatnonzero(hits.found)
        vectors = torch.from_numpy(hits.vectors).to(out.device)
        if len(known) == len(texts):
            out.copy_(vectors)
        else:
            out[torch.from_numpy(known).to(out.device)] = vectors
        return np.flatnonzero(~hits.found), known[hits.truncated]

    def write(self, numbers: np.ndarray, vectors: Tensor, cut: np.ndarray) -> Tensor:
        """Add vectors and return them as :meth:`read` will: rounded, if the cache rounds.

        Vectors that are not finite are left out. If the cache cannot be written any more, a
        warning says so and the rest of this call goes on without it.

        Args:
            numbers: Which texts these are.
            vectors: ``(numbers, dim)``.
            cut: Numbers of the texts that were cut.
        """
        if self._cache.dtype == "float16":
            rounded = vectors.half().float()
            fits = rounded.isfinite().all(1, keepdim=True)
            vectors = torch.where(fits, rounded, vectors)
        elif not self._writes:
            return vectors
        else:
            fits = vectors.isfinite().all(1, keepdim=True)
        if self._writes:
            good = fits.squeeze(1).cpu().numpy()
            rows, numbers = vectors.cpu().numpy()[good], numbers[good]
            keys, truncated = self._keys[numbers], np.isin(numbers, cut)
            try:
                self._cache.store(self._model, keys, rows, truncated=truncated)
            except OSError as error:
                self._writes = False
                warnings.warn(f"vectors of this call are not kept any more: {error}", stacklevel=3)
        return vectors
