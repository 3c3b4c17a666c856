import hashlib
import json

import torch
from safetensors.torch import load_file

from torsh_text._vectors import save_vectors


def test_vectors_and_their_description(tmp_path):
    path = tmp_path / "x.safetensors"
    vectors = torch.randn(3, 4)
    save_vectors(path, vectors.T.contiguous().T, model="m", fingerprint="f", texts=3)
    assert torch.equal(load_file(path)["vectors"], vectors)
    found = json.loads((tmp_path / "x.json").read_text())
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert found == {
        "format": "torsh-text-vectors",
        "version": 1,
        "model": "m",
        "fingerprint": "f",
        "texts": 3,
        "dim": 4,
        "blake2b": digest,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
