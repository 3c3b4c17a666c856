"""What a topic model knows of each topic as it was found, before any are merged."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cluster import cluster
from ._factors import TermFactors, factor_terms, term_shares
from ._kmeans import group_sums, nearest

TopicMethod = Literal["kmeans", "spherical", "hdbscan", "nmf"]
Group = tuple[int, ...]
_EXAMPLES = 3
_BLOCK_ENTRIES = 2**24
_DENSITY_DIMS = 5


def taken(affinities: Tensor, labels: Tensor) -> Tensor:
    """Affinity of each document to its own column; 0 where the label is -1."""
    if not affinities.shape[1]:
        return affinities.new_zeros(len(labels))
    own = affinities.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    return own.where(labels >= 0, torch.zeros_like(own))


def unit_rows(x: Tensor) -> Tensor:
    """Scale rows to length one; zeros stay, and huge or tiny entries do not leave float32."""
    if not x.numel():
        return x
    largest = x.abs().amax(1, keepdim=True)
    return F.normalize(x / largest.where(largest > 0, torch.ones_like(largest)), dim=1)


def best_examples(examples: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the highest scores, each text once; among equals the one seen first."""
    best: dict[str, float] = {}
    for score, text in sorted(examples, key=lambda example: -example[0]):
        best.setdefault(text, score)
    return [(score, text) for text, score in best.items()][:_EXAMPLES]


@dataclass(frozen=True)
class Plane:
    """The widest directions of some vectors: ``mean (dim,)`` and ``directions (few, dim)``."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def of(cls, x: Tensor, dims: int) -> "Plane":
        """Find at most ``dims`` directions of rows ``(rows, dim)``."""
        rows = x.double()
        mean = rows.mean(0)
        rows = rows - mean
        found = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :dims].T
        return cls(mean.float().cpu(), found.float().cpu().contiguous())

    def project(self, x: Tensor) -> Tensor:
        """Return directions within the plane, of length one; ``(rows, few)``."""
        return unit_rows((x - self.mean.to(x.device)) @ self.directions.to(x.device).T)


@dataclass
class TopicParts:
    """Sums, sizes, words and typical documents of parts; all tensors are on the CPU.

    Attributes:
        method: How they were found.
        sums: Sum of the vectors of each part's documents, float64 ``(parts, dim)``.
        sizes: Documents of each part.
        counts: Words of each part.
        examples: Score and text of the most typical documents of each part.
        reach: For HDBSCAN, the largest squared distance from each center; else empty.
        plane: For HDBSCAN, what vectors are projected on.
        factors: For NMF, the parts themselves.
    """

    method: TopicMethod
    sums: Tensor
    sizes: list[int]
    counts: list[Counter[str]]
    examples: list[list[tuple[float, str]]]
    reach: Tensor
    plane: Plane | None = None
    factors: TermFactors | None = None

    @classmethod
    def empty(cls, method: TopicMethod, parts: int, dim: int) -> "TopicParts":
        """Make parts without documents."""
        sums = torch.zeros(parts, dim, dtype=torch.float64)
        counts: list[Counter[str]] = [Counter() for _ in range(parts)]
        return cls(method, sums, [0] * parts, counts, [[] for _ in range(parts)], torch.empty(0))

    @classmethod
    def find(
        cls,
        method: TopicMethod,
        texts: list[str],
        counts: list[Counter[str]],
        x: Tensor,
        *,
        k: int | Literal["auto"],
        seed: int,
    ) -> tuple["TopicParts", Tensor]:
        """Group documents and count them, the largest part first.

        Args:
            method: How.
            texts: The documents.
            counts: Their words.
            x: Their vectors, of length one ``(documents, dim)``.
            k: Number of parts.
            seed: Seed.

        Returns:
            The parts, and the part of each document, -1 for none.
        """
        if method == "nmf":
            factors = factor_terms(counts, int(k), seed=seed)
            parts = cls.empty(method, len(factors.parts), 0)
            parts.factors = factors
            groups: list[Group] = [(part,) for part in range(len(factors.parts))]
            labels, affinities = parts.place(counts, x, groups)
            parts.add(texts, counts, x, labels, taken(affinities, labels))
            return parts, labels
        plane = Plane.of(x, _DENSITY_DIMS) if method == "hdbscan" else None
        rows = plane.project(x) if plane else x
        found = cluster(rows, k=k, method=method, seed=seed)
        parts = cls.empty(method, len(found.centers), rows.shape[1])
        parts.plane = plane
        parts.add(texts, counts, x, found.labels, found.scores)
        if plane:
            kept = found.labels >= 0
            own = found.labels[kept]
            distances = (rows[kept] - parts.centers(rows)[own]).square().sum(1)
            reach = rows.new_zeros(len(found.centers))
            parts.reach = reach.scatter_reduce(0, own, distances, "amax").cpu()
        return parts, found.labels

    @property
    def dim(self) -> int:
        """Entries of the vectors that :meth:`place` takes."""
        return self.sums.shape[1] if self.plane is None else len(self.plane.mean)

    def centers(self, x: Tensor) -> Tensor:
        """Mean of the vectors of each part, on the device of ``x``."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64).clamp_min(1).unsqueeze(1)
        means = self.sums / sizes
        if self.method == "spherical":
            means = F.normalize(means, dim=1)
        return means.float().to(x.device)

    def totals(self) -> Tensor:
        """Sum of the documents of each part in the space where parts are compared, float64."""
        if self.factors is None:
            return self.sums.clone()
        sizes = torch.tensor(self.sizes, dtype=torch.float64).unsqueeze(1)
        return F.normalize(self.factors.parts, dim=1) * sizes

    def place(
        self, counts: list[Counter[str]], x: Tensor, groups: list[Group]
    ) -> tuple[Tensor, Tensor]:
        """Find the part of each document.

        Args:
            counts: Words of the documents (read with NMF only).
            x: Their vectors, of length one.
            groups: Which parts are one topic; NMF adds their shares.

        Returns:
            Parts ``(documents,)``, -1 for none, and affinities to all parts.
        """
        if self.factors is not None:
            affinities = term_shares(self.factors, counts)
            if not groups:
                return torch.full((len(counts),), -1), affinities
            member = torch.zeros(len(groups), len(self.sizes), dtype=torch.bool)
            for row, group in enumerate(groups):
                member[row, list(group)] = True
            topic = (affinities @ member.T.float()).argmax(1)
            own = affinities.where(member[topic], -1).argmax(1)
            return own.where(affinities.sum(1) > 0, -1), affinities
        x = self.plane.project(x) if self.plane else x
        centers = self.centers(x)
        if not len(centers):
            return torch.full((len(x),), -1, device=x.device), x.new_empty(len(x), 0)
        if not len(x):
            return torch.empty(0, dtype=torch.int64), x.new_empty(0, len(centers))
        distances, labels = nearest(x, centers)
        affinities = x @ F.normalize(centers, dim=1).T
        if self.method == "hdbscan":
            # 1e-5: float32 squares of the same distance, computed in another way
            labels = labels.where(distances <= self.reach.to(x.device)[labels] + 1e-5, -1)
        return labels, affinities

    def add(
        self,
        texts: list[str],
        counts: list[Counter[str]],
        x: Tensor,
        labels: Tensor,
        scores: Tensor,
    ) -> None:
        """Count documents in their parts; those without a part are left out."""
        if not self.sizes or not texts:
            return
        kept = labels >= 0
        rows = self.plane.project(x) if self.plane else x
        sums, _ = group_sums(rows[kept], labels[kept], len(self.sizes))
        self.sums = self.sums + sums.double().cpu()
        described = zip(texts, counts, labels.tolist(), scores.tolist(), strict=True)
        for text, count, part, score in described:
            if part >= 0:
                self.sizes[part] += 1
                self.counts[part].update(count)
                self.examples[part].append((score, text))
        self.examples = [best_examples(examples) for examples in self.examples]

    def open(
        self, x: Tensor, labels: Tensor, affinities: Tensor, *, below: float, size: int
    ) -> tuple[Tensor, Tensor]:
        """Append a part, still to be counted, for each dense group of documents far from all.

        Args:
            x: Vectors of documents, of length one.
            labels: Their parts.
            affinities: Their affinities.
            below: Cosine that is far, and that links the documents of a group.
            size: Fewest documents of a group.

        Returns:
            Parts and affinities of all documents, with the new parts.
        """
        opened = _dense_groups(x, affinities, below, size)
        if not opened:
            return labels, affinities
        old = len(self.sizes)
        for rows in opened:
            self.sums = torch.cat([self.sums, x[rows].sum(0, keepdim=True).double().cpu()])
            self.sizes.append(len(rows))
            self.counts.append(Counter())
            self.examples.append([])
        labels, affinities = self.place([], x, [])
        for part, rows in enumerate(opened, old):
            labels[rows] = part
        # their documents are counted with all others, right after this
        self.sums[old:] = 0
        self.sizes[old:] = [0] * len(opened)
        return labels, affinities

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors, and what JSON can hold."""
        vocabulary = sorted({word for count in self.counts for word in count})
        column = {word: i for i, word in enumerate(vocabulary)}
        entries = [
            (part, column[word], n)
            for part, count in enumerate(self.counts)
            for word, n in sorted(count.items())
        ]
        counts = torch.tensor(entries, dtype=torch.int64).reshape(-1, 3)
        tensors = {"sums": self.sums, "reach": self.reach, "counts": counts}
        note: dict[str, Any] = {
            "vocabulary": vocabulary,
            "sizes": self.sizes,
            "examples": self.examples,
        }
        if self.plane:
            tensors |= {"mean": self.plane.mean, "directions": self.plane.directions}
        if self.factors:
            tensors |= {"rarity": self.factors.rarity, "factors": self.factors.parts}
            note["columns"] = list(self.factors.vocabulary)
        return tensors, note

    @classmethod
    def from_state(
        cls, method: TopicMethod, tensors: dict[str, Tensor], note: dict[str, Any]
    ) -> "TopicParts":
        """Make parts from what :meth:`state` returned."""
        parts = cls.empty(method, *tensors["sums"].shape)
        parts.sums, parts.reach, parts.sizes = tensors["sums"], tensors["reach"], note["sizes"]
        for part, column, n in tensors["counts"].tolist():
            parts.counts[part][note["vocabulary"][column]] = n
        parts.examples = [[(score, text) for score, text in part] for part in note["examples"]]
        if "directions" in tensors:
            parts.plane = Plane(tensors["mean"], tensors["directions"])
        if "factors" in tensors:
            columns = {word: i for i, word in enumerate(note["columns"])}
            parts.factors = TermFactors(columns, tensors["rarity"], tensors["factors"])
        return parts


def _near(x: Tensor, others: Tensor, least: float) -> Tensor:
    """Count for each row the others whose product with it is at least ``least``."""
    step = max(1, _BLOCK_ENTRIES // max(len(x), 1))
    found = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for part in others.split(step):
        found += (x @ part.T >= least).sum(1)
    return found


def _dense_groups(x: Tensor, affinities: Tensor, below: float, size: int) -> list[Tensor]:
    """Rows far from all centers, in groups around the rows with most neighbours."""
    rows = (affinities.amax(1) < below).nonzero().flatten()
    far = x[rows]
    near = _near(far, far, below)
    alive = torch.ones(len(far), dtype=torch.bool, device=x.device)
    groups: list[Tensor] = []
    while len(far) and int(near.max()) >= size:
        leader = int(near.argmax())
        members = alive & (far @ far[leader] >= below)
        if int(members.sum()) < size:  # a cosine at the limit, rounded in another way
            near[leader] = 0
            continue
        groups.append(rows[members])
        alive &= ~members
        near -= _near(far, far[members], below)
        near[~alive] = 0
    return groups
