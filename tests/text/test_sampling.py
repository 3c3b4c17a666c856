import pytest
import torch

from torsh_text._sampling import SeededSampling, stream_key, uniform_noise


def test_noise_is_uniform_and_independent():
    keys = torch.tensor([stream_key(0, [1, 2], i) for i in range(50)])
    x = torch.stack([uniform_noise(keys, step, 400) for step in range(5)])
    assert x.min() > 0
    assert x.max() < 1
    bins = torch.histc(x, 100, 0, 1)
    expected = x.numel() / 100
    # chi-square with 99 degrees of freedom: beyond 161 once in 10,000
    assert ((bins - expected).square() / expected).sum() < 161
    flat = x.permute(1, 0, 2).reshape(50, -1)
    between = torch.corrcoef(flat) - torch.eye(50)
    assert between.abs().max() < 0.11  # 5 standard deviations of 2,000 pairs
    follows = torch.corrcoef(torch.stack([x[..., :-1].flatten(), x[..., 1:].flatten()]))[0, 1]
    steps = torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten()]))[0, 1]
    assert max(abs(follows), abs(steps)) < 5 / x.numel() ** 0.5


def test_noise_is_the_same_everywhere():
    keys = torch.tensor([stream_key(3, [5], 0), stream_key(3, [5], 1), stream_key(4, [5], 0)])
    assert len(set(keys.tolist())) == 3
    whole = uniform_noise(keys, 2, 10)
    assert torch.equal(uniform_noise(keys[[2, 0]], 2, 6), whole[[2, 0], :6])
    # SplitMix64 in plain Python
    mask = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    start = mix((int(keys[1]) + 0xD1B54A32D192ED03 * 3) & mask)
    third = mix((start + 3 * 0x9E3779B97F4A7C15) & mask)
    assert whole[1, 2].item() == ((third >> 11) + 0.5) * 2.0**-53


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_samples_follow_the_distribution(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    n = 20_000
    keys = torch.tensor([stream_key(0, [1], i) for i in range(n)])
    noisy = SeededSampling(keys, temperature=temperature, top_p=top_p)(
        torch.zeros(n, 1), logits.expand(n, 5)
    )
    found = torch.bincount(noisy.argmax(1), minlength=5) / n
    expected = (logits / temperature).softmax(0)
    if top_p < 1:  # 0.56 + 0.21 reach 0.6
        expected = torch.tensor([expected[0], expected[1], 0, 0, 0]) / expected[:2].sum()
    # 5 standard deviations
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


@pytest.mark.gpu
def test_noise_is_the_same_on_the_gpu():
    keys = torch.tensor([stream_key(0, [1, 2], i) for i in range(9)])
    assert torch.equal(uniform_noise(keys.cuda(), 3, 1000).cpu(), uniform_noise(keys, 3, 1000))
