import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.text.architectures import PACKED, VOCAB, make_model, make_tokenizer, random_texts
from torsh_text import Encoder


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


def test_state_dict_of_the_backbone_is_that_of_transformers(tiny):
    plain = make_model("bert")
    assert list(tiny.backbone.state_dict()) == list(plain.state_dict())
    assert all(key.startswith(("backbone.", "dense.")) for key in tiny.state_dict())


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


@pytest.mark.parametrize("texts", ["a text", ["a text"]])
def test_forward_refuses_texts(minilm, texts):
    with pytest.raises(TypeError, match=r"the encoder was called with a (str|list), not a batch"):
        minilm(texts)


@pytest.mark.parametrize("packed", [True, False])
def test_compiles(tiny, packed):
    batch = tiny.pack(random_texts([5, 9, 2]))
    given = batch if packed else batch.padded(tiny.pad_id)
    expected = tiny(given)
    torch.compiler.reset()
    found = torch.compile(tiny, backend="aot_eager")(given)
    assert (found - expected).abs().max() <= 1e-6  # entries of order one; sums in another order
    found.sum().backward()
    assert tiny.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 0
