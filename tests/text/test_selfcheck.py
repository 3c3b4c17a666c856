import warnings
from itertools import pairwise

import pytest
import torch

from tests.text.architectures import PACKED, PADDED, VOCAB, make_model, make_tokenizer, random_texts
from torsh_text import Encoder, PackedBatch
from torsh_text._attention import ATTENTION, last_states, packed_inputs, register_attention
from torsh_text._backbone import first_position
from torsh_text._selfcheck import adopt_packed_attention, longest_window, shallow_copy


def _batch(model, lengths=(150, 3, 40, 40, 17)):
    """Rows in no special order, one longer than every window of the small models."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return PackedBatch.pack(rows, first_position=first_position(model))


def _padded_reference(model, batch):
    """Token states by transformers' own SDPA on a padded batch."""
    model.set_attn_implementation("sdpa")
    pad_id = model.config.pad_token_id or 0
    inputs = batch.padded(pad_id)
    return last_states(model, inputs)[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("family", PACKED)
def test_packed_states_and_gradients_equal_padded_ones(family):
    model = make_model(family)
    batch = _batch(model)
    assert longest_window(model) < batch.max_length
    reference = _padded_reference(model, batch)
    weights = torch.randn_like(reference)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((reference * weights).sum(), parameters, allow_unused=True)
    verdict = adopt_packed_attention(
        model, first_position=first_position(model), max_length=160, pad_id=0
    )
    assert verdict is None
    assert model.config._attn_implementation == ATTENTION
    states = last_states(model, packed_inputs(batch))[0]
    # float32 rounding through a few layers, relative to states of about 1
    assert (states - reference).abs().max() <= 2e-6 * max(1.0, reference.abs().max().item())
    found = torch.autograd.grad((states * weights).sum(), parameters, allow_unused=True)
    largest = max(g.abs().max().item() for g in expected if g is not None)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).abs().max().item() <= 1e-5 * largest


@pytest.mark.parametrize("family", PACKED)
def test_the_check_would_see_a_leak(family):
    """Positions that run on, and one row instead of several, both have to change the states."""
    model = make_model(family)
    batch = _batch(model)
    reference = _padded_reference(model, batch)
    whole = PackedBatch(batch.buffer, (batch.num_tokens,), batch.first_position)
    register_attention()
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        leaked = last_states(model, packed_inputs(batch) | {"packed": whole})[0]
    assert (leaked - reference).abs().max() > 1e-2 * reference.abs().max()


@pytest.mark.parametrize("family", PADDED)
def test_models_that_cannot_pack_fall_back_with_one_warning(family):
    model, tokenizer = make_model(family), make_tokenizer()
    texts = random_texts([9, 2, 30])
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(2)
    expected = (states * mask).sum(1) / mask.sum(1)
    with pytest.warns(UserWarning, match="runs padded, which is slower: ") as caught:
        encoder = Encoder(model, tokenizer, max_length=64, name="my-model").eval()
    assert len(caught) == 1
    assert "my-model" in str(caught[0].message)
    assert encoder.attention.name == "padded"
    assert encoder.attention.why in encoder.explain()
    scale = expected.abs().max()
    assert (encoder.encode(texts) - expected).abs().max() <= 2e-6 * max(1.0, scale.item())
    with torch.no_grad():
        assert torch.allclose(encoder(encoder.pack(texts)), expected, atol=2e-6 * scale.item())


def test_insisting_on_packing_raises():
    with pytest.raises(RuntimeError, match=r"cannot run packed: .*attn='auto'"):
        Encoder(make_model("mobilebert"), make_tokenizer(), attn="packed")


def test_padded_on_request_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = Encoder(make_model("mobilebert"), make_tokenizer(), attn="padded")
    assert encoder.attention.name == "padded"


def test_a_wrong_first_position_is_found():
    model = make_model("roberta")
    verdict = adopt_packed_attention(model, first_position=0, max_length=64, pad_id=1)
    assert verdict is not None
    assert "off by" in verdict
    assert model.config._attn_implementation == "sdpa"


def test_verdicts_are_remembered_by_configuration(monkeypatch):
    verdicts: dict[object, object] = {}
    monkeypatch.setattr("torsh_text._selfcheck._verdicts", verdicts)
    arguments = {"first_position": 0, "max_length": 61, "pad_id": 0}
    adopt_packed_attention(make_model("bert"), **arguments)
    adopt_packed_attention(make_model("bert"), **arguments)
    assert len(verdicts) == 1


def test_half_precision_weights_are_checked_without_changing_them():
    model = make_model("bert").to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = {"first_position": 0, "max_length": 62, "pad_id": 0}
    assert adopt_packed_attention(model, **arguments) is None
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("family", "layers", "kept"),
    [("bert", 5, 2), ("modernbert", 7, 2), ("gemma3_text", 8, 6), ("gpt2", 4, 2), ("albert", 1, 1)],
)
def test_half_precision_is_checked_on_a_few_layers(family, layers, kept):
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = make_model(family, **{key: layers}).to(torch.bfloat16)
    random = torch.get_rng_state()
    small = shallow_copy(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert small.config.num_hidden_layers == kept
    assert model.config.num_hidden_layers == layers
    assert small.dtype == torch.float32
    weights = model.state_dict()
    assert all(torch.equal(weights[name].float(), w) for name, w in small.state_dict().items())


def test_no_memory_for_the_check_means_padding(monkeypatch):
    def full(backbone):
        raise torch.OutOfMemoryError("nothing left")

    verdicts: dict[object, object] = {}
    monkeypatch.setattr("torsh_text._selfcheck._verdicts", verdicts)
    monkeypatch.setattr("torsh_text._selfcheck.shallow_copy", full)
    model = make_model("bert").to(torch.bfloat16)
    with pytest.warns(UserWarning, match="runs padded.*memory ran out"):
        Encoder(model, make_tokenizer(), max_length=64)
    assert not verdicts  # there may be memory later


@pytest.mark.gpu
@pytest.mark.parametrize("family", PACKED)
def test_bfloat16_on_a_gpu_points_the_same_way(family):
    # of usual size: weights ten times as large would blow rounding up, not only leaks
    exact = make_model(family, initializer_range=0.02)
    batch = _batch(exact)
    reference = _padded_reference(exact, batch)
    model = make_model(family, initializer_range=0.02).to("cuda", torch.bfloat16)
    position = first_position(model)
    assert adopt_packed_attention(model, first_position=position, max_length=160, pad_id=0) is None
    with torch.no_grad():
        states = last_states(model, packed_inputs(batch.to("cuda")))[0].float().cpu()
        padded = _padded_reference(model, batch.to("cuda")).float().cpu()
    ends = batch.cu_seqlens.tolist()
    for start, stop in pairwise(ends):
        mine, theirs = states[start:stop].mean(0), padded[start:stop].mean(0)
        assert torch.cosine_similarity(mine, theirs, dim=0) >= 0.9995
        # rounding the weights themselves costs more than the kernel
        assert torch.cosine_similarity(mine, reference[start:stop].mean(0), dim=0) >= 0.99


@pytest.mark.gpu
def test_float32_on_a_gpu_equals_the_cpu():
    model = make_model("modernbert")
    batch = _batch(model)
    reference = _padded_reference(model, batch)
    model = model.cuda()
    assert adopt_packed_attention(model, first_position=0, max_length=160, pad_id=0) is None
    with torch.no_grad():
        states = last_states(model, packed_inputs(batch.to("cuda")))[0].cpu()
    assert (states - reference).abs().max() <= 1e-5 * reference.abs().max()
