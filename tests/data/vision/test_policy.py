"""What holds for every policy: inputs, keys, and what a result depends on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

import torsh_data
from torsh_data import ShardedDataset, StreamLoader, vision, write_shards
from torsh_data._rng import generator, sample_keys
from torsh_data.vision._engine import Drawn

POLICIES = {
    "RandAugment": vision.RandAugment(num_ops=3, interpolation="bilinear"),
    "TrivialAugmentWide": vision.TrivialAugmentWide(),
    "imagenet": vision.AutoAugment("imagenet"),
    "cifar10": vision.AutoAugment("cifar10"),
    "svhn": vision.AutoAugment("svhn"),
    "AugMix": vision.AugMix(),
}
each_policy_class = pytest.mark.parametrize(
    "kind",
    [vision.RandAugment, vision.TrivialAugmentWide, vision.AutoAugment, vision.AugMix],
)
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def picture(tensor):
    pixels = tensor[0] if len(tensor) == 1 else tensor.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def unpicture(image):
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@each_policy
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_result_depends_on_key_and_image_alone(policy, dtype, pictures, keys):
    images = pictures().repeat(4, 1, 1, 1)
    images = images if dtype == torch.uint8 else images / 255
    numbers = keys(len(images))
    whole = policy(images, numbers)
    order = torch.randperm(len(images))
    assert torch.equal(policy(images[order], numbers[order]), whole[order])
    parts = [policy(images[:5], numbers[:5]), policy(images[5:], numbers[5:])]
    assert torch.equal(torch.cat(parts), whole)
    for k in range(0, len(images), 3):
        assert torch.equal(policy(images[k], numbers[k]), whole[k])
    copy = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(policy(copy, numbers), whole)
    assert torch.equal(policy(images.contiguous(memory_format=torch.channels_last), numbers), whole)


@each_policy
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pillow_image_gets_what_its_tensor_gets(policy, channels, pictures, keys):
    images = pictures(channels)
    for image, key in zip(images, keys(9).tolist(), strict=True):
        done = policy(picture(image), key)
        assert isinstance(done, Image.Image)
        assert done.mode == ("L" if channels == 1 else "RGB")
        assert torch.equal(unpicture(done), policy(image, key))


@each_policy
def test_a_list_holds_images_of_any_size_and_kind(policy, pictures, keys):
    images = [*pictures()[:3], *pictures(1)[:2], *pictures(3, 20, 41)[:3], pictures()[4] / 255]
    mixed = [picture(images[0]), *images[1:4], picture(images[4]), *images[5:]]
    numbers = keys(len(images))
    done = policy(mixed, numbers)
    assert isinstance(done, list)
    for one, image, key in zip(done, images, numbers.tolist(), strict=True):
        expected = policy(image, key)
        result = unpicture(one) if isinstance(one, Image.Image) else one
        assert torch.equal(result, expected)
    assert isinstance(done[0], Image.Image)
    assert policy([]) == []


@each_policy
def test_inputs_are_left_alone_and_kinds_are_kept(policy, pictures):
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        images = pictures() if dtype == torch.uint8 else (pictures() / 255).to(dtype)
        before = images.clone()
        done = policy(images, torch.arange(9))
        assert torch.equal(images, before)
        assert done.dtype == dtype
        assert done.shape == images.shape
        if dtype != torch.uint8:
            assert 0 <= done.min() <= done.max() <= 1
    assert policy(pictures()[:0]).shape == (0, 3, 37, 30)


@each_policy
def test_images_of_a_batch_draw_their_own_operations(policy, pictures):
    images = pictures()[:1].expand(64, -1, -1, -1)
    assert len({image.numpy().tobytes() for image in policy(images, torch.arange(64))}) > 15


@each_policy
def test_without_keys_the_generator_of_torch_decides(policy, pictures):
    images = pictures()
    torch.manual_seed(3)
    first, second = policy(images), policy(images)
    torch.manual_seed(3)
    assert torch.equal(policy(images), first)
    assert not torch.equal(first, second)


@each_policy
def test_the_generator_of_a_transform_stands_for_its_key(policy, pictures):
    image, rng = pictures()[0], generator(-12345)
    rng.random(7)  # what a transform drew before changes nothing
    assert torch.equal(policy(image, rng=rng), policy(image, -12345))
    assert torch.equal(policy(image[None], rng=rng)[0], policy(image, -12345))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_gives_what_the_batch_gives(workers, tmp_path, pictures):
    images = pictures().repeat(3, 1, 1, 1)
    write_shards(({"image": i, "label": k} for k, i in enumerate(images)), tmp_path / "shards")
    for policy in (POLICIES["RandAugment"], POLICIES["svhn"], POLICIES["AugMix"]):

        def augmented(sample, rng, policy=policy):
            return {**sample, "image": policy(sample["image"], rng=rng)}

        plain = StreamLoader(ShardedDataset(tmp_path / "shards"), 4, seed=3, epoch=2)
        data = ShardedDataset(tmp_path / "shards", transform=augmented)
        single = StreamLoader(data, 6, seed=3, epoch=2, num_workers=workers, drop_last=False)
        inside = {}
        for batch in single:
            inside |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
        for batch in plain:
            done = policy(batch["image"], batch["key"])
            for index, image in zip(batch["index"].tolist(), done, strict=True):
                assert torch.equal(inside[index], image)


@pytest.mark.parametrize(("workers", "kind"), [(0, "process"), (2, "process"), (2, "thread")])
def test_a_transform_gives_what_the_pipeline_gives(workers, kind, tmp_path, pictures):
    """The policy in workers with the sample's generator, or after the loader in the batch."""
    images = pictures().repeat(3, 1, 1, 1)
    write_shards(({"image": i, "label": k % 5} for k, i in enumerate(images)), tmp_path / "shards")
    policy, finish = vision.RandAugment(), {"flip": 0.5, "erase": 0.5, "erase_value": "random"}

    def augmented(sample, rng):
        rng.random(5)  # a crop draws first
        return {**sample, "image": policy(sample["image"], rng=rng)}

    data = ShardedDataset(tmp_path / "shards", transform=augmented)
    inside = StreamLoader(data, 9, seed=3, epoch=2, num_workers=workers, workers=kind)
    outside = StreamLoader(ShardedDataset(tmp_path / "shards"), 9, seed=3, epoch=2)
    mix = vision.MixupCutmix(5)
    before = vision.BatchPipeline(None, mix=mix, **finish)
    after = vision.BatchPipeline(policy, mix=mix, **finish)
    for a, b in zip(inside, outside, strict=True):
        assert a["index"].tolist() == b["index"].tolist()
        first, second = before(a), after(b)
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])


def test_in_a_subset_the_generator_is_that_of_the_inner_sample(tmp_path, pictures):
    write_shards(({"image": i, "id": k} for k, i in enumerate(pictures())), tmp_path / "shards")
    policy, chosen = vision.RandAugment(), [8, 2, 5, 3]
    data = ShardedDataset(
        tmp_path / "shards",
        transform=lambda sample, rng: {**sample, "image": policy(sample["image"], rng=rng)},
    )
    for epoch in (0, 1):
        (batch,) = StreamLoader(Subset(data, chosen), 4, seed=3, epoch=epoch)
        own = sample_keys(3, epoch, batch["id"].numpy())
        assert torch.equal(batch["image"], policy(pictures()[batch["id"]], own))
        assert batch["id"].tolist() == [chosen[k] for k in batch["index"].tolist()]


def test_another_generator_gives_its_next_numbers(pictures):
    images, policy = pictures(), vision.RandAugment()
    first = policy(images, rng=np.random.default_rng(5))
    assert torch.equal(policy(images, rng=np.random.default_rng(5)), first)
    rng = np.random.default_rng(5)
    policy(images, rng=rng)
    assert not torch.equal(policy(images, rng=rng), first)
    philox = np.random.Generator(np.random.Philox(5))  # of NumPy's own seeding: not a sample's
    assert not torch.equal(policy(images[0], rng=philox), policy(images[0], rng=philox)) or (
        not torch.equal(policy(images[1], rng=philox), policy(images[1], rng=philox))
    )


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(POLICIES)),
    count=st.integers(0, 4),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**60),
)
def test_any_shape_goes_through(name, count, channels, height, width, dtype, seed):
    policy = POLICIES[name]
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (count, channels, height, width), dtype=torch.uint8, generator=rng
    )
    numbers = seed + torch.arange(count)
    if dtype != torch.uint8:
        images = (images / 255).to(dtype)
    done = policy(images, numbers)
    assert done.shape == images.shape
    assert done.dtype == dtype
    for image, key, result in zip(images, numbers.tolist(), done, strict=True):
        assert torch.equal(policy(image, key), result)
        if dtype == torch.uint8:
            assert torch.equal(unpicture(policy(picture(image), key)), result)


def test_a_policy_of_ones_own_needs_a_draw(pictures):
    class Negative(vision.Policy):
        def draw(self, keys, height, width):
            return Drawn(torch.full((1, len(keys)), 14), torch.zeros(1, len(keys)).double())

    images = pictures()
    assert torch.equal(Negative()(images), 255 - images)
    with pytest.raises(NotImplementedError, match="Policy has no draw"):
        vision.Policy()(images)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (1, {}, TypeError, "images is a int; use a Pillow image, a tensor"),
        ([1], {}, TypeError, r"images\[0\] is a int; use a Pillow image"),
        ([b"\xff\xd8"], {}, TypeError, r"images\[0\] is bytes, .* transform=f"),
        (
            [torch.zeros(2, 3, 4, 4)],
            {},
            ValueError,
            r"images\[0\] has shape \(2, 3, 4, 4\); a list",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), {}, TypeError, "dtype torch.int32; use uint8"),
        (torch.zeros(2, 4, 4, 4), {}, ValueError, r"shape \(2, 4, 4, 4\), expected"),
        ([torch.zeros(4, 4, 4)], {}, ValueError, r"shape \(1, 4, 4, 4\), expected"),
        (torch.zeros(4, 4), {}, ValueError, r"shape \(4, 4\)"),
        (torch.full((1, 3, 4, 4), 2.0), {}, ValueError, "values from 2 to 2; floats must be in"),
        (torch.full((1, 3, 4, 4), torch.nan), {}, ValueError, "values from nan to nan; floats"),
        (Image.new("RGBA", (4, 4)), {}, ValueError, r"mode 'RGBA'; use image.convert\('RGB'\)"),
        ([Image.new("1", (4, 4))], {}, ValueError, "mode '1'; use image.convert"),
        (
            torch.zeros(2, 3, 4, 4),
            {"keys": torch.zeros(3).long()},
            ValueError,
            r"keys has shape \(3,\)",
        ),
        ([torch.zeros(3, 4, 4)] * 2, {"keys": 1}, ValueError, "for each of 2 images"),
        (
            torch.zeros(2, 3, 4, 4),
            {"keys": torch.zeros(2)},
            TypeError,
            "keys has dtype torch.float32; use whole numbers",
        ),
        (torch.zeros(3, 4, 4), {"rng": 7}, TypeError, "rng is a int; use a numpy.random.Generator"),
        (
            torch.zeros(1, 3, 4, 4),
            {"keys": 1, "rng": np.random.default_rng(0)},
            ValueError,
            "keys and rng are both given",
        ),
    ],
)
def test_inputs_that_are_not_images_are_refused(images, options, error, message):
    with pytest.raises(error, match=message):
        vision.RandAugment()(images, **options)


def test_a_fill_that_does_not_fit_is_refused(pictures):
    with pytest.raises(ValueError, match=r"fill=\[1, 2\] has 2 values for 3 channels"):
        vision.RandAugment(fill=[1, 2])(pictures())


@each_policy_class
@pytest.mark.parametrize(
    ("fill", "error", "message"),
    [
        (-1, ValueError, r"fill=-1 must be in \[0, 255\] for uint8, in \[0, 1\] for floats"),
        (256, ValueError, "fill=256 must be in"),
        ((0, 0, 300.0), ValueError, r"fill=\(0, 0, 300.0\) must be in"),
        (np.array([0, 256, 0]), ValueError, r"fill=\[0, 256, 0\] must be in"),
        (float("nan"), ValueError, "fill=nan must be finite"),
        ((0.0, float("inf")), ValueError, r"fill=\(0.0, inf\) must be finite"),
        (True, TypeError, "fill=True must be a number, not a bool"),
        ("black", TypeError, "fill='black' must be a number, not a str"),
        ([[1, 2, 3]], TypeError, r"fill=\[\[1, 2, 3\]\] must hold numbers, not a list"),
    ],
)
def test_a_fill_that_is_no_value_of_a_pixel_is_refused(kind, fill, error, message):
    with pytest.raises(error, match=message):
        kind(fill=fill)


def test_floats_are_filled_with_a_share(pictures):
    with pytest.raises(ValueError, match=r"fill=128 must be in \[0, 1\] for images of torch.float"):
        vision.RandAugment(fill=128)(pictures() / 255)
    vision.RandAugment(fill=np.float32(0.5))(pictures() / 255)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_fill_may_be_an_array_or_a_tensor(make, pictures):
    images = pictures()
    for fill in (7, [1, 2, 3]):
        expected = vision.TrivialAugmentWide(fill=fill)(images, range(9))
        assert torch.equal(vision.TrivialAugmentWide(fill=make(fill))(images, range(9)), expected)
        assert not torch.equal(vision.TrivialAugmentWide()(images, range(9)), expected)


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (vision.RandAugment, "num_ops"),
        (vision.RandAugment, "magnitude"),
        (vision.RandAugment, "num_magnitude_bins"),
        (vision.TrivialAugmentWide, "num_magnitude_bins"),
        (vision.AugMix, "severity"),
        (vision.AugMix, "mixture_width"),
        (vision.AugMix, "chain_depth"),
        (vision.MixupCutmix, "num_classes"),
    ],
)
def test_whole_numbers_are_not_taken_from_other_kinds(kind, name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r} must be a whole number, not a "):
        kind(**{name: value})
    kind(**{name: np.int64(10)})


def test_importing_the_package_leaves_pillow_alone():
    import subprocess
    import sys

    code = "import sys, torsh_data.vision; assert not {'PIL', 'torchvision'} & set(sys.modules)"
    path = str(__import__("pathlib").Path(torsh_data.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


@pytest.mark.gpu
@each_policy
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_gpu_gives_the_same_images(policy, channels, dtype, pictures, keys):
    images = pictures(channels).repeat(30, 1, 1, 1)
    images = images if dtype == torch.uint8 else images / 255
    numbers = keys(len(images))
    here, there = policy(images, numbers), policy(images.cuda(), numbers).cpu()
    if policy.interpolation == "nearest":
        assert torch.equal(here, there)
    else:  # the last bit of grid_sample, seldom next to a half, and what a second layer makes of it
        # (measured on an H100: 1.1e-3 of the pixels with AugMix, which has three chains)
        limit = 3e-3 if dtype == torch.uint8 else 1e-2
        assert ((here.float() - there.float()).abs() > 1e-5).float().mean() < limit


@pytest.mark.gpu
@each_policy
def test_nothing_waits_for_the_gpu(policy, pictures, keys, forbid_synchronisation):
    for images in (pictures().cuda(), (pictures() / 255).cuda()):
        policy(images, keys(9))
        with forbid_synchronisation():
            policy(images, keys(9))
