import pytest
import torch
from transformers import AutoModelForTokenClassification

from tests.text.architectures import random_texts
from tests.text.taggers import LABELS, make_tagger
from torsh_text import Tagger


@pytest.mark.parametrize("crf", [False, True])
def test_saved_and_loaded(tmp_path, crf, capfd):
    tagger = make_tagger(crf=crf)
    capfd.readouterr()
    tagger.save_pretrained(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    saved, mine = plain.state_dict(), tagger.state_dict()
    assert {key.removeprefix("model.") for key in mine if key.startswith("model.")} == set(saved)
    assert all(torch.equal(mine["model." + key], value) for key, value in saved.items())
    assert plain.config.id2label == dict(enumerate(LABELS))
    again = Tagger.from_pretrained(tmp_path / "model", device="cpu")
    text = random_texts([70])[0]
    assert again.max_length == 40
    assert (again.crf is not None) == crf
    assert again.predict(text, stride=8) == tagger.predict(text, stride=8)
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())
    if crf:
        weights = tmp_path / "model" / "crf.safetensors"
        assert Tagger.from_pretrained(tmp_path / "model", device="cpu", crf=False).crf is None
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or not of this tagger"):
            Tagger.from_pretrained(tmp_path / "model", device="cpu")
        tagger.crf = None
        tagger.save_pretrained(tmp_path / "model")
        assert not weights.exists()
    settings = tmp_path / "model" / "torsh_tagger.json"
    good = settings.read_text()
    settings.write_text(good.replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="version 9, this package reads"):
        Tagger.from_pretrained(tmp_path / "model", device="cpu")
    settings.write_text(good[:20])
    with pytest.raises(ValueError, match="is damaged"):
        Tagger.from_pretrained(tmp_path / "model", device="cpu")
