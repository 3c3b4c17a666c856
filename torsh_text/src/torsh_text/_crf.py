"""Linear-chain conditional random field: tags that depend on their neighbours."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._paths import IGNORED, Paths, TimeSteps, best_paths, checked_lengths, packed, real_places
from ._spans import Transitions

# finite, so that a row with no legal path has gradients; exp(-10,000) is 0 in every dtype
FORBIDDEN = -1e4


class CRF(nn.Module):
    """A linear-chain conditional random field over scores of tags.

    A path of tags is worth the sum of its emissions, of a learnt score for each pair of
    neighbours and of learnt scores for how it begins and ends. Those scores start at zero: a new
    CRF decodes as if each token were on its own, within the constraints. Sequences may be padded
    ``(rows, length, tags)`` or packed ``(tokens, tags)``; both need no mask, only lengths, and
    compute no padding. Sums are in float32 or better.

    Args:
        num_tags: Number of tags.
        constraints: Which neighbours, beginnings and ends are legal
            (:meth:`torsh_text.TagScheme.transitions`); None if all are.

    Attributes:
        transitions: Score of tag j behind tag i ``(tags, tags)``.
        first: Score of each tag at the beginning ``(tags,)``.
        last: Score of each tag at the end ``(tags,)``.

    Raises:
        ValueError: If the constraints are for another number of tags.

    Example:
        >>> crf = CRF(2)
        >>> with torch.no_grad():
        ...     crf.transitions[0, 1] = -5.0  # 1 behind 0 is rare
        >>> scores = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 1.5]]])
        >>> crf.viterbi(scores).tags.tolist()  # 1 1 1 is worth 2.5, 0 0 0 2.0, 0 1 1 -0.5
        [[1, 1, 1]]

    Reference:
        Lafferty, McCallum and Pereira (2001), Conditional Random Fields. Illegal paths here have
        a score of -10,000 for each fault instead of minus infinity.
    """

    legal: Tensor
    legal_first: Tensor
    legal_last: Tensor

    def __init__(self, num_tags: int, constraints: Transitions | None = None) -> None:
        super().__init__()
        if num_tags < 1:
            raise ValueError(f"num_tags={num_tags} is not positive")
        if constraints is None:
            every = torch.ones(num_tags, dtype=torch.bool)
            constraints = Transitions(every.repeat(num_tags, 1), every, every)
        if len(constraints.first) != num_tags:
            raise ValueError(
                f"constraints are for {len(constraints.first)} tags, num_tags={num_tags}"
            )
        self.transitions = nn.Parameter(torch.zeros(num_tags, num_tags))
        self.first = nn.Parameter(torch.zeros(num_tags))
        self.last = nn.Parameter(torch.zeros(num_tags))
        self.register_buffer("legal", constraints.between.clone())
        self.register_buffer("legal_first", constraints.first.clone())
        self.register_buffer("legal_last", constraints.last.clone())

    @property
    def num_tags(self) -> int:
        """Number of tags."""
        return len(self.first)

    def log_likelihood(
        self, emissions: Tensor, tags: Tensor, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Log-probability of each sequence's tags; gradients flow.

        Args:
            emissions: Score of each tag for each token, ``(rows, length, tags)`` padded or
                ``(tokens, tags)`` packed.
            tags: Tag indices ``(rows, length)`` or ``(tokens,)``; what lies in padding is not
                read.
            lengths: Tokens of each row; None if nothing is padded. A list costs no wait for the
                device, a CUDA tensor does. Of a mask take ``mask.sum(1)``.

        Returns:
            float32 ``(rows,)``, 0 for empty rows. The loss of a batch is minus its mean.

        Raises:
            ValueError: If shapes do not fit, or tags (where they are on the CPU) are none or break
                the constraints.
        """
        sizes = self._sizes(emissions, lengths)
        if tags.shape != emissions.shape[:-1]:
            raise ValueError(
                f"tags has shape {tuple(tags.shape)}, emissions {tuple(emissions.shape)}"
            )
        scores, path = packed(self._wide(emissions), sizes, 2), packed(tags, sizes, 1)
        if path.device.type == "cpu":  # elsewhere looking would wait for the device
            self._check(path, sizes)
        if not len(path):
            return -self._log_partition(scores, sizes)
        between, first, last = self._scores(scores.dtype)
        counts = torch.tensor(sizes).to(scores.device, non_blocking=True)
        filled = counts > 0
        ends = counts.cumsum(0)
        # an empty last row starts behind the last token; the first token is a start anyway
        starts = torch.where(filled, ends - counts, 0)
        before = torch.cat([path[:1], path[:-1]])
        inner = torch.ones_like(scores[:, 0])
        inner[starts] = 0
        found = scores.gather(1, path.unsqueeze(1)).squeeze(1) + between[before, path] * inner
        total = torch.segment_reduce(found, "sum", lengths=counts, unsafe=True, initial=0)
        edges = first[path[starts]] + last[path[(ends - 1).clamp(min=0)]]
        total = total + edges * filled
        return total - self._log_partition(scores, sizes)

    def viterbi(self, emissions: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Paths:
        """Find the most likely legal tags of each sequence, without gradients.

        Args:
            emissions: As for :meth:`log_likelihood`.
            lengths: As for :meth:`log_likelihood`.

        Returns:
            ``(tags, scores)``: indices ``(rows, length)`` with -100 in padding, or ``(tokens,)``;
            and the unnormalized score of each path ``(rows,)``.
        """
        sizes = self._sizes(emissions, lengths)
        with torch.no_grad():
            flat = packed(self._wide(emissions), sizes, 2)
            between, first, last = self._scores(flat.dtype)
            found = best_paths(flat, sizes, between, first, last)
        return Paths(self._shaped(found.tags, emissions, sizes, IGNORED), found.scores)

    def marginals(self, emissions: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Probability of each tag at each token, over all paths, without gradients.

        Args:
            emissions: As for :meth:`log_likelihood`.
            lengths: As for :meth:`log_likelihood`.

        Returns:
            Shaped like ``emissions``; 0 in padding, else each token's entries add up to 1.
        """
        sizes = self._sizes(emissions, lengths)
        if not any(sizes):
            return self._wide(emissions).new_zeros(emissions.shape)
        # the gradient of the log-partition function by the emissions is these probabilities
        with torch.inference_mode(False), torch.enable_grad():
            flat = packed(self._wide(emissions.detach().clone()), sizes, 2).requires_grad_()
            total = self._log_partition(flat, sizes).sum()
            (found,) = torch.autograd.grad(total, flat)
        return self._shaped(found, emissions, sizes, 0)

    def forward(
        self, emissions: Tensor, tags: Tensor, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Return :meth:`log_likelihood`."""
        return self.log_likelihood(emissions, tags, lengths)

    def extra_repr(self) -> str:
        return f"num_tags={self.num_tags}"

    def _sizes(self, emissions: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        sizes = checked_lengths(emissions, lengths)
        if emissions.shape[-1] != self.num_tags:
            raise ValueError(
                f"emissions has {emissions.shape[-1]} tags in its last dimension, the CRF"
                f" {self.num_tags}"
            )
        return sizes

    def _wide(self, emissions: Tensor) -> Tensor:
        return emissions.to(torch.promote_types(emissions.dtype, torch.float32))

    def _scores(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        pairs = (
            (self.transitions, self.legal),
            (self.first, self.legal_first),
            (self.last, self.legal_last),
        )
        between, first, last = (
            score.to(dtype).masked_fill(~legal, FORBIDDEN) for score, legal in pairs
        )
        return between, first, last

    def _check(self, path: Tensor, sizes: Sequence[int]) -> None:
        if not len(path):
            return
        if int(path.min()) < 0 or int(path.max()) >= self.num_tags:
            wrong = int(path[(path < 0) | (path >= self.num_tags)][0])
            raise ValueError(
                f"tags holds {wrong}, which is not between 0 and {self.num_tags - 1}; give the CRF"
                " only the tokens that have a tag"
            )
        counts = torch.tensor([n for n in sizes if n])
        ends = counts.cumsum(0)
        legal, first, last = (x.cpu() for x in (self.legal, self.legal_first, self.legal_last))
        fine = torch.ones(len(path), dtype=torch.bool)
        fine[1:] = legal[path[:-1], path[1:]]
        fine[ends - counts] = first[path[ends - counts]]
        fine[ends - 1] &= last[path[ends - 1]]
        if not bool(fine.all()):
            at = int((~fine).nonzero()[0])
            raise ValueError(
                f"tag {int(path[at])} of token {at}, counted without padding, is illegal beside"
                " its neighbours; check the tags' scheme"
            )

    def _log_partition(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Log of the sum over all paths ``(rows,)``."""
        steps = TimeSteps.of(sizes)
        if not steps.sizes:
            return scores.new_zeros(len(sizes))
        between, first, last = self._scores(scores.dtype)
        running: Tensor | None = None
        ended: list[Tensor] = []
        for emission in steps.split(scores):
            if running is None:
                running = first + emission
                continue
            if len(emission) < len(running):
                ended.append(running[len(emission) :])
            paths = running[: len(emission)].unsqueeze(2) + between
            running = torch.logsumexp(paths, 1) + emission
        assert running is not None
        totals = torch.logsumexp(torch.cat([running, *reversed(ended)]) + last, 1)
        order = torch.from_numpy(steps.order).to(scores.device, non_blocking=True)
        return scores.new_zeros(len(sizes)).index_copy(0, order, totals)

    def _shaped(self, flat: Tensor, emissions: Tensor, sizes: Sequence[int], fill: int) -> Tensor:
        """Put packed values back where the emissions had them."""
        if emissions.ndim == 2:
            return flat
        shape = emissions.shape[:2] + flat.shape[1:]
        places = real_places(emissions.shape, sizes, flat.device)
        if places is None:
            return flat.view(shape)
        padded = flat.new_full((shape[0] * shape[1], *flat.shape[1:]), fill)
        return padded.index_copy_(0, places, flat).view(shape)
