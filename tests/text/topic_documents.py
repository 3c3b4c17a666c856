"""Documents of three subjects, and topic models of them."""

import torch

from torsh_text import TopicModel

METHODS = ["kmeans", "spherical", "hdbscan", "nmf"]
ON_VECTORS = METHODS[:3]
WORDS = [["apple", "pear", "plum"], ["car", "wheel", "road"], ["wave", "beach", "sand"]]


def documents(count=60, seed=0):
    """Documents of three subjects, with vectors around three directions."""
    generator = torch.Generator().manual_seed(seed)
    gold = torch.randint(3, (count,), generator=generator)
    words = torch.randint(3, (count, 8), generator=generator)
    texts = [
        " ".join(WORDS[label][word] for word in row)
        for label, row in zip(gold.tolist(), words.tolist(), strict=True)
    ]
    x = torch.eye(3, 8)[gold] + 0.12 * torch.randn(count, 8, generator=generator)
    return texts, x, gold


def fitted(method, texts, x, k=3, **options):
    model = TopicModel(k="auto" if method == "hdbscan" else k, method=method, **options)
    return model.fit(texts, vectors=None if method == "nmf" else x)


def topics_of(model, texts, x):
    return model.transform(texts, vectors=None if model.method == "nmf" else x)
