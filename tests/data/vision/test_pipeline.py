import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torsh_data import ShardedDataset, StreamLoader, vision, write_shards
from torsh_data.vision._pipeline import BatchPipeline

PLAIN = {"flip": 0.0, "erase": 0.0, "dtype": torch.float32}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalized(images):
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    return transforms.normalize(images.double() / 255, MEAN, STD)


def full(**options):
    return BatchPipeline(vision.RandAugment(), mix=vision.MixupCutmix(10), **options)


def test_images_are_normalized_like_torchvision_does_it(pictures):
    done = BatchPipeline(**PLAIN)(pictures())
    assert done.dtype == torch.float32
    assert done.is_contiguous(memory_format=torch.channels_last)
    # two roundings of float32 in values up to 255
    assert torch.allclose(done.double(), normalized(pictures()), rtol=0, atol=2e-6)
    floats = BatchPipeline(**PLAIN)(pictures() / 255)
    assert torch.allclose(floats.double(), normalized(pictures()), rtol=0, atol=2e-6)


def test_the_defaults_suit_a_model_as_torch_makes_it(pictures):
    done = BatchPipeline()(pictures())
    assert done.dtype == torch.float32
    torch.nn.Conv2d(3, 1, 3)(done)
    assert done.is_contiguous(memory_format=torch.channels_last)
    rows = BatchPipeline(memory_format=torch.contiguous_format)(pictures())
    assert rows.is_contiguous()


def test_the_asked_share_of_the_images_is_mirrored(keys):
    images = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4).expand(10_000, 1, 2, 4)
    pipeline = BatchPipeline(**{**PLAIN, "flip": 0.3}, mean=(0.0,), std=(1 / 255,))
    done = pipeline(images, keys=keys(10_000))
    flipped = done[:, 0, 0, 0] > done[:, 0, 0, 3]
    assert torch.equal(done[flipped][0], images[0].flip(2).float())
    assert torch.equal(done[~flipped][0], images[0].float())
    assert stats.binomtest(int(flipped.sum()), 10_000, 0.3).pvalue > 1e-3


def test_a_box_is_erased_after_normalizing(pictures, keys):
    images = pictures(3, 64, 64).repeat(20, 1, 1, 1)
    plain = BatchPipeline(**PLAIN)(images)
    done = BatchPipeline(**{**PLAIN, "erase": 1.0}, erase_value=-7.0)(images, keys=keys(180))
    for before, after in zip(plain, done, strict=True):
        erased = (after == -7.0).all(0)
        assert torch.equal(torch.where(erased, torch.tensor(-7.0), before), after)
        rows, columns = erased.nonzero().unbind(1)
        assert erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert 0.01 < erased.float().mean() < 0.35  # sides are rounded to pixels


def test_random_values_fill_boxes_with_noise(pictures, keys):
    images = pictures(3, 64, 64).repeat(20, 1, 1, 1)
    options = {**PLAIN, "erase": 0.5}
    at = BatchPipeline(**options, erase_value=-7.0)(images, keys=keys(180)) == -7.0
    done = BatchPipeline(**options, erase_value="random")(images, keys=keys(180))
    plain = BatchPipeline(**PLAIN)(images)
    assert torch.equal(done[~at], plain[~at])
    noise = done[at]
    assert noise.mean().abs() < 4 / len(noise) ** 0.5  # four standard errors
    assert (noise.var() - 1).abs() < 4 * (2 / len(noise)) ** 0.5
    assert len(noise.unique()) > 10_000


def test_steps_are_those_of_the_parts_one_by_one(pictures, keys):
    images, labels, numbers = pictures(), torch.arange(9), keys(9)
    policy, mix = vision.RandAugment(), vision.MixupCutmix(10, label_smoothing=0.1)
    done, targets = BatchPipeline(policy, 0.0, 0.0, mix, dtype=torch.float32)(
        images, labels, numbers
    )
    plain = BatchPipeline(**PLAIN)(policy(images, numbers))
    expected = mix(plain, labels, numbers)
    assert torch.equal(done, expected[0])
    assert torch.equal(targets, expected[1])


def test_a_pair_of_images_depends_on_the_keys_alone(pictures, keys):
    images, labels, numbers = pictures().repeat(3, 1, 1, 1), torch.arange(27) % 10, keys(27)
    pipeline = full(erase_value="random")
    done, targets = pipeline(images, labels, numbers)
    order = torch.randperm(27)
    again = pipeline(images[order], labels[order], numbers[order])
    assert torch.equal(again[0], done[order])
    assert torch.equal(again[1], targets[order])


def test_without_mixing_an_image_depends_on_its_own_key(pictures, keys):
    images, numbers = pictures(), keys(9)
    pipeline = BatchPipeline(vision.AutoAugment(), erase=0.7, erase_value="random")
    whole = pipeline(images, keys=numbers)
    for k in range(9):
        assert torch.equal(pipeline(images[k, None], keys=numbers[k, None])[0], whole[k])


def test_flips_boxes_and_mixtures_are_independent(keys):
    plan = full(erase=0.5).draw(keys(8000), 64, 64)
    erased = plan.erase[:, 1] > plan.erase[:, 0]
    cut = plan.mixture.weight == 1
    for a, b in ((plan.flip, erased), (plan.flip, cut), (erased, cut)):
        table = [[int((x & y).sum()) for y in (b, ~b)] for x in (a, ~a)]
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_in_evaluation_mode_it_only_normalizes(pictures):
    pipeline = full(dtype=torch.float32).eval()
    labels = torch.arange(9)
    done, targets = pipeline(pictures(), labels)
    assert targets is labels
    assert torch.equal(done, BatchPipeline(**PLAIN)(pictures()))
    assert isinstance(pipeline(pictures()), torch.Tensor)


def test_a_mapping_keeps_what_is_not_prepared(pictures, keys):
    batch = {
        "image": pictures(),
        "label": torch.arange(9),
        "key": keys(9),
        "name": list("abcdefghi"),
    }
    done = full()(batch)
    assert list(done) == list(batch)
    assert done["name"] is batch["name"]
    expected = full()(batch["image"], batch["label"], batch["key"])
    assert torch.equal(done["image"], expected[0])
    assert torch.equal(done["label"], expected[1])
    renamed = BatchPipeline(vision.RandAugment(), image="x", label="y")
    assert torch.equal(
        renamed({"x": batch["image"], "key": batch["key"]})["x"],
        BatchPipeline(vision.RandAugment())(batch["image"], keys=batch["key"]),
    )


def test_batches_of_a_loader_come_out_alike_after_a_resume(pictures):
    samples = [{"image": i, "label": k % 10} for k, i in enumerate(pictures().repeat(4, 1, 1, 1))]
    pipeline = full()
    loader = StreamLoader(samples, 6, seed=1)
    whole = [pipeline(batch) for batch in loader]
    loader = StreamLoader(samples, 6, seed=1)
    for _, _ in zip(range(2), loader, strict=False):
        state = loader.state_dict()
    resumed = StreamLoader(samples, 6, seed=1, num_workers=2)
    resumed.load_state_dict(state)
    rest = [pipeline(batch) for batch in resumed]
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


def test_labels_pass_where_nothing_is_mixed(pictures):
    labels = torch.arange(9)
    done, same = BatchPipeline(vision.RandAugment())(pictures(), labels)
    assert same is labels
    assert done.shape == (9, 3, 37, 30)
    with_one, targets = full()(pictures()[:1], labels[:1])
    assert with_one.shape == (1, 3, 37, 30)
    assert torch.equal(targets[0], torch.nn.functional.one_hot(labels[0], 10).float())


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(0, 4),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    floats=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    value=st.sampled_from([0.0, "random"]),
)
def test_any_shape_goes_through(count, channels, height, width, floats, dtype, value):
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    images = images / 255 if floats else images
    pipeline = BatchPipeline(
        vision.TrivialAugmentWide(),
        erase=0.5,
        mix=vision.MixupCutmix(3),
        mean=MEAN[:channels],
        std=STD[:channels],
        dtype=dtype,
        erase_value=value,
    )
    done, targets = pipeline(images, torch.arange(count) % 3, torch.arange(count))
    assert done.shape == images.shape
    assert done.dtype == dtype
    assert done.isfinite().all()
    assert torch.allclose(targets.sum(1), torch.ones(count))


def test_it_shows_its_settings_and_has_no_state():
    assert "flip=0.5, erase=0.25" in repr(full())
    assert "(mix): MixupCutmix" in repr(full())
    assert full().state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip=1.5 must be in \[0, 1\]"),
        ({"erase": -0.1}, r"erase=-0.1 must be in \[0, 1\]"),
        ({"mean": (0.5,)}, r"mean=\(0.5,\) and std=\(0.229, 0.224, 0.225\) need one value each"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "need one value each for 1 or 3 channels"),
        ({"std": (0.2, 0.2, 0.0)}, r"std=\(0.2, 0.2, 0.0\) must be above 0"),
        ({"dtype": torch.uint8}, "dtype=torch.uint8 holds no normalized values"),
        ({"erase_scale": (0.5, 0.1)}, r"erase_scale=\(0.5, 0.1\) must be two numbers"),
        ({"erase_scale": (0.5, 1.1)}, r"erase_scale=\(0.5, 1.1\) must be in \[0, 1\]"),
        ({"erase_ratio": (0.0, 0.1)}, r"erase_ratio=\(0.0, 0.1\) must be above 0"),
        ({"erase_ratio": (0.3, 1.0, 3.0)}, r"erase_ratio=\(0.3, 1.0, 3.0\) must be two numbers"),
        ({"erase_ratio": (0.3, float("inf"))}, r"erase_ratio=\(0.3, inf\) must be finite"),
        ({"mean": (0.5, float("nan"), 0.5)}, r"mean=\(0.5, nan, 0.5\) must be finite"),
        ({"std": (0.5, float("inf"), 0.5)}, r"std=\(0.5, inf, 0.5\) must be finite"),
        ({"flip": float("nan")}, "flip=nan must be finite"),
        ({"erase_value": float("nan")}, "erase_value=nan must be finite"),
        ({"erase_value": "noise"}, "erase_value='noise'; use a number or 'random'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchPipeline(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": lambda images: images}, "policy is a function; use a Policy such as Rand"),
        ({"policy": vision.RandAugment}, "policy is a type; use a Policy"),
        ({"mix": torch.nn.Identity()}, r"mix is a Identity; use MixupCutmix\(num_classes\)"),
        ({"mean": 0.5}, "mean=0.5 must be a sequence of numbers, not a float"),
        ({"std": "abc"}, "std='abc' must be a sequence of numbers, not a str"),
        ({"mean": ("a", 0.5, 0.5)}, "must hold numbers, not a str"),
        ({"flip": True}, "flip=True must be a number, not a bool"),
        ({"erase": "all"}, "erase='all' must be a number, not a str"),
        ({"erase_scale": 0.3}, "erase_scale=0.3 must be a sequence"),
        ({"erase_value": None}, "erase_value=None must be a number"),
        ({"dtype": "float32"}, "dtype='float32' is no torch.dtype; use one such as torch.float32"),
        ({"memory_format": torch.preserve_format}, "use torch.channels_last or torch.contiguous"),
        ({"image": 0}, "image=0 must be the name of an entry of the batch"),
    ],
)
def test_settings_of_another_kind_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        BatchPipeline(**options)


def test_moments_may_be_tensors_and_arrays(pictures):
    done = BatchPipeline(**PLAIN, mean=torch.tensor(MEAN).double(), std=np.array(STD))(pictures())
    assert torch.equal(done, BatchPipeline(**PLAIN)(pictures()))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, r"images is a int; use a tensor \(batch, channels, height, width\), or a mapping"),
        (np.zeros((2, 3, 4, 4)), "images is a ndarray; use a tensor"),
        ([torch.zeros(3, 4, 4)], "images is a list; use a tensor .* brings images to one size"),
        (b"\xff\xd8", "images is bytes, such as those of an image file; decode them"),
        ([b"\xff\xd8"], r"images\[0\] is bytes.* transform=f\) with torchvision.io.decode_image"),
        ({"image": [b"\xff\xd8"]}, r"images\[0\] is bytes, .* \(tar files: decode='torch'\)"),
        ({"image": torch.zeros(1, 3, 4, 4), "label": [1]}, "labels is a list; use a tensor"),
        (torch.zeros(2, 3, 4, 4).long(), "images has dtype torch.int64; use uint8"),
    ],
)
def test_batches_of_another_kind_are_refused(images, message):
    with pytest.raises(TypeError, match=message):
        full()(images) if not isinstance(images, torch.Tensor) else BatchPipeline()(images)


def test_a_loader_of_files_says_how_to_decode_them(tmp_path):
    write_shards([{"image": b"\xff\xd8\xff\xe0" * 9, "label": 0}] * 4, tmp_path / "files")
    batch = next(iter(StreamLoader(ShardedDataset(tmp_path / "files"), 4)))
    with pytest.raises(TypeError, match=r"images\[0\] is bytes.*transform=f"):
        full()(batch)


@pytest.mark.parametrize("make", [list, np.asarray, lambda keys: torch.tensor(keys).int()])
def test_keys_may_come_in_a_list_or_an_array(make, pictures):
    expected = full()(pictures(), torch.arange(9), torch.arange(9))
    done = full()(pictures(), torch.arange(9), make(range(9)))
    assert torch.equal(done[0], expected[0])
    assert torch.equal(done[1], expected[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4, 4), torch.zeros(1).long()), r"shape \(3, 4, 4\), expected 4 dim"),
        ((torch.zeros(2, 1, 4, 4), torch.zeros(2).long()), r"has 3 values for 1 channels"),
        ((torch.zeros(2, 3, 4, 4),), "labels is missing, but mix changes the labels"),
        ((torch.zeros(2, 3, 4, 4) + 3, torch.zeros(2).long()), "values from 3 to 3"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), torch.zeros(1).long()), "keys has shape"),
        (({"img": 1},), r"the batch has \['img'\] and no 'image'; name the images with image="),
        (({"image": 1}, torch.zeros(1)), "labels and keys come from the batch"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        full()(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_prepares_the_same_batch(value, dtype, pictures, keys, forbid_synchronisation):
    images, labels = pictures().repeat(10, 1, 1, 1), torch.arange(90) % 10
    pipeline = full(erase=0.5, erase_value=value, dtype=dtype)
    here = pipeline(images, labels, keys(90))
    on_gpu, there = images.cuda(), labels.cuda()
    pipeline(on_gpu, there, keys(90))
    with forbid_synchronisation():
        done = pipeline(on_gpu, there, keys(90))
    assert torch.equal(done[0].cpu(), here[0])
    assert torch.equal(done[1].cpu(), here[1])
    assert done[0].is_contiguous(memory_format=torch.channels_last)
