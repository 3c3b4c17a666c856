import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from torsh_data import ShardedDataset, convert
from torsh_data.__main__ import convert as convert_by_command
from torsh_data._image_file import find_fault, image_size, looks_whole
from torsh_data._images import ImageTree


def encoded(kind="JPEG", size=(9, 7), **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def make_tree(root, *names, content=None):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "0.jpg").write_bytes(encoded() if content is None else content)
    return root


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (300, 200)])
def test_what_pillow_writes_is_whole(tmp_path, kind, size):
    path = tmp_path / "picture"
    path.write_bytes(encoded(kind, size))
    assert find_fault(path) is None
    assert looks_whole(path.read_bytes())
    if kind in ("JPEG", "PNG"):
        assert image_size(path.read_bytes()) == (size[1], size[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(9, 7), (300, 200)])
def test_files_cut_short_anywhere_are_found(tmp_path, kind, size):
    content = encoded(kind, size)
    path = tmp_path / "picture"
    for end in np.linspace(0, len(content) - 4, 50).astype(int):
        path.write_bytes(content[:end])
        assert find_fault(path) in ("is empty", "is not an image", "is cut short"), end


def test_a_preview_does_not_stand_for_the_end_and_notes_behind_it_do_no_harm(tmp_path):
    small = encoded(size=(40, 40))
    large = encoded(size=(300, 200), quality=95)
    note = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    content = large[:2] + note + large[2:]
    assert np.asarray(Image.open(io.BytesIO(content))).shape == (200, 300, 3)
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    assert find_fault(path) is None
    path.write_bytes(content[:-2])
    assert find_fault(path) == "is cut short"
    path.write_bytes(content + b"\0" * 9000)
    assert find_fault(path) is None
    many = b"".join(b"\xff\xe2\xff\xff" + bytes(65533) for _ in range(2))
    path.write_bytes(large[:2] + many + large[2:])
    assert find_fault(path) is None
    path.write_bytes((large[:2] + many + note + large[2:])[:-2])
    assert find_fault(path) == "is cut short"


def test_broken_pictures_are_refused_by_name_or_skipped(tmp_path):
    tree = make_tree(tmp_path / "tree", "cat", "dog")
    (tree / "cat" / "empty.jpg").touch()
    (tree / "dog" / "broken.jpg").write_bytes(b"x")
    (tree / "dog" / "cut.jpg").write_bytes(encoded()[:-5])
    text = (
        r"3 of 5 files are broken: cat/empty.jpg is empty, dog/broken.jpg is not an image, "
        r"dog/cut.jpg is cut short"
    )
    with pytest.raises(ValueError, match=f"{text}; remove or replace them, .*skip_broken=True"):
        convert(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=f"{text}; they are left out"):
        convert(tree, tmp_path / "out", skip_broken=True)
    assert [s["label"] for s in ShardedDataset(tmp_path / "out")] == [0, 1]
    for number in range(9):
        (tree / "dog" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"12 of 14 files .*3.png is empty, \.\.\.; remove"):
        convert(tree, tmp_path / "two")
    with pytest.raises(ValueError, match="1 of 1 files are broken"):
        convert(make_tree(tmp_path / "bad", "a", content=b"x"), tmp_path / "two", skip_broken=True)


def test_folders_of_splits_are_refused_unless_they_are_named_as_classes(tmp_path):
    root = tmp_path / "cifar"
    for split in ("train", "test"):
        make_tree(root / split, "cat", "dog")
    text = (
        r"its folders \['test', 'train'\] hold no pictures but folders of them: \['cat', 'dog'\]; "
        r"convert each by itself, the others with classes= from the first, .*"
        r"name them: convert\(\.\.\., classes=\['test', 'train'\]\)"
    )
    with pytest.raises(ValueError, match=text):
        convert(root, tmp_path / "out")
    convert(root, tmp_path / "out", classes=["train", "test"])
    data = ShardedDataset(tmp_path / "out")
    assert [s["label"] for s in data] == [1, 1, 0, 0]
    assert data.metadata == {"classes": ["train", "test"]}


def test_the_command_says_how_to_convert_splits(tmp_path):
    for split in ("train", "test"):
        make_tree(tmp_path / "cifar" / split, "cat", "dog")
    with pytest.raises(
        SystemExit, match=r"with --classes-from the first's shards, so .* in Python"
    ):
        convert_by_command((str(tmp_path / "cifar"), str(tmp_path / "out")))


@pytest.mark.parametrize("change", ["size", "time", "name"])
def test_a_changed_picture_changes_the_fingerprint(tmp_path, change):
    tree = make_tree(tmp_path / "tree", "cat")
    before = ImageTree(tree).fingerprint
    assert ImageTree(tree).fingerprint == before
    path = tree / "cat" / "0.jpg"
    if change == "size":
        status = path.stat()
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.rename(path.with_name("1.jpg"))
    assert ImageTree(tree).fingerprint != before


def test_splits_with_other_folders_get_the_labels_of_one_list(tmp_path):
    convert(make_tree(tmp_path / "train", "a", "b", "c"), tmp_path / "one")
    classes = ShardedDataset(tmp_path / "one").metadata["classes"]
    val = make_tree(tmp_path / "val", "c", "a", ".hidden")
    convert(val, tmp_path / "two", classes=classes)
    data = ShardedDataset(tmp_path / "two")
    assert [s["label"] for s in data] == [0, 2]
    assert data.metadata == {"classes": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=r"classes=\['a', 'b'\] does not have \['c'\], which sou"):
        convert(val, tmp_path / "three", classes=["a", "b"])
    with pytest.raises(ValueError, match=r"classes=\['a', 'c', 'a'\] has a name twice"):
        convert(val, tmp_path / "three", classes=["a", "c", "a"])
    with pytest.raises(ValueError, match=r"classes=\['a'\] is for folders of pictures, which sou"):
        convert(tmp_path / "one", tmp_path / "three", classes=["a"])


def test_the_command_takes_classes_from_a_data_set_and_skips(tmp_path):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    convert(make_tree(tmp_path / "train", "a", "b", "c"), tmp_path / "one")
    val = make_tree(tmp_path / "val", "a", "c")
    (val / "c" / "1.jpg").touch()

    def run(*arguments):
        command = [sys.executable, "-m", "torsh_data", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    options = ("--classes-from", tmp_path / "one")
    refused = run("convert", val, tmp_path / "two", *options)
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith("or leave them out with --skip-broken")
    done = run("convert", val, tmp_path / "two", *options, "--skip-broken")
    assert done.stdout.endswith(
        "2 samples in 1 shards in {}\n3 classes: a, b, c\n".format(tmp_path / "two")
    )
    assert [s["label"] for s in ShardedDataset(tmp_path / "two")] == [0, 2]
    drawn = run("sheet", tmp_path / "train", tmp_path / "sheet.png", "--samples", 2)
    assert drawn.returncode == 0, drawn.stderr
    refused = run("sheet", tmp_path / "train", tmp_path / "missing" / "sheet.png")
    assert refused.returncode == 1
    assert refused.stderr.startswith("torsh-data: ")
    assert "Traceback" not in refused.stderr
    facts = json.loads(run("inspect", tmp_path / "one", "--json").stdout)
    assert facts["classes"] == "3 classes: a, b, c"
