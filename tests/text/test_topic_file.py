import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.text.architectures import make_model, make_tokenizer, random_texts
from tests.text.topic_documents import METHODS, documents, fitted, topics_of
from torsh_text import Encoder, TopicModel


def _content(path):
    """All that a file holds; the order within safetensors' own header is left to chance."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118


def test_another_process_gives_the_same_file(tmp_path):
    code = (
        "import sys, torch; from torsh_text import TopicModel;"
        "x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1));"
        "texts = [f'w{i % 7} v{i % 11} u{i}' for i in range(80)];"
        "TopicModel(k=6, seed=3).fit(texts, vectors=x).save(sys.argv[1])"
    )
    for name, salt in (("a", "1"), ("b", "2")):  # words come out of sets in another order
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            check=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": salt},
        )
    assert _content(tmp_path / "a") == _content(tmp_path / "b")


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_bit_for_bit(method, tmp_path):
    texts, x, _ = documents()
    model = fitted(method, texts, x, words=4, stop_words={"plum"})
    model.update(texts[:9], vectors=None if method == "nmf" else x[:9])
    model.reduce(2)
    path = tmp_path / "topics.safetensors"
    model.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["topics.safetensors"]
    same = TopicModel.load(path)
    assert same.topics == model.topics
    assert same.merges == model.merges
    assert same.stop_words == {"plum"}
    for both in (model, same):  # and both go on alike
        both.update(texts[10:30], vectors=None if method == "nmf" else x[10:30])
    assert same.topics == model.topics
    a, b = topics_of(model, texts, x), topics_of(same, texts, x)
    assert torch.equal(a.affinities, b.affinities)
    assert torch.equal(a.labels, b.labels)
    model.save(path)
    same.save(tmp_path / "again")
    assert _content(path) == _content(tmp_path / "again")
    assert _content(path)[0]["format"] == "torsh-text-topics"


def test_damaged_and_foreign_files_are_refused(tmp_path):
    texts, x, _ = documents()
    path = tmp_path / "m"
    TopicModel(k=3).fit(texts, vectors=x).save(path)
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for at in range(start, len(good), max(1, (len(good) - start) // 40)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(ValueError, match="is damaged: its checksum does not fit"):
            TopicModel.load(path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="no safetensors file or damaged"):
        TopicModel.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no topic model"):
        TopicModel.load(path)
    path.write_bytes(good)
    with safe_open(path, framework="pt") as file:
        description = file.metadata()
    save_file(load_file(path), path, metadata=description | {"version": "9"})
    with pytest.raises(ValueError, match="has version 9 of its format; this release reads"):
        TopicModel.load(path)
    with pytest.raises(FileNotFoundError):
        TopicModel.load(tmp_path / "nothing")


def test_what_a_file_cannot_hold_has_to_be_given_again(tmp_path):
    texts, x, _ = documents()
    TopicModel(k=3, tokenize=str.split).fit(texts, vectors=x).save(tmp_path / "own")
    TopicModel(k=3).fit(texts, vectors=x).save(tmp_path / "plain")
    with pytest.raises(ValueError, match="was made with a tokenize of its own; pass it"):
        TopicModel.load(tmp_path / "own")
    assert TopicModel.load(tmp_path / "own", tokenize=str.split).tokenize is str.split
    with pytest.raises(ValueError, match="was made with the built-in tokenize; leave it out"):
        TopicModel.load(tmp_path / "plain", tokenize=str.split)


def test_another_encoder_is_noticed(tmp_path):
    tiny = Encoder(make_model("bert"), make_tokenizer(), max_length=20).eval()
    texts = random_texts([5] * 6)
    model = TopicModel(tiny, k=2).fit(texts)
    model.save(tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = TopicModel.load(tmp_path / "m", tiny)
        TopicModel.load(tmp_path / "m")
    assert torch.equal(same.transform(texts).labels, model.transform(texts).labels)
    other = Encoder(make_model("roberta"), make_tokenizer(), max_length=20).eval()
    with pytest.warns(UserWarning, match="encoder is not the one"):
        TopicModel.load(tmp_path / "m", other)
