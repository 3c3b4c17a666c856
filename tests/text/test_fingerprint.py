import copy

import pytest
import torch

from tests.text.architectures import VOCAB, make_model, make_tokenizer, random_texts
from torsh_text import Encoder, _backbone
from torsh_text._backbone import Dense


def test_fingerprint_follows_what_versions_do_not_show(tiny):
    before = tiny.fingerprint
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.1, fused=True)
    tiny(tiny.pack(["w5 w6"])).sum().backward()
    optimizer.step()
    assert tiny.fingerprint != before
    with torch.no_grad():
        kept = tiny.fingerprint
        tiny.backbone.embeddings.word_embeddings.weight.data.mul_(2)
    assert tiny.fingerprint != kept


def test_fingerprint_knows_activations_and_prompts():
    def fingerprint(activation="Tanh", prompt="w5 "):
        torch.manual_seed(0)
        dense = Dense(64, 16, bias=True, activation=activation)
        options = {"dense": [dense], "prompts": {"p": prompt}, "default_prompt": "p"}
        return Encoder(make_model("bert"), make_tokenizer(), max_length=40, **options).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint("ReLU"), fingerprint(prompt="w6 ")}) == 3


def _cutting(side):
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = side
    return Encoder(make_model("bert"), tokenizer, max_length=16).eval()


@pytest.mark.filterwarnings("ignore:1 of 1")
def test_the_side_that_is_cut_changes_the_fingerprint(tmp_path):
    left, right = _cutting("left"), _cutting("right")
    assert left.fingerprint != right.fingerprint == _cutting("right").fingerprint
    text = random_texts([30])
    kept = right.encode(text, cache=tmp_path)
    found = left.encode(text, cache=tmp_path)
    assert (found - left.encode(text)).abs().max() <= 2e-6
    assert (found - kept).abs().max() > 0.1


def test_an_upgrade_of_transformers_keeps_the_fingerprint(tiny, monkeypatch):
    before = tiny.fingerprint
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")
    assert '"99.0.0"' in tiny.backbone.config.to_json_string()
    assert tiny.fingerprint == before
    tiny.backbone.config.layer_norm_eps = 1e-6
    assert tiny.fingerprint != before


def test_fingerprint_is_remembered_and_notices_changes(tiny, monkeypatch):
    reads = []
    digest = _backbone.digest
    monkeypatch.setattr(_backbone, "digest", lambda *args: reads.append(1) or digest(*args))
    first = tiny.fingerprint
    assert tiny.fingerprint == first
    assert len(reads) == 1
    weight = tiny.backbone.embeddings.word_embeddings.weight
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    seen = {first}

    def changed():
        found = tiny.fingerprint
        assert found == tiny.fingerprint
        assert found not in seen
        seen.add(found)

    with torch.no_grad():
        weight[7, 3] += 1
    changed()
    weight.data.mul_(1.5)  # hidden from autograd
    changed()
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    tiny(tiny.pack(["w5 w6"])).sum().backward()
    optimizer.step()
    changed()
    tiny.backbone.embeddings.LayerNorm.weight = torch.nn.Parameter(torch.ones(64) * 2)
    changed()
    tiny.to(torch.float64)
    changed()
    tiny.to(torch.float32)
    tiny.load_state_dict(state)
    assert tiny.fingerprint == first
    doubled = {key: value * 2 for key, value in state.items() if value.is_floating_point()}
    tiny.load_state_dict(state | doubled, assign=True)
    changed()
    other = copy.deepcopy(tiny)
    assert other.fingerprint == tiny.fingerprint
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert other.fingerprint != tiny.fingerprint


def test_fingerprint_of_inference_tensors_is_read_anew(tiny):
    with torch.inference_mode():
        tiny.backbone.embeddings.word_embeddings.weight = torch.nn.Parameter(
            torch.zeros(VOCAB, 64), requires_grad=False
        )
        before = tiny.fingerprint
        tiny.backbone.embeddings.word_embeddings.weight[5, 5] = 1
        assert tiny.fingerprint != before
