import math

import pytest
import torch

from torsh_text import PackedBatch
from torsh_text._attention import _mask, attend, packed_path, varlen_options

LENGTHS = [7, 3, 3, 12, 1]


def _dense_oracle(q, k, v, lengths, scale, causal, window):
    """Softmax attention over all tokens at once in float64, with a block-diagonal mask."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    gap = place.unsqueeze(0) - place.unsqueeze(1)
    keep = row.unsqueeze(0) == row.unsqueeze(1)
    if causal:
        keep &= gap <= 0
    if window is not None:
        keep &= gap.abs() < window
    q, k, v = (x[0].double() for x in (q, k, v))
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q @ k.mT * scale).masked_fill(~keep, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).unsqueeze(0)


def _inputs(dtype=torch.float32, device="cpu", heads=4, key_heads=4, lengths=LENGTHS):
    total = sum(lengths)
    q = torch.randn(1, heads, total, 16, dtype=dtype, device=device)
    k = torch.randn(1, key_heads, total, 16, dtype=dtype, device=device)
    v = torch.randn(1, key_heads, total, 16, dtype=dtype, device=device)
    batch = PackedBatch.pack([[1] * n for n in lengths]).to(device)
    return q, k, v, batch


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_dense_attention_with_a_block_mask(key_heads, causal, window, scale):
    q, k, v, batch = _inputs(key_heads=key_heads)
    out, _ = attend(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=scale,
        sliding_window=window,
        is_causal=causal,
        packed=batch,
    )
    expected = _dense_oracle(q, k, v, LENGTHS, scale or 0.25, causal, window)
    # float32 softmax over at most 12 entries of size about 1
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_varlen_kernel_equals_dense_attention(causal, window, key_heads):
    q, k, v, batch = _inputs(torch.bfloat16, "cuda", key_heads=key_heads)
    assert packed_path(q.device, q.dtype, head_dim=16).name == "varlen"
    out, _ = attend(
        torch.nn.Module(), q, k, v, None, sliding_window=window, is_causal=causal, packed=batch
    )
    expected = _dense_oracle(q.cpu(), k.cpu(), v.cpu(), LENGTHS, 0.25, causal, window)
    # bfloat16 rounds values of about 1 to 2^-8 relative
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-2, rtol=0)


def test_dropout_drops_attention():
    q, k, v, batch = _inputs()
    module = torch.nn.Module()
    plain, _ = attend(module, q, k, v, None, is_causal=False, packed=batch)
    dropped, _ = attend(module, q, k, v, None, dropout=0.9, is_causal=False, packed=batch)
    assert (plain - dropped).abs().max() > 0.1


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_refuses_attention_it_does_not_have(name):
    q, k, v, batch = _inputs()
    with pytest.raises(NotImplementedError, match=name):
        attend(torch.nn.Module(), q, k, v, None, packed=batch, **{name: 1.0})


def test_mask_is_left_out_only_for_packed_rows():
    common = {"batch_size": 1, "q_length": 5, "device": "cpu"}
    one = torch.ones(1, 1, dtype=torch.bool)
    assert _mask(**common, kv_length=1, attention_mask=one) is None
    padding = torch.tensor([[True, True, True, False, False]])
    mask = _mask(**common, kv_length=5, attention_mask=padding)
    assert mask is not None
    assert mask[0, 0, 4].tolist() == [True, True, True, False, False]


def test_paths_name_their_reason():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert packed_path(cpu, torch.float32).name == "grouped"
    assert "bfloat16, not torch.float32" in packed_path(cuda, torch.float32).why
    assert "window_size" in varlen_options()


@pytest.mark.gpu
def test_paths_on_a_gpu():
    cuda = torch.device("cuda", 0)
    assert packed_path(cuda, torch.bfloat16).name == "varlen"
    assert "dropout" in packed_path(cuda, torch.bfloat16, dropout=0.1).why
    assert "head size" in packed_path(cuda, torch.bfloat16, head_dim=20).why
