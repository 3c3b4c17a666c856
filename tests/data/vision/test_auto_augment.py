import numpy as np
import pytest
import torch
from scipy import stats

from torsh_data import vision
from torsh_data.vision._auto_augment import sub_policies
from torsh_data.vision._tables import AUTO_AUGMENT, CODES, OPS, SIGNED

NAMES = ("imagenet", "cifar10", "svhn")


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_those_of_torchvision(name):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy(name))._policies
    ours = sub_policies(name)
    assert len(ours) == len(theirs) == 25
    for mine, other in zip(ours, theirs, strict=True):
        assert [tuple(step) for step in mine] == [(op, p, m or 0) for op, p, m in other]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_operations_are_as_frequent_as_the_table_says(name, keys):
    expected: dict[tuple[int, int], float] = {}
    for (first, p, _), (second, q, _) in sub_policies(name):
        for a, share in ((CODES[first], p), (0, 1 - p)):
            for b, other in ((CODES[second], q), (0, 1 - q)):
                expected[a, b] = expected.get((a, b), 0.0) + share * other / 25
    count = 25_000
    codes, _ = vision.AutoAugment(name).draw(keys(count), 32, 32)
    pairs, counts = np.unique(codes.numpy(), axis=1, return_counts=True)
    seen = {tuple(pair): n for pair, n in zip(pairs.T.tolist(), counts, strict=True)}
    likely = {pair: p for pair, p in expected.items() if p > 1e-12}
    assert set(seen) <= set(likely)
    result = stats.chisquare(
        [seen.get(pair, 0) for pair in likely], np.array([*likely.values()]) * count
    )
    assert result.pvalue > 1e-3


def test_strengths_are_those_of_the_pair(keys):
    table = AUTO_AUGMENT.magnitudes(10, 50, 70)
    codes, powers = vision.AutoAugment("svhn").draw(keys(4000), 50, 70)
    for layer in range(2):
        steps = [pair[layer] for pair in sub_policies("svhn")]
        for code in codes[layer].unique().tolist():
            name = OPS[code]
            drawn = powers[layer][codes[layer] == code]
            if name == "Identity":
                continue
            row = table[AUTO_AUGMENT.ops.index(name)]
            allowed = {row[m].item() for op, p, m in steps if op == name and p}
            assert set(drawn.abs().tolist()) == allowed
            if name in SIGNED:
                assert stats.binomtest(int((drawn > 0).sum()), len(drawn)).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_both_operations_of_torchvision_are_applied(name, pictures, keys, step_by_step):
    images = pictures().repeat(8, 1, 1, 1)
    augment, numbers = vision.AutoAugment(name), keys(72)
    codes, powers = augment.draw(numbers, *images.shape[-2:])
    done = augment(images, numbers)
    for k, image in enumerate(images):
        names = [OPS[code] for code in codes[:, k].tolist()]
        expected = step_by_step(image, zip(names, powers[:, k].tolist(), strict=True))
        assert torch.equal(done[k], expected)


def test_the_module_shows_its_settings():
    assert "policy='svhn'" in repr(vision.AutoAugment("svhn"))
    assert vision.AutoAugment().policy == "imagenet"


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy='mnist'; use 'imagenet', 'cifar10' or 'svhn'"):
        vision.AutoAugment("mnist")
    with pytest.raises(ValueError, match=r"policy=\['svhn'\]; use 'imagenet', 'cifar10'"):
        vision.AutoAugment(["svhn"])


def test_a_probability_of_zero_never_applies(keys):
    codes, _ = vision.AutoAugment("imagenet").draw(torch.arange(3000), 32, 32)
    never = (codes[0] == CODES["Equalize"]) & (codes[1] == CODES["Equalize"])
    # only "Equalize 0.8, Equalize 0.6", twice in the table, gives both: 2 / 25 * 0.48
    assert stats.binomtest(int(never.sum()), 3000, 2 / 25 * 0.48).pvalue > 1e-3
