import json

import pytest
import torch

from tests.text.architectures import make_model, make_tokenizer, random_texts
from torsh_text import Encoder
from torsh_text._backbone import Dense


def _encoder(**options):
    return Encoder(make_model("bert"), make_tokenizer(), max_length=40, **options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "cls", "normalize": True},
        {"pooling": ("mean", "max"), "lower_case": True},
        {"pooling": "weightedmean", "prompts": {"query": "w9 "}, "default_prompt": "query"},
    ],
)
def test_round_trip(tmp_path, options):
    encoder = _encoder(**options)
    texts = random_texts([5, 9, 1])
    expected = encoder.encode(texts)
    encoder.save_pretrained(tmp_path / "model")
    loaded = Encoder.from_pretrained(tmp_path / "model", device="cpu")
    assert torch.equal(loaded.encode(texts), expected)
    assert loaded.max_length == encoder.max_length
    assert loaded.prompts == encoder.prompts


def test_dense_layers_round_trip_and_load_in_sentence_transformers(tmp_path):
    encoder = _encoder(dense=[Dense(64, 16, bias=True, activation="Tanh")], normalize=True)
    texts = random_texts([5, 9, 1])
    expected = encoder.encode(texts)
    encoder.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded.encode(texts), expected)
    library = pytest.importorskip("sentence_transformers")
    peer = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert peer.max_seq_length == 40
    found = peer.encode(texts, convert_to_tensor=True)
    assert (found - expected).abs().max() <= 2e-6  # float32 rounding of unit vectors


def test_saving_again_replaces_files_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "model"
    encoder = _encoder()
    encoder.save_pretrained(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight += 1
    encoder.save_pretrained(folder)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = Encoder.from_pretrained(folder, device="cpu")
    assert torch.equal(loaded.encode("w5"), encoder.encode("w5"))
    assert "torsh" not in json.dumps(json.loads((folder / "config.json").read_text()))
