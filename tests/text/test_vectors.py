import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from torsh_text._vectors import check_target, save_vectors


def test_vectors_and_their_description_are_one_file(tmp_path):
    path = tmp_path / "x.safetensors"
    other = tmp_path / "x.json"
    other.write_text("mine")
    vectors = torch.randn(3, 4)
    save_vectors(path, vectors.T.contiguous().T, model="m", fingerprint="f")
    assert torch.equal(load_file(path)["vectors"], vectors)
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    assert found == {
        "format": "torsh-text-vectors",
        "version": "1",
        "model": "m",
        "fingerprint": "f",
        "blake2b": hashlib.blake2b(vectors.numpy().tobytes(), digest_size=16).hexdigest(),
    }
    assert other.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


def test_only_vectors_are_replaced(tmp_path):
    source, target = tmp_path / "texts.txt", tmp_path / "x.safetensors"
    source.write_text("a text")
    check_target(target, source)
    save_vectors(target, torch.randn(3, 4), model="m", fingerprint="f")
    check_target(target, source)
    save_file({"weight": torch.zeros(2)}, target)
    with pytest.raises(ValueError, match=r"x\.safetensors' exists and is no file of vectors"):
        check_target(target, source)
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    with pytest.raises(ValueError, match="is the file of the texts"):
        check_target(link, source)


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x"])
def test_the_name_says_what_is_in_the_file(tmp_path, name):
    with pytest.raises(ValueError, match=r"end the name in \.safetensors"):
        check_target(tmp_path / name, tmp_path / "texts.txt")


def test_the_folder_has_to_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none'; make it first"):
        check_target(tmp_path / "none" / "x.safetensors", tmp_path / "texts.txt")
