import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.text.architectures import make_model, make_tokenizer, random_texts
from torsh_text import Encoder


def test_minilm_knows_who_eats(minilm):
    a, b = minilm.encode(["man is eating food", "man eats a piece of bread"])
    assert a.norm().item() == pytest.approx(1, abs=1e-6)
    # 0.7069 is what sentence-transformers 6.2 gives for the same weights
    assert (a @ b).item() == pytest.approx(0.7069, abs=1e-4)


def test_stsb_dev_correlation(minilm, stsb):
    """0.92573 is what sentence-transformers 6.2 reaches on these pairs with the same weights."""
    left, right, gold = (column[:500] for column in stsb)
    vectors = minilm.encode([*left, *right])
    scores = (vectors[:500] * vectors[500:]).sum(1)
    assert spearmanr(scores, gold).statistic == pytest.approx(0.92573, abs=5e-4)


def test_equals_the_padded_path(minilm, minilm_path, stsb):
    padded = Encoder.from_pretrained(minilm_path, device="cpu", attn="padded")
    texts = [*stsb[0][:60], "word " * 300, "", "  "]
    with pytest.warns(UserWarning, match="1 of .* different texts have more than max_length=256"):
        mine = minilm.encode(texts)
    with pytest.warns(UserWarning, match="were cut"):
        theirs = padded.encode(texts)
    assert (mine - theirs).abs().max() <= 2e-6  # float32 rounding of unit vectors


RECORDED = {  # first entries and sum of all 384, from sentence-transformers 6.2 on this MiniLM
    "A man is eating food.": (
        [0.033242, 0.004406, -0.006277, 0.048379, -0.138702, -0.033617, 0.101128, -0.054385],
        0.22649,
    ),
    "The stock market fell sharply on Monday.": (
        [0.045246, -0.01358, 0.06936, 0.037988, -0.017809, 0.021027, -0.061489, 0.050969],
        0.052838,
    ),
    "": (
        [-0.118838, 0.048299, -0.002548, -0.011011, 0.051951, 0.010292, 0.115433, 0.000701],
        0.629071,
    ),
    "naïve 日本語 🤗": (
        [-0.029891, 0.058836, 0.100474, -0.04017, -0.04981, 0.003717, 0.177039, -0.037348],
        0.175544,
    ),
    " ".join(["padding"] * 60): (
        [0.006277, -0.035722, 0.003534, -0.013218, -0.003334, 0.057721, 0.09977, -0.04252],
        -0.92703,
    ),
}


def test_equals_recorded_vectors(minilm):
    found = minilm.encode(list(RECORDED))
    first = torch.tensor([entries for entries, _ in RECORDED.values()])
    sums = torch.tensor([total for _, total in RECORDED.values()])
    assert (found[:, :8] - first).abs().max() <= 3e-6  # rounding of vectors and of the record
    assert (found.sum(1) - sums).abs().max() <= 2e-5  # of 384 entries
    assert (found.norm(dim=1) - 1).abs().max() <= 1e-6


def test_equals_sentence_transformers(minilm, minilm_path, stsb):
    library = pytest.importorskip("sentence_transformers")
    peer = library.SentenceTransformer(str(minilm_path), device="cpu")
    texts = [*stsb[0][:40], "", "naïve 日本語 🤗"]
    expected = peer.encode(texts, convert_to_tensor=True)
    assert (minilm.encode(texts) - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("max_tokens", [42, 100, "auto"])
def test_order_and_duplicates(tiny, max_tokens):
    texts = random_texts([5, 30, 1, 17, 0, 30, 8])
    texts += [texts[3], texts[0]]
    expected = torch.cat([tiny.encode([text]) for text in texts])
    found = tiny.encode(texts, max_tokens=max_tokens)
    assert (found - expected).abs().max() <= 2e-6
    assert torch.equal(found[3], found[7])


def test_duplicates_are_computed_once(tiny):
    rows = []
    tiny.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["packed"])), with_kwargs=True
    )
    tiny.encode(["w5", "w6 w7", "w5", "w5"])
    assert sum(rows) == 2


def test_more_texts_than_a_window(tiny, monkeypatch):
    texts = random_texts([n % 7 for n in range(50)])
    expected = tiny.encode(texts)
    monkeypatch.setattr("torsh_text._runtime.WINDOW", 8)
    assert (tiny.encode(iter(texts)) - expected).abs().max() <= 2e-6


def test_shapes_and_kinds_of_output(tiny):
    assert tiny.encode([]).shape == (0, 64)
    assert tiny.encode("w5").shape == (64,)
    as_array = tiny.encode(["w5", "w6"], out="numpy")
    assert isinstance(as_array, np.ndarray)
    assert as_array.dtype == np.float32
    assert torch.equal(torch.from_numpy(as_array), tiny.encode(["w5", "w6"]))


def test_empty_and_blank_texts_share_a_vector(tiny):
    found = tiny.encode(["", "   ", "w5"])
    assert (found[0] - found[1]).abs().max() <= 2e-6
    assert (found[0] - found[2]).abs().max() > 0.1


def test_dim_cuts_before_normalizing(minilm):
    short = minilm.encode(["a cat", "a dog"], dim=32)
    whole = minilm.encode(["a cat", "a dog"])[:, :32]
    torch.testing.assert_close(short, whole / whole.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="dim=385 is not between 1 and the model's 384"):
        minilm.encode(["a cat"], dim=385)


def test_prompt_is_put_before_the_text(tiny):
    assert torch.equal(tiny.encode(["w9"], prompt="w5 "), tiny.encode(["w5 w9"]))


def test_truncation_is_counted_once_and_can_be_refused(tiny):
    texts = random_texts([50, 3, 60, 38]) + random_texts([50])
    with pytest.warns(UserWarning, match="2 of 4 different texts") as caught:
        cut = tiny.encode(texts)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    kept = [" ".join(text.split()[:38]) for text in texts]
    assert (cut - tiny.encode(kept)).abs().max() <= 2e-6
    with pytest.raises(ValueError, match=r"texts\[2\] has more than max_length=40 tokens"):
        tiny.encode(["w5", "w6", *texts], long="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode(random_texts([38]))


def test_long_texts_as_a_mean_of_their_pieces(tiny):
    (text,) = random_texts([100])
    words = text.split()
    pieces = [" ".join(words[i : i + 38]) for i in (0, 38, 76)]
    weights = torch.tensor([40.0, 40.0, 26.0]).unsqueeze(1)
    expected = (tiny.encode(pieces) * weights).sum(0) / weights.sum()
    found = tiny.encode(["w5", text, "w6"], long="mean")
    torch.testing.assert_close(found[1], expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[0], tiny.encode("w5"), atol=2e-6, rtol=0)


def test_out_of_memory_halves_the_budget_and_goes_on(tiny):
    """The model really raises, at the size at which a small device would."""
    sizes = []

    def limited(module, args, kwargs):
        sizes.append(kwargs["input_ids"].shape[1])
        if sizes[-1] > 60:
            raise torch.OutOfMemoryError("no more than 60 tokens fit")

    texts = random_texts([n % 9 + 3 for n in range(60)])
    expected = tiny.encode(texts)
    handle = tiny.backbone.register_forward_pre_hook(limited, with_kwargs=True)
    assert torch.allclose(tiny.encode(texts), expected, atol=2e-6)
    assert max(sizes) > 60  # it did happen
    sizes.clear()
    tiny.encode(texts)
    assert max(sizes) <= 60  # and was learnt
    assert "at most 768" not in tiny.explain()
    handle.remove()


def test_out_of_memory_on_a_single_text_raises(tiny):
    def full(module, args):
        raise torch.OutOfMemoryError("nothing fits")

    tiny.backbone.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="nothing fits"):
        tiny.encode(["w5", "w6"])


def test_refuses_a_budget_below_one_text(tiny):
    with pytest.raises(ValueError, match="max_tokens=5 is less than the 12 tokens"):
        tiny.encode(random_texts([10]), max_tokens=5)


def test_refuses_training_mode(tiny):
    tiny.train()
    for call in (tiny.encode, tiny.token_embeddings):
        with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
            call(["w5"])


def test_refuses_training_mode_of_a_part(tiny, tmp_path):
    tiny.backbone.train()
    with pytest.raises(RuntimeError, match="'backbone' of the encoder is in training mode"):
        tiny.encode(["w5"], cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    tiny.eval().backbone.encoder.layer[1].train()
    with pytest.raises(RuntimeError, match=r"'backbone\.encoder\.layer\.1' of the encoder"):
        tiny.token_embeddings(["w5"])


def test_refuses_what_is_not_finite(tiny):
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[77] = float("nan")
    texts = ["w5", "w5", "w6 w77", "w77 w5 w5"]
    with pytest.raises(RuntimeError, match=r"texts\[2\] is not finite"):
        tiny.encode(texts)
    with pytest.raises(RuntimeError, match=r"a token state of texts\[3\] is not finite"):
        tiny.token_embeddings(texts)  # the longest first
    with pytest.raises(RuntimeError, match=r"a token state of texts\[2\] is not finite"):
        tiny.token_embeddings(texts[:3])


def test_surrogates_are_named_by_the_place_the_caller_knows(tiny, monkeypatch):
    monkeypatch.setattr("torsh_text._runtime.WINDOW", 4)
    texts = [*["w5"] * 10, "w6 \ud800"]
    for call in (tiny.encode, tiny.token_embeddings, tiny.pack):
        with pytest.raises(ValueError, match=r"texts\[10\] holds a lone surrogate at character 3"):
            call(texts)
    with pytest.raises(ValueError, match=r"texts\[0\] holds a lone surrogate at character 3"):
        tiny.encode(texts[10], prompt="w7 ")


@pytest.mark.parametrize("bad", [None, 3.5, b"x"])
def test_refuses_items_that_are_no_strings(tiny, bad):
    with pytest.raises(TypeError, match=r"texts\[1\]"):
        tiny.encode(["w5", bad])


def test_refuses_options_it_does_not_have(tiny):
    with pytest.raises(ValueError, match="out='list'"):
        tiny.encode(["w5"], out="list")
    with pytest.raises(ValueError, match="long='trunc' is none of 'truncate', 'error', 'mean'"):
        tiny.encode(["w5"], long="trunc")
    for bad in ("many", 50.0, None, True):
        for call in (tiny.encode, tiny.token_embeddings):
            with pytest.raises(TypeError, match=r"max_tokens=.* neither 'auto' nor an integer"):
                call([], max_tokens=bad)
    with pytest.raises(ValueError, match="max_tokens=0 is not positive"):
        tiny.encode([], max_tokens=0)
    for bad in (2.0, "2", True):
        with pytest.raises(TypeError, match=r"dim=.* is neither None nor an integer"):
            tiny.encode(["w5"], dim=bad)
    with pytest.raises(ValueError, match="pooling='median'"):
        Encoder(make_model("bert"), make_tokenizer(), pooling="median")
    with pytest.raises(ValueError, match="attn='flash'"):
        Encoder(make_model("bert"), make_tokenizer(), attn="flash")


def test_max_length_can_be_set(tiny):
    (text,) = random_texts([30])
    tiny.max_length = 10
    assert "cut after 10 tokens" in tiny.explain()
    with pytest.warns(UserWarning, match="max_length=10 tokens"):
        assert tiny.pack([text]).lengths == (10,)
    for bad, error in ((0, ValueError), (2, ValueError), (513, ValueError), (9.0, TypeError)):
        with pytest.raises(error, match=f"max_length={bad}"):
            tiny.max_length = bad
    assert tiny.max_length == 10


def test_max_length_zero_is_refused(minilm_path):
    with pytest.raises(ValueError, match="max_length=0 leaves no room"):
        Encoder.from_pretrained(minilm_path, device="cpu", max_length=0)


def test_budget_and_check_belong_to_a_device_and_dtype(tiny, monkeypatch):
    verdicts: dict[object, object] = {}
    monkeypatch.setattr("torsh_text._selfcheck._verdicts", verdicts)
    tiny.encode(["w5"])
    tiny._budgets[tiny.backbone.device, torch.float32].halve(100)
    assert "at most 50 tokens" in tiny.explain()
    assert not verdicts  # checked when it was made
    tiny.to(torch.bfloat16)
    assert "at most 768 tokens" in tiny.explain()
    tiny.encode(["w5"])
    assert len(verdicts) == 1
    tiny.to(torch.float32)
    assert "at most 50 tokens" in tiny.explain()


@pytest.mark.gpu
def test_a_model_made_on_the_cpu_is_checked_on_the_gpu(tiny, monkeypatch):
    verdicts: dict[tuple[object, ...], object] = {}
    monkeypatch.setattr("torsh_text._selfcheck._verdicts", verdicts)
    tiny.to("cuda", torch.bfloat16).encode(["w5"])
    assert [key[2] for key in verdicts] == ["cuda"]
    assert tiny.attention.name == "varlen"


def test_token_embeddings_pool_to_the_vector(tiny):
    texts = random_texts([7, 0, 12])
    states = tiny.token_embeddings(texts)
    assert [tuple(s.shape) for s in states] == [(9, 64), (2, 64), (14, 64)]
    means = torch.stack([s.mean(0) for s in states])
    assert torch.allclose(means, tiny.encode(texts), atol=2e-6)
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        assert tiny.token_embeddings(random_texts([70]))[0].shape == (40, 64)
    assert torch.allclose(tiny.token_embeddings(texts[0]), states[0], atol=2e-6)


def test_explain_names_the_path(tiny):
    assert tiny.attention.name == "grouped"
    text = tiny.explain()
    assert "grouped: rows of equal length share one SDPA call" in text
    assert "at most 768 tokens" in text


def test_progress_writes_a_bar(tiny, capsys):
    tiny.encode(["w5", "w6"], progress=True)
    assert "0/2" in capsys.readouterr().err
    tiny.encode(["w5", "w6"])
    assert capsys.readouterr().err == ""


def test_a_prompt_is_a_text_and_not_the_name_of_one(tiny):
    tiny.prompts["query"] = "w5 "
    with pytest.raises(ValueError, match=r"pass its text, .prompts\['query'\]"):
        tiny.encode("w9", prompt="query")
    with pytest.raises(TypeError, match="prompt=3 is neither None nor a string"):
        tiny.encode("w9", prompt=3)
