import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import datasets
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from torsh_data.text import BackTranslator, Translator, _back_translation, _translator
from torsh_data.text._back_translation import similarity
from torsh_data.text._translator import _Choice, _sums, _weights

WORDS = 40
VOCAB = WORDS + 8
CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def make_tokenizer(*, ends=True, chat=False):
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<user>": 3, "<bot>": 4, "de": 5, "en": 6, ".": 7}
    vocabulary = special | {f"w{n}": n + 8 for n in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=["<user>", "<bot>"],
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def ending(model):
    """Random models hardly end by themselves, and write marks."""
    marks = [[[mark], -1e4] for mark in (2, 3, 4, 7)]
    model.generation_config.suppress_tokens = [0]
    model.generation_config.sequence_bias = [[[1], 3.0], *marks]
    model.generation_config.exponential_decay_length_penalty = (4, 3.0)
    return model.eval()


def marian(seed=0, length=64):
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        forced_eos_token_id=None, max_position_embeddings=length, init_std=0.3,
    )  # fmt: skip
    return ending(MarianMTModel(config))


def t5():
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, initializer_factor=0.5,
    )  # fmt: skip
    return ending(T5ForConditionalGeneration(config))


def llama():
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, initializer_range=0.1, max_position_embeddings=256,
    )  # fmt: skip
    return ending(LlamaForCausalLM(config))


def texts(count, seed=0, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    rows = [torch.randint(0, WORDS, (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(f"w{word}" for word in row) for row in rows]


PAIRS = {
    "marian": lambda: [Translator(marian(s), make_tokenizer()) for s in (0, 1)],
    "t5": lambda: [Translator(t5(), make_tokenizer(), prompt=f"{c} . {{text}}") for c in "ab"],
    "llama": lambda: [
        Translator(llama(), make_tokenizer(ends=False), prompt=f"{{text}} {code} .")
        for code in ("de", "en")
    ],
    "chat": lambda: [
        Translator(llama(), make_tokenizer(chat=True), prompt=f"{code} : {{text}}")
        for code in ("de", "en")
    ],
}


def pair(kind="marian", **options):
    loose = {"min_similarity": 0.0, "max_ratio": 1e9}
    return BackTranslator(*PAIRS[kind](), **loose | options)


@pytest.mark.parametrize("kind", sorted(PAIRS))
def test_results_do_not_depend_on_the_batch(kind):
    given = [*texts(7), texts(7)[0]]
    translate = pair(kind)
    found = translate(given, n=3, seed=5)
    report = translate.report
    assert report.texts == 8
    assert report.asked == 24
    assert report.kept == sum(map(len, found)) == 24 - sum(report.dropped.values())
    assert found[0] == found[7]
    assert pair(kind, batch_tokens=1)(given[::-1], n=3, seed=5) == found[::-1]
    assert translate(given[2], n=3, seed=5) == found[2]
    for one, all_three in zip(translate(given, n=1, seed=5), found, strict=True):
        assert set(one) <= set(all_three)
    assert any(found)
    assert translate(given, n=3, seed=6) != found


def test_greedy_results_are_those_of_generate_on_single_texts():
    there, back = PAIRS["marian"]()
    given = texts(6)
    translate = BackTranslator(there, back, temperature=0, min_similarity=0, max_ratio=1e9)
    found = translate(given, n=1)

    def answer(one, text):
        ids = one.tokenizer(text, return_tensors="pt")
        new = 16 + 2 * ids["input_ids"].shape[1]
        out = one.model.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False,
            num_beams=1, max_new_tokens=min(new, 63), max_length=None,
        )  # fmt: skip
        ended = bool((out[0, 1:] == 1).any())
        return one.tokenizer.decode(out[0], skip_special_tokens=True).strip() if ended else ""

    for text, result in zip(given, found, strict=True):
        middle = answer(there, text)
        expected = answer(back, middle) if middle else ""
        assert result == ([expected] if expected and expected != text else [])
    assert any(found)


def test_beams_give_the_n_best():
    translate = pair(num_beams=4)
    found = translate(texts(5), n=4)
    assert found == translate(texts(5), n=4, seed=99)
    assert pair(num_beams=4, batch_tokens=1)(texts(5), n=4) == found
    assert max(map(len, found)) > 1
    with pytest.raises(ValueError, match="n=5 needs as many beams, but num_beams=4"):
        translate(texts(1), n=5)
    with pytest.raises(ValueError, match="n=2 needs as many beams, but num_beams=1"):
        pair(temperature=0)(texts(1), n=2)


def test_sampling_follows_the_softmax():
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    keys = torch.arange(20_000) * 7919
    choice = _Choice(keys, 0.7)
    picks = [choice(None, scores.expand(len(keys), 5)).argmax(-1) for _ in range(2)]
    expected = (scores[:4].double() / 0.7).softmax(-1) * len(keys)
    for drawn in picks:
        counts = torch.bincount(drawn, minlength=5)
        assert counts[4] == 0
        assert stats.chisquare(counts[:4], expected).pvalue > 1e-3
    together = torch.bincount(picks[0] * 4 + picks[1], minlength=16).view(4, 4)
    assert stats.chi2_contingency(together).pvalue > 1e-3  # steps are independent


def test_cached_results_are_not_made_again(tmp_path):
    given = texts(9)
    first = pair(cache_dir=tmp_path)
    found = first(given, n=2)
    assert first.report.cached == 0
    calls = []
    second = pair(cache_dir=tmp_path)
    for one in (second._forward, second._backward):
        one.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert second(given, n=2) == found
    assert second.report.cached == 2 * len(set(given))
    assert not calls
    assert [*second(given[:3], n=3)] == pair()(given[:3], n=3)  # one of three is new
    assert calls
    assert pair(cache_dir=tmp_path, temperature=0.5)(given, n=2) != found
    assert len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        second._forward.model.final_logits_bias[0, 9] += 5
    second(given[:2], n=2)
    assert second.report.cached == 0  # other weights, other results
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_lines_are_made_again(tmp_path):
    given = texts(9)
    found = pair(cache_dir=tmp_path)(given, n=2)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content[:-5])
    translate = pair(cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="2 damaged lines were skipped"):
        assert translate(given, n=2) == found
    assert translate.report.cached == 2 * len(set(given)) - 2
    again = pair(cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        assert again(given, n=2) == found
    assert again.report.cached == 2 * len(set(given))


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    code = (
        "import importlib.util as u, sys\n"
        "s = u.spec_from_file_location('bt', sys.argv[1]); m = u.module_from_spec(s)\n"
        "s.loader.exec_module(m)\n"
        "m.pair(cache_dir=sys.argv[2], batch_tokens=2000)(m.texts(300), n=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    given = texts(300)
    cached = []
    for size in (1, 9_000):
        child = subprocess.Popen([sys.executable, "-c", code, __file__, tmp_path], env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            if sum(path.stat().st_size for path in tmp_path.iterdir()) > size:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        (path,) = tmp_path.iterdir()
        cached.append(path.read_bytes().count(b'"key"'))
    translate = pair(cache_dir=tmp_path)
    found = translate(given, n=2)
    assert 0 < cached[0] <= cached[1] <= translate.report.cached + 1
    assert translate.report.cached < 2 * len(set(given))
    assert found == pair()(given, n=2)


def test_batches_are_halved_when_memory_runs_out():
    given = texts(12)
    translate = pair(batch_tokens=100_000)
    sizes = []

    def limited(module, arguments, options):
        rows = len(options["input_ids"])
        sizes.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    translate._forward.model.get_encoder().register_forward_pre_hook(limited, with_kwargs=True)
    assert translate(given, n=1) == pair()(given, n=1)
    assert sizes[0] == len(set(given))
    assert max(sizes[-2:]) <= 3
    before = len(sizes)
    translate(given, n=1)
    assert max(sizes[before:]) <= 3  # learnt

    def always(*_):
        raise torch.OutOfMemoryError("out of memory")

    translate._backward.model.register_forward_pre_hook(always)
    with pytest.raises(torch.OutOfMemoryError):
        translate(given, n=1)


def test_models_from_folders(tmp_path):
    for name, one in zip(("there", "back"), PAIRS["marian"](), strict=True):
        one.model.save_pretrained(tmp_path / name)
        one.tokenizer.save_pretrained(tmp_path / name)
    options = {"min_similarity": 0.0, "max_ratio": 1e9, "device": "cpu"}
    loaded = BackTranslator(tmp_path / "there", str(tmp_path / "back"), **options)
    assert loaded(texts(5)) == pair()(texts(5))
    half = BackTranslator(tmp_path / "there", tmp_path / "back", dtype="bfloat16", **options)
    assert half._forward.model.dtype == torch.bfloat16
    half(texts(2))
    with pytest.raises(ValueError, match="a tokenizer is only given with a model"):
        BackTranslator(Translator(tmp_path / "there", make_tokenizer()), tmp_path / "back")


def test_target_languages_are_forced():
    there, back = PAIRS["marian"]()
    forced = Translator(there.model, there.tokenizer, target="de")
    translate = BackTranslator(forced, back, min_similarity=0.0, max_ratio=1e9)
    seen = []
    rows = translate._backward.rows
    translate._backward.rows = lambda given: seen.extend(given) or rows(given)
    translate(texts(6), n=1)
    assert all(text.split()[0] == "de" for text in seen if text)
    with pytest.raises(ValueError, match="forward: target='deu_Latn' is no token"):
        BackTranslator(Translator(there.model, there.tokenizer, target="deu_Latn"), back)
    with pytest.raises(ValueError, match=r"source='en', but .* knows no source languages"):
        BackTranslator(Translator(there.model, there.tokenizer, source="en"), back)


def test_a_shared_tokenizer_reads_the_language_of_each_way():
    model = marian()
    words = {name: n + 8 for n, name in enumerate("abcdefgh")}
    marks = {"<s>": 3, "<pad>": 0, "</s>": 1, "<unk>": 2, "eng_Latn": 5, "deu_Latn": 6}
    tokenizer = NllbTokenizer(
        vocab=marks | words, merges=[], src_lang="eng_Latn",
        extra_special_tokens=["eng_Latn", "deu_Latn"],
    )  # fmt: skip
    eng, deu = tokenizer.convert_tokens_to_ids(["eng_Latn", "deu_Latn"])
    translate = BackTranslator(
        Translator(model, tokenizer, source="eng_Latn", target="deu_Latn"),
        Translator(model, tokenizer, source="deu_Latn", target="eng_Latn"),
    )
    for _ in range(2):
        assert translate._forward.rows(["a"])[0][0] == eng
        assert translate._backward.rows(["a"])[0][0] == deu
    assert tokenizer.src_lang == "eng_Latn"
    assert tokenizer("a")["input_ids"][0] == eng

    wrong = []

    def read(way, code):
        wrong.extend(code for _ in range(200) if way.rows(["a b"])[0][0] != code)

    ways = ((translate._forward, eng), (translate._backward, deu))
    threads = [threading.Thread(target=read, args=one) for one in ways]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    with pytest.raises(TypeError):
        translate._backward.rows([3])
    assert tokenizer.src_lang == "eng_Latn"


def optimizer_step(model, **options):
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()


def swapped(model):
    layers = model.get_encoder().layers[0]
    layers.self_attn.k_proj, layers.self_attn.v_proj = (
        layers.self_attn.v_proj, layers.self_attn.k_proj,
    )  # fmt: skip


@torch.inference_mode()
def in_inference_mode(model):
    model.final_logits_bias[0, 9] += 5


CHANGES = {
    "buffer": lambda model: model.final_logits_bias[0, 9].add_(5),
    "inference": in_inference_mode,
    "data": lambda model: next(model.parameters()).data[0].add_(1),
    "data of others": lambda model: setattr(
        next(model.parameters()), "data", torch.ones_like(next(model.parameters()))
    ),
    "load": lambda model: model.load_state_dict(marian(5).state_dict()),
    "assign": lambda model: model.load_state_dict(marian(5).state_dict(), assign=True),
    "step": optimizer_step,
    "fused step": lambda model: optimizer_step(model, fused=True),
    "numpy": lambda model: next(model.parameters()).detach().numpy().fill(1),
    "modules": swapped,
    "type": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_change_of_weights_is_noticed(change):
    model = marian()
    before, sums = _weights(model), _sums(model.state_dict().values())
    assert _weights(marian()) == before  # the content counts, and no address
    CHANGES[change](model)
    assert _weights(model) != before
    assert _sums(model.state_dict().values()) != sums


def test_sums_are_of_the_bits_of_any_tensor():
    wide = torch.arange(24, dtype=torch.int32).view(4, 6)
    tensors = [
        wide.t()[1:],
        torch.tensor(True),
        torch.tensor(1.0),
        torch.zeros(0, 3),
        torch.tensor([2.0], dtype=torch.float64),
    ]
    tensors.append(torch.tensor([-0.0, 1.0], dtype=torch.bfloat16))
    expected = [
        int(sum(int.from_bytes(one.tobytes(), "little", signed=True) for one in flat.numpy()))
        for flat in (one.contiguous().reshape(-1) for one in tensors[:-1])
    ]
    assert _sums(tensors) == (*expected, 0x3F80 - 0x8000)


def test_results_of_other_weights_are_not_taken_from_the_cache(tmp_path):
    shared = Translator(marian(), make_tokenizer())
    translate = BackTranslator(shared, shared, cache_dir=tmp_path, min_similarity=0)
    translate(texts(4), n=1)
    optimizer_step(shared.model, fused=True)
    translate(texts(4), n=1)
    assert translate.report.cached == 0
    assert len(list(tmp_path.iterdir())) == 2
    translate(texts(4), n=1)
    assert translate.report.cached == len(set(texts(4)))


@pytest.mark.gpu
def test_weights_on_a_gpu_are_read_once_and_again_when_they_change(monkeypatch):
    reads = []
    read = _translator._digest
    monkeypatch.setattr(_translator, "_digest", lambda model: reads.append(model) or read(model))
    expected = _weights(marian())
    model = marian().to("cuda")
    assert [_weights(model) for _ in range(3)] == [expected] * 3
    assert len(reads) == 2
    optimizer_step(model, fused=True)
    assert _weights(model) != expected
    assert len(reads) == 3


def test_one_folder_named_twice_is_loaded_once(tmp_path):
    one = PAIRS["marian"]()[0]
    one.model.save_pretrained(tmp_path)
    one.tokenizer.save_pretrained(tmp_path)
    translate = BackTranslator(tmp_path, Translator(str(tmp_path), target="de"), device="cpu")
    assert translate._forward.model is translate._backward.model


def test_hugging_face_map():
    given = texts(6)
    translate = pair()
    data = datasets.Dataset.from_dict({"text": given, "label": list(range(6))})
    found = translate(given, n=2)
    assert translate({"text": given}) == {"text": [one for made in found for one in made]}
    mapped = data.map(translate, batched=True, batch_size=4, fn_kwargs={"n": 2})
    assert mapped["text"][:] == [one for made in found for one in made]
    assert mapped["label"][:] == [k for k, made in enumerate(found) for _ in made]
    with pytest.raises(TypeError, match="use batched=True"):
        translate({"text": given[0], "label": 1})
    with pytest.raises(ValueError, match="column='text'; there are"):
        translate({"body": given})


def test_calls_do_not_change_the_hash_of_a_map(tmp_path):
    translate = pair(cache_dir=tmp_path, batch_tokens=100_000)
    before = datasets.fingerprint.Hasher.hash(translate)
    translate(texts(6))
    translate._forward.batch_tokens //= 2  # as when memory runs out
    assert datasets.fingerprint.Hasher.hash(translate) == before
    assert datasets.fingerprint.Hasher.hash(pair(max_ratio=3.0)) != before
    again = pickle.loads(pickle.dumps(translate))
    assert again._forward.batch_tokens == 100_000
    assert again(texts(6)) == translate(texts(6))
    assert again.report.cached == 2 * len(set(texts(6)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_the_bar_gets_to_its_end(monkeypatch, options):
    bars = []

    @contextmanager
    def bar(shown, total, **names):
        bars.append([shown, total, 0])

        def advance(count):
            bars[-1][2] += count

        yield advance

    monkeypatch.setattr(_back_translation, "progress_bar", bar)
    monkeypatch.setattr(_back_translation, "_WINDOW", 4)
    given = [*texts(9), " ".join(["w1"] * 200)]
    pair(progress=True, **options)(given, n=2)
    work = 2 * len(set(texts(9))) * (1 if options else 2)  # there and back, for each sample
    assert bars == [[True, work, work]]
    pair(progress=True, **options)("w1", n=1)
    pair(progress=False)(given, n=2)
    assert [one[0] for one in bars] == [True, False, False]


def test_a_low_yield_warns():
    translate = pair(min_similarity=1.0)
    with pytest.warns(UserWarning, match=r"0 of 12 results were kept; dropped: .*\d+ different"):
        assert translate(texts(6), n=2) == [[]] * 6
    assert translate(texts(6)[0], n=2) == []  # of one text no warning


def test_texts_beyond_the_model_are_dropped_and_said():
    long = " ".join(["w1"] * 200)
    translate = pair()
    assert translate([long, "w3 w4"], n=2)[0] == []
    assert translate.report.dropped["too_long"] == 2


def test_what_is_no_paraphrase_is_dropped():
    translate = pair(min_similarity=0.3, max_ratio=2.0)
    dropped = Counter()
    text = "The weather is very nice today."
    results = [
        ("The weather is really nice today.", ""),
        ("the weather  is really nice today.", ""),
        ("THE weather is very nice today.", ""),
        ("", ""),
        ("The weather is", "truncated"),
        ("Nice.", ""),
        ("The weather is very nice today. " * 3, ""),
        ("Quantum groups of low rank", ""),
    ]
    assert translate._keep(text, results, dropped) == ["The weather is really nice today."]
    assert dropped == {
        "repeated": 1, "identical": 1, "empty": 1, "truncated": 1, "length": 2, "different": 1,
    }  # fmt: skip


def test_similarity():
    assert similarity("abc", "abc") == similarity("A  b", "a b") == 1
    assert similarity("abc", "xyz") == 0
    assert similarity("今日は", "今日も") > 0


def test_scores_that_are_no_numbers_are_refused():
    translate = pair()
    with torch.no_grad():
        translate._forward.model.final_logits_bias[0, 9] = torch.nan
    with pytest.raises(RuntimeError, match="forward: the scores are no numbers"):
        translate(texts(2))


def test_training_mode_comes_back():
    translate = pair()
    translate._forward.model.train()
    found = translate(texts(3))
    assert found == pair()(texts(3))
    assert translate._forward.model.training
    assert not translate._backward.model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens=0 and num_beams=1 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
        ({"temperature": 1.0, "num_beams": 2}, "temperature=1.0 samples and num_beams=2 does not"),
        ({"max_ratio": 0.5}, "max_ratio=0.5 must be at least 1"),
        ({"min_similarity": 2}, r"min_similarity=2 must be in \[0, 1\]"),
        ({"dtype": "float99"}, "dtype='float99'; use 'auto'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options)


def test_wrong_models_and_calls():
    model, tokenizer = marian(), make_tokenizer()
    good = Translator(model, tokenizer)
    with pytest.raises(ValueError, match="backward: a model needs its tokenizer"):
        BackTranslator(good, Translator(model))
    with pytest.raises(ValueError, match=r"forward: prompt='de' must hold \{text\} once"):
        BackTranslator(Translator(model, tokenizer, prompt="de"), good)
    with pytest.raises(ValueError, match="a causal model needs to be told what to do"):
        BackTranslator(Translator(llama(), tokenizer), good)
    with pytest.raises(ValueError, match="cannot write text"):
        BackTranslator(Translator(model.get_encoder(), tokenizer), good)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        pair()(["w1"], n=0)
    with pytest.raises(TypeError, match="texts holds a int"):
        pair()(["w1", 2])
    assert pair()([]) == []


@pytest.mark.gpu
def test_on_a_gpu():
    there, back = PAIRS["marian"]()
    translate = BackTranslator(there, back, device="cuda", min_similarity=0, max_ratio=1e9)
    found = translate(texts(20), n=2)
    assert found == translate(texts(20), n=2)
    assert sum(map(len, found)) > 0
