import copy
import errno
import resource
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import BertConfig, BertModel

from tests.text.architectures import PACKED, VOCAB, make_model, make_tokenizer, random_texts
from torsh_text import EmbeddingCache, Encoder, _backbone
from torsh_text._backbone import Dense


@pytest.fixture
def tiny():
    return Encoder(make_model("bert"), make_tokenizer(), max_length=40, name="tiny").eval()


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


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_forward_is_differentiable_and_equal_for_both_kinds_of_batch(family):
    encoder = Encoder(make_model(family), make_tokenizer(), max_length=60, normalize=True)
    texts = random_texts([9, 2, 30])
    packed = encoder.pack(texts)
    weights = torch.randn(3, encoder.dim)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    results = []
    for batch in (packed, packed.padded(encoder.tokenizer.pad_token_id)):
        vectors = encoder.eval()(batch)
        loss = (vectors * weights).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append((vectors.detach(), gradients))
    (a, grad_a), (b, grad_b) = results
    assert (a - b).abs().max() <= 2e-6
    assert torch.allclose(encoder.encode(texts), a, atol=2e-6)
    largest = max(g.abs().max().item() for g in grad_a if g is not None)
    for x, y in zip(grad_a, grad_b, strict=True):
        assert x is None or (x - y).abs().max().item() <= 1e-5 * largest


@pytest.mark.parametrize("family", [*PACKED, "bloom"])
@pytest.mark.filterwarnings("ignore:.*runs padded")
def test_padding_may_be_on_either_side(family):
    encoder = Encoder(make_model(family), make_tokenizer(), max_length=40).eval()
    batch = encoder.pack(random_texts([9, 30, 1, 37]))
    right = batch.padded(encoder.pad_id)
    shifts = [39 - n for n in batch.lengths]
    left = {
        key: torch.stack([row.roll(n) for row, n in zip(rows, shifts, strict=True)])
        for key, rows in right.items()
    }
    assert left["attention_mask"][:, -1].all()
    with torch.no_grad():
        expected, found = encoder(right), encoder(left)
        packed = encoder(batch)
    limit = 1e-5 * expected.abs().max()  # sums in another order
    assert (found - expected).abs().max() <= limit
    assert (packed - expected).abs().max() <= limit


def test_forward_without_a_mask_reads_every_token(tiny):
    ids = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2]])
    expected = tiny(tiny.pack(["w5 w6", "w7 w8"]))
    assert torch.allclose(tiny({"input_ids": ids}), expected, atol=2e-6)


def test_forward_refuses_positions_of_another_family():
    encoder = Encoder(make_model("roberta"), make_tokenizer(), max_length=40)
    other = Encoder(make_model("bert"), make_tokenizer(), max_length=40)
    with pytest.raises(
        ValueError, match=r"positions from 0, .* from 2; make batches with the encoder"
    ):
        encoder(other.pack(["w5"]))


def test_forward_refuses_rows_beyond_the_positions(tiny):
    long = Encoder(make_model("llama"), make_tokenizer(), max_length=600).pack(random_texts([598]))
    with pytest.raises(ValueError, match="a row has 600 tokens, the model has 512 positions"):
        tiny(long)


def test_vectors_can_be_trained_on(tiny):
    vectors = tiny.encode(["w5", "w6"])
    head = torch.nn.Linear(64, 2)
    head(vectors).sum().backward()
    assert head.weight.grad is not None


def test_token_embeddings_pool_to_the_vector(tiny):
    texts = random_texts([7, 0, 12])
    states = tiny.token_embeddings(texts)
    assert [tuple(s.shape) for s in states] == [(9, 64), (2, 64), (14, 64)]
    means = torch.stack([s.mean(0) for s in states])
    assert torch.allclose(means, tiny.encode(texts), atol=2e-6)
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        assert tiny.token_embeddings(random_texts([70]))[0].shape == (40, 64)
    assert torch.allclose(tiny.token_embeddings(texts[0]), states[0], atol=2e-6)


def test_state_dict_of_the_backbone_is_that_of_transformers(tiny):
    plain = make_model("bert")
    assert list(tiny.backbone.state_dict()) == list(plain.state_dict())
    assert all(key.startswith(("backbone.", "dense.")) for key in tiny.state_dict())


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


def test_learns_a_task_through_packed_batches():
    """Tells texts with even words from texts with odd words after a few steps."""
    encoder = Encoder(make_model("bert"), make_tokenizer(), max_length=40).train()
    head = torch.nn.Linear(encoder.dim, 2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        parity = torch.randint(0, 2, (16,), generator=generator)
        words = torch.randint(2, 20, (16, 6), generator=generator) * 2 + parity.unsqueeze(1)
        texts = [
            " ".join(f"w{w}" for w in row[: 3 + i % 4]) for i, row in enumerate(words.tolist())
        ]
        loss = torch.nn.functional.cross_entropy(head(encoder(encoder.pack(texts))), parity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def _gpu_twins():
    """A model of MiniLM's size with random weights, exact on the CPU and fast on the GPU."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    torch.manual_seed(0)
    exact = BertModel(config).eval()
    fast = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    tokenizer = make_tokenizer()
    return [
        Encoder(model, tokenizer, normalize=True, max_length=256).eval() for model in (exact, fast)
    ]


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_keeps_the_direction():
    exact, fast = _gpu_twins()
    assert fast.attention.name == "varlen"
    texts = random_texts([n * 37 % 200 for n in range(100)])
    found = fast.encode(texts)
    assert found.is_cuda
    assert found.dtype == torch.float32
    assert (found.cpu() * exact.encode(texts)).sum(1).min() >= 0.9995


@pytest.mark.gpu
def test_packed_gradients_on_a_gpu():
    exact, fast = _gpu_twins()
    texts = random_texts([30, 2, 77])
    weights = torch.randn(3, 384)
    (exact(exact.pack(texts)) * weights).sum().backward()
    (fast(fast.pack(texts).to("cuda")) * weights.cuda()).sum().backward()
    mine = fast.backbone.encoder.layer[0].attention.self.query.weight.grad.float().cpu()
    theirs = exact.backbone.encoder.layer[0].attention.self.query.weight.grad
    # bfloat16 through six layers and back
    assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) >= 0.99


@pytest.mark.gpu
def test_real_out_of_memory_on_a_gpu():
    _, fast = _gpu_twins()
    texts = random_texts([250] * 3000)
    expected = fast.encode(texts, max_tokens=16_384)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        found = fast.encode(texts, max_tokens=2**20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (found * expected).sum(1).min() >= 0.9995


class Rows:
    """Counts the rows that an encoder computes for texts."""

    def __init__(self, encoder):
        self.count = 0
        pooled = encoder._pooled

        def counted(batch):
            self.count += len(batch.lengths)
            return pooled(batch)

        encoder._pooled = counted

    def taken(self):
        count, self.count = self.count, 0
        return count


def test_cache_returns_the_same_bits_and_computes_only_what_is_new(tiny, tmp_path):
    rows = Rows(tiny)
    texts = random_texts([5, 30, 1, 17, 0, 8]) + random_texts([5])
    plain = tiny.encode(texts)
    assert rows.taken() == 6
    cold = tiny.encode(texts, cache=tmp_path / "cache")
    assert rows.taken() == 6
    warm = tiny.encode(texts, cache=str(tmp_path / "cache"))
    assert rows.taken() == 0
    assert torch.equal(cold, plain)
    assert torch.equal(warm, cold)
    mixed = [texts[3], "w9 w8", texts[0], "w9 w8", *texts, "w7"]
    found = tiny.encode(mixed, cache=EmbeddingCache(tmp_path / "cache"))
    assert rows.taken() == 2
    assert (found - tiny.encode(mixed)).abs().max() <= 2e-6  # other batches round differently
    assert torch.equal(found[4:-1], plain)
    assert EmbeddingCache(tmp_path / "cache").stats().rows == 8
    rows.taken()
    assert torch.equal(tiny.encode(texts[2], cache=tmp_path / "cache"), plain[2])
    assert tiny.encode(texts, cache=tmp_path / "cache", out="numpy").shape == (7, 64)
    assert tiny.encode([], cache=tmp_path / "cache").shape == (0, 64)
    assert rows.taken() == 0


def test_cache_serves_every_dim_and_allows_training_on_its_vectors(minilm, tmp_path):
    texts = ["a cat", "a dog"]
    minilm.encode(texts, cache=tmp_path)
    short = minilm.encode(texts, cache=tmp_path, dim=32)
    assert EmbeddingCache(tmp_path).stats().rows == 2
    assert torch.equal(short, minilm.encode(texts, dim=32))
    layer = torch.nn.Linear(32, 2)
    layer(short).sum().backward()
    assert layer.weight.grad is not None


def test_cache_knows_what_changes_a_vector(tiny, tmp_path):
    rows = Rows(tiny)
    text = ["w5 w6 " * 25]

    def computed(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tiny.encode(text, cache=tmp_path, **options)
            count = rows.taken()
            assert (found - tiny.encode(text, **options)).abs().max() <= 2e-6
            rows.taken()
        return count

    assert computed() == 1
    assert computed() == 0
    assert computed(prompt="w7 ") == 1
    assert computed(prompt="") == 0
    assert computed(long="mean") == 2
    assert computed(long="mean") == 0
    tiny.max_length = 30
    assert computed() == 1
    tiny.max_length = 40
    assert computed() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert computed() == 1
        assert computed() == 0
    tiny._normalize = True
    assert computed() == 1
    tiny._modes = ("cls",)
    assert computed() == 1
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[5, 0] += 1
    assert computed() == 1


def test_cached_truncation_is_reported_and_refused(tiny, tmp_path):
    texts = random_texts([50, 3, 60])
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 of 3 different texts have more than max_length=40"):
            tiny.encode(texts, cache=tmp_path)
    with pytest.raises(ValueError, match=r"texts\[1\] has more than max_length=40"):
        tiny.encode([texts[1], texts[2]], cache=tmp_path, long="error")
    tiny.encode([texts[1]], cache=tmp_path, long="error")
    fresh = random_texts([4, 44], seed=1)
    with pytest.raises(ValueError, match=r"texts\[2\] has more than max_length=40"):
        tiny.encode([texts[1], *fresh], cache=tmp_path, long="error")


def test_finished_windows_stay_in_the_cache(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("torsh_text._runtime.WINDOW", 8)
    rows = Rows(tiny)
    texts = [f"w{n}" for n in range(10, 40)]
    tiny.encode(texts[:3], cache=tmp_path)

    def stop(*_):
        if rows.count > 20:
            raise KeyboardInterrupt

    hook = tiny.backbone.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.encode(texts, cache=tmp_path)
    hook.remove()
    assert EmbeddingCache(tmp_path).stats().rows == 3 + 16
    rows.taken()
    found = tiny.encode(texts, cache=tmp_path)
    assert rows.taken() == 30 - 19
    assert (found - tiny.encode(texts)).abs().max() <= 2e-6


def test_vectors_that_are_not_finite_are_never_kept(tiny, tmp_path):
    with torch.no_grad():
        tiny.backbone.embeddings.word_embeddings.weight[9] = torch.nan
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"texts\[1\] is not finite"):
            tiny.encode(["w5", "w9"], cache=tmp_path)
    assert EmbeddingCache(tmp_path).stats().rows == 1


def test_float16_cache_gives_cold_and_warm_the_same_bits(minilm, tmp_path):
    cache = EmbeddingCache(tmp_path, dtype="float16")
    texts = ["a cat", "a dog", ""]
    cold = minilm.encode(texts, cache=cache)
    assert torch.equal(cold, minilm.encode(texts, cache=cache))
    assert cache.stats().hits == 3
    exact = minilm.encode(texts)
    assert 0 < (cold - exact).abs().max() <= 2.5e-4  # half a step of float16 below 0.5
    assert (cold.norm(dim=1) - 1).abs().max() <= 1e-6


def test_a_readonly_or_full_cache_still_encodes(tiny, tmp_path):
    cache = EmbeddingCache(tmp_path)
    tiny.encode(["w5"], cache=cache)
    reader = EmbeddingCache(tmp_path, readonly=True)
    found = tiny.encode(["w5", "w6"], cache=reader)
    assert (found - tiny.encode(["w5", "w6"])).abs().max() <= 2e-6
    assert reader.stats().rows == 1

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.warns(UserWarning, match="not kept any more: .* is full") as said:
            full = tiny.encode(["w5", "w6", "w7"], cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"[Errno {errno.EFBIG}]" in str(said[0].message)
    assert (full - tiny.encode(["w5", "w6", "w7"])).abs().max() <= 2e-6
    assert cache.verify() == []


def test_cache_refuses_training_mode_and_other_things(tiny, tmp_path):
    with pytest.raises(TypeError, match="cache=7 is neither an EmbeddingCache nor a path"):
        tiny.encode(["w5"], cache=7)
    with pytest.raises(RuntimeError, match="in training mode"):
        tiny.train().encode(["w5"], cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"texts\[1\] holds a lone surrogate"):
        tiny.eval().encode(["w5", "\ud800"], cache=tmp_path)


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


@pytest.mark.parametrize("texts", ["a text", ["a text"]])
def test_forward_refuses_texts(minilm, texts):
    with pytest.raises(TypeError, match=r"the encoder was called with a (str|list), not a batch"):
        minilm(texts)
