import math
import random

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from tests.text.architectures import PACKED, make_model, make_tokenizer, random_texts
from tests.text.test_few_shot import read_sst2, read_trec
from tests.text.test_heads import make_classifier_model
from tests.text.writers import make_writer
from torsh_text import Classifier, Encoder, Generator, Label, ZeroShot
from torsh_text._label_likelihood import (
    check_tree,
    label_likelihoods,
    likelihoods_as_tree,
    likelihoods_one_by_one,
)
from torsh_text._runtime import Budget

WORDS = ["w10", "w20 w21", "w30 w31 w32"]
TEMPLATE = "w40 {} w41"
TOPICS = {
    "ABBR": "an abbreviation",
    "DESC": "a definition or description",
    "ENTY": "a thing, animal or product",
    "HUM": "a person or group",
    "LOC": "a place, city or country",
    "NUM": "a number, date or amount",
}


def pair_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    return tokenizer


def make_nli(names=("contradiction", "neutral", "entailment"), family="bert", **options):
    model = make_classifier_model(family, num_labels=len(names), id2label=dict(enumerate(names)))
    return Classifier(model, pair_tokenizer(), max_length=40, name="nli", **options).eval()


def make_lm(family="llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **PACKED[family] | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def nli_logits(classifier, text, sentence):
    """Logits of transformers for one pair, unpadded."""
    row = pair_tokenizer()(text, sentence, return_tensors="pt")
    with torch.no_grad():
        return classifier.model(**row).logits[0]


@pytest.mark.parametrize("attn", ["packed", "padded"])
@pytest.mark.parametrize(
    "names",
    [("contradiction", "neutral", "entailment"), ("ENTAILMENT", "Neutral", "Contradiction")],
)
def test_entailment_is_found_by_name(names, attn):
    classifier = make_nli(names, attn=attn)
    entailed = [name.lower() for name in names].index("entailment")
    against = [name.lower() for name in names].index("contradiction")
    texts = random_texts([5, 12, 1, 9])
    texts.append(texts[0])
    model = ZeroShot(classifier)
    assert model.via == "nli"
    together = model.scores(texts, WORDS, template=TEMPLATE)
    apart = model.scores(texts, WORDS, template=TEMPLATE, multi_label=True)
    for text, row, each in zip(texts, together, apart, strict=True):
        pairs = torch.stack([nli_logits(classifier, text, f"w40 {word} w41") for word in WORDS])
        expected = pairs[:, entailed].softmax(0)
        assert (row - expected).abs().max() <= 5e-6  # probabilities from logits right to 2e-6
        expected = pairs[:, [against, entailed]].softmax(1)[:, 1]
        assert (each - expected).abs().max() <= 5e-6
    assert together.sum(1).allclose(torch.ones(5))


def test_two_way_entailment_and_none():
    two = ZeroShot(make_nli(("entailment", "not_entailment")))
    text = "w50 w51"
    pair = nli_logits(two.model, text, "w40 w10 w41")
    found = two.scores([text], ["w10"], template=TEMPLATE, multi_label=True)
    assert float(found) == pytest.approx(float(pair.softmax(0)[0]), abs=5e-6)
    alone = ZeroShot(make_nli(("entailment", "other")))
    with pytest.raises(ValueError, match="which nli has not among its labels"):
        alone.predict(text, WORDS, multi_label=True)
    with pytest.raises(ValueError, match="of which not one is 'entailment'"):
        ZeroShot(make_nli(("no", "yes")))


def test_pairs_carry_token_types_only_where_the_model_was_trained_with_them():
    seen = []
    classifier = make_nli()
    classifier.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    classifier.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("token_type_ids")), with_kwargs=True
    )
    ZeroShot(classifier).predict("w5", WORDS)
    assert seen[-1].max() == 1
    classifier.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    ZeroShot(classifier).predict("w5", WORDS)
    assert seen[-1] is None


def test_memory_is_bounded_by_windows_of_pairs(monkeypatch):
    model = ZeroShot(make_nli())
    texts = random_texts([n % 5 + 1 for n in range(11)])
    expected = model.scores(texts, WORDS)
    monkeypatch.setattr("torsh_text._zero_shot._PAIRS", 7)
    sizes = []
    run = model.model._rows_through
    monkeypatch.setattr(
        model.model,
        "_rows_through",
        lambda items, *a, **k: sizes.append(len(items)) or run(items, *a, **k),
    )
    assert (model.scores(texts, WORDS) - expected).abs().max() <= 2e-6
    assert max(sizes) <= 7


def test_what_predict_gives_back():
    model = ZeroShot(make_nli())
    texts = random_texts([4, 7])
    best = model.predict(texts, WORDS)
    assert all(isinstance(label, Label) for label in best)
    one = model.predict(texts[0], WORDS)
    assert (one.name, one.score) == (best[0].name, pytest.approx(best[0].score, abs=2e-6))
    every = model.predict(texts, WORDS, top_k=3)
    assert [labels[0] for labels in every] == best
    assert model.predict(texts[0], WORDS, multi_label=True, min_score=1.0) == []
    assert len(model.predict(texts[0], WORDS, multi_label=True, min_score=0)) == 3
    assert model.predict([], WORDS) == []
    # braces in a label are no template
    assert model.predict("w5", ["{0}", "w6"]).name in ("{0}", "w6")


def test_long_texts_are_cut_and_counted_or_refused():
    model = ZeroShot(make_nli())
    texts = ["w5", *random_texts([60])]
    with pytest.warns(UserWarning, match="1 texts were too long") as caught:
        found = model.predict(texts, WORDS, template=TEMPLATE)
    assert [label.truncated for label in found] == [False, True]
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="has more than max_length=40"):
        model.predict(texts, WORDS, long="error")


def test_texts_are_counted_that_were_cut_not_pairs():
    """Four texts, each cut beside the long label only."""
    texts = random_texts([33, 33, 33, 33])
    assert len(set(texts)) == 4
    for labels in (["w10", "w30 w31 w32 w33"], ["w10 w11", "w20 w21 w22", "w30 w31 w32 w33"]):
        with pytest.warns(UserWarning, match="4 texts were too long"):
            ZeroShot(make_nli()).predict(texts, labels, template=TEMPLATE)


def test_one_text_has_one_row_of_scores():
    model = ZeroShot(make_nli())
    assert torch.equal(model.scores("w5", WORDS), model.scores(["w5"], WORDS)[0])


def test_it_is_a_module_of_its_model():
    classifier = make_nli()
    model = ZeroShot(classifier)
    assert not model.training
    assert list(model.children()) == [classifier]
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode; call \.eval\(\) first"):
        model.predict("w5", WORDS)
    assert model.eval().predict("w5", WORDS).name in WORDS
    model.to(torch.float64)
    assert classifier.backbone.dtype == torch.float64


def test_out_of_memory_shrinks_the_batches_of_labels():
    model = make_lm()
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 500, (n,), generator=draw).tolist() for n in (5, 12, 20, 7, 1)]
    labels = [[5, 6], [7]]
    expected = likelihoods_as_tree(model, prompts, labels, budget=Budget(1000))
    sizes = []

    def small(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no more than two rows")

    with model.register_forward_pre_hook(small, with_kwargs=True) as _, torch.no_grad():
        budget = Budget(1000)
        found = likelihoods_as_tree(model, prompts, labels, budget=budget)
    assert sizes[0] == 5
    assert budget.max_tokens < 5 * 23
    assert (found - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a"], {}, "has 1 names; give at least 2"),
        (["a", "a"], {}, "more than once"),
        (WORDS, {"template": "about"}, "has to hold {} once"),
        (WORDS, {"long": "mean"}, "long='mean' is none of"),
        (WORDS, {"top_k": 0}, "top_k=0"),
        (WORDS, {"min_score": 0.7}, "min_score=0.7 leaves labels out of a list"),
        (WORDS, {"cache": "folder"}, "cache keeps vectors, and via='nli' makes none"),
        (WORDS, {"top_k": 4}, "top_k=4 is not between 1 and the 3 labels"),
    ],
)
def test_refuses_wrong_options(labels, options, message):
    with pytest.raises(ValueError, match=message):
        ZeroShot(make_nli()).predict("w5", labels, **options)


def test_refuses_wrong_models():
    with pytest.raises(ValueError, match="via='magic' is none of"):
        ZeroShot(make_nli(), via="magic")
    with pytest.raises(TypeError, match="via='lm' cannot use a Classifier; it fits via='nli'"):
        ZeroShot(make_nli(), via="lm")
    with pytest.raises(TypeError, match="model is a int"):
        ZeroShot(3)
    with pytest.raises(ValueError, match="temperature=0 is not positive"):
        ZeroShot(make_nli(), temperature=0)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        ZeroShot(make_lm())
    with pytest.raises(RuntimeError, match="training mode"):
        ZeroShot(make_nli().train()).predict("w5", WORDS)


def test_embedding_compares_with_each_label_sentence():
    encoder = Encoder(make_model("bert"), make_tokenizer(), max_length=40).eval()
    model = ZeroShot(encoder)
    assert model.via == "embed"
    texts = random_texts([3, 8])
    found = model.scores(texts, WORDS, template=TEMPLATE)
    for text, row in zip(texts, found, strict=True):
        cosines = [
            torch.cosine_similarity(encoder.encode(text), encoder.encode(f"w40 {word} w41"), dim=0)
            for word in WORDS
        ]
        total = sum(math.exp(float(c) / 0.05) for c in cosines)
        expected = torch.tensor([math.exp(float(c) / 0.05) / total for c in cosines])
        assert (row - expected).abs().max() <= 1e-4  # 20 times the rounding of a cosine
    warm = ZeroShot(encoder, temperature=5.0).scores(texts, WORDS, template=TEMPLATE)
    assert warm.max() < found.max()
    with pytest.raises(ValueError, match="multi_label=True needs via='nli'"):
        model.predict("w5", WORDS, multi_label=True)


def test_vectors_of_texts_come_from_a_cache(tmp_path):
    encoder = Encoder(make_model("bert"), make_tokenizer(), max_length=40).eval()
    rows = []
    encoder.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["packed"])), with_kwargs=True
    )
    texts = random_texts([3, 8, 60])
    zero = ZeroShot(encoder)
    with pytest.warns(UserWarning, match="1 of 3 different texts"):
        first = zero.predict(texts, WORDS, cache=tmp_path)
    assert [label.truncated for label in first] == [False, False, True]
    assert sum(rows) == 6
    with pytest.warns(UserWarning, match="1 of 3 different texts"):
        assert zero.predict(texts, WORDS, cache=tmp_path) == first
    assert sum(rows) == 9  # the labels alone
    with pytest.warns(UserWarning, match="1 of 3 different texts"):
        scores = zero.scores(texts, WORDS, cache=tmp_path)
    assert scores.max(1).values.tolist() == [label.score for label in first]


def test_an_encoder_in_a_folder_knows_no_entailment(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Use a model trained on natural language inference"):
        ZeroShot(tmp_path, via="nli")
    assert ZeroShot(tmp_path).via == "embed"


def test_labels_are_encoded_once(monkeypatch):
    encoder = Encoder(make_model("bert"), make_tokenizer(), max_length=40).eval()
    rows = []
    encoder.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["packed"])), with_kwargs=True
    )
    ZeroShot(encoder).predict([*random_texts([3, 8, 4]), "w5", "w5"], WORDS)
    assert sum(rows) == 3 + 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_a_tree_of_labels_is_each_label_alone(family):
    model = make_lm(family)
    assert check_tree(model) is None
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 500, (n,), generator=draw).tolist() for n in (5, 12, 20, 7, 1)]
    labels = [[5, 6], [7], [8, 9, 10], [5, 9]]
    with torch.no_grad():
        expected = likelihoods_one_by_one(model, prompts, labels)
        for budget in (1, 60, 1000):
            found = likelihoods_as_tree(model, prompts, labels, budget=Budget(budget))
            assert (found - expected).abs().max() <= 2e-5  # rounding of log-probabilities near 6


def test_rows_beyond_a_sliding_window_are_asked_one_by_one():
    model = make_lm("mistral")
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 500, (n,), generator=draw).tolist() for n in (5, 45, 30)]
    labels = [[5, 6], [7]]
    with torch.no_grad():
        expected = likelihoods_one_by_one(model, prompts, labels)
        tree = likelihoods_as_tree(model, prompts, labels, budget=Budget(100))
        found = label_likelihoods(model, prompts, labels, budget=Budget(100))
    assert (found - expected).abs().max() <= 2e-5
    assert (tree - expected).abs().max() > 0.01  # so the split is needed


def test_a_language_model_is_asked_for_whole_labels():
    """Against a loop over labels with the prompt as a user would write it."""
    model, tokenizer = make_lm(max_position_embeddings=128), make_tokenizer()
    zero = ZeroShot(model, tokenizer=tokenizer)
    assert zero.via == "lm"
    texts = ["w50 w51 w52", "w60"]
    found = zero.scores(texts, WORDS)
    for text, row in zip(texts, found, strict=True):
        prompt = (
            "Which label fits the text best? Answer with the label alone.\n\nLabels: "
            f"{', '.join(WORDS)}\n\nText: {text}\n\nLabel:"
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        means = []
        for word in WORDS:
            answer = tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            places = range(len(ids) - 1, len(ids) + len(answer) - 1)
            means.append(sum(logs[p, i] for p, i in zip(places, answer, strict=True)) / len(answer))
        assert (row - torch.stack(means).softmax(0)).abs().max() <= 5e-6
    same = ZeroShot(Generator(model, tokenizer)).scores(texts, WORDS)
    assert (same - found).abs().max() <= 1e-6


def test_a_text_cannot_leave_its_place_in_a_chat_prompt():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w100 {{ m['content'] }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %} w101{% endif %}"
    )
    zero = ZeroShot(make_lm(max_position_embeddings=128), tokenizer=tokenizer)
    before, after = zero._frame(WORDS)
    assert before[0] == 100
    assert after == [2, 101]
    assert zero.predict("{{ 7 * 7 }} {% raw %} [SEP] w101", WORDS).name in WORDS
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert zero._ids("w5 <|end|> w6") == [5, 500, 6]
    assert zero._ids("w5 <|end|> w6", plain=True) == [5, 3, 6]  # an unknown word
    with pytest.raises(ValueError, match="private characters"):
        zero.predict("w5", ["\ue000\ue001\ue000", "w6"])


def test_limits_of_a_language_model():
    zero = ZeroShot(make_lm(max_position_embeddings=40), tokenizer=make_tokenizer())
    texts = ["w5", *random_texts([60])]
    with pytest.warns(UserWarning, match="1 texts were too long"):
        found = zero.predict([*texts, "w6"], WORDS)
    assert [label.truncated for label in found] == [False, True, False]
    with pytest.raises(ValueError, match="cache keeps vectors, and via='lm' makes none"):
        zero.predict("w5", WORDS, cache="folder")
    with pytest.raises(ValueError, match=r"has 60 tokens, .* fit"):
        zero.predict(texts, WORDS, long="error")
    with pytest.raises(ValueError, match="leave no room"):
        zero.predict("w5", [f"w{i}" for i in range(30, 90)])
    with pytest.raises(ValueError, match="template is not used"):
        zero.predict("w5", WORDS, template="{}?")
    with pytest.raises(ValueError, match="multi_label=True needs"):
        zero.predict("w5", WORDS, multi_label=True)


def test_a_model_whose_mask_does_not_hold_is_asked_label_by_label():
    """Eager BLOOM builds its own mask and refuses ours."""
    config = AutoConfig.for_model("bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=500)
    model = AutoModelForCausalLM.from_config(config).eval()
    if check_tree(model) is None:
        pytest.skip("this transformers takes our mask")
    with pytest.warns(UserWarning, match="is asked label by label, which is slower"):
        zero = ZeroShot(model, tokenizer=make_tokenizer())
    assert zero.predict("w5 w6", WORDS).name in WORDS


def test_loads_by_what_a_folder_holds(tmp_path, minilm_path):
    make_nli().save_pretrained(tmp_path / "nli")
    make_lm().save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    assert ZeroShot(tmp_path / "nli").via == "nli"
    assert ZeroShot(tmp_path / "lm").via == "lm"
    assert ZeroShot(str(minilm_path)).via == "embed"


def test_a_language_model_without_its_weights_is_refused(tmp_path, minilm_path):
    with pytest.raises(ValueError, match=r"lack \d+ tensors of BertLMHeadModel .*would be random"):
        ZeroShot(minilm_path, via="lm")
    t5 = make_writer("t5")
    with pytest.raises(TypeError, match="needs a causal model, T5ForConditionalGeneration"):
        ZeroShot(t5, tokenizer=make_tokenizer())


def test_real_questions_and_reviews(minilm, text_data):
    """Seen: 0.56 of six kinds of questions (chance 0.17) and 0.67 of two moods (chance 0.5)."""
    zero = ZeroShot(minilm)
    rows = random.Random(7).sample(read_trec(text_data), 200)
    names = {sentence: kind for kind, sentence in TOPICS.items()}
    found = zero.predict(
        [text for text, _ in rows], list(names), template="The answer to this question is {}."
    )
    right = sum(names[label.name] == kind for label, (_, kind) in zip(found, rows, strict=True))
    assert right / 200 >= 0.48
    rows = read_sst2(text_data, "dev")[:200]
    found = zero.predict(
        [text for text, _ in rows], ["positive", "negative"], template="This movie review is {}."
    )
    right = sum(label.name == mood for label, (_, mood) in zip(found, rows, strict=True))
    assert right / 200 >= 0.6


def test_a_gguf_file_is_a_language_model(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(FileNotFoundError, match=r"x\.gguf' is no file on this machine"):
        ZeroShot(tmp_path / "x.gguf")


def test_a_device_is_for_what_is_loaded(minilm, minilm_path):
    assert ZeroShot(minilm_path, device="cpu").model.backbone.device.type == "cpu"
    with pytest.raises(ValueError, match="device='gpu' is no device"):
        ZeroShot(minilm_path, device="gpu")
    with pytest.raises(ValueError, match="device='cpu' is for a path or hub id"):
        ZeroShot(minilm, device="cpu")


def test_errors_number_the_texts_as_they_were_given(monkeypatch):
    monkeypatch.setattr("torsh_text._zero_shot._PAIRS", 3)
    texts = ["w5", "w6", "w5", "w7", *random_texts([60])]
    classifier = make_nli()
    with pytest.raises(
        ValueError, match=r"texts\[4\] has more .*; use long='truncate' or a larger"
    ):
        ZeroShot(classifier).predict(texts, WORDS, template=TEMPLATE, long="error")
    with pytest.raises(ValueError, match=r"texts\[3\] holds a lone surrogate"):
        ZeroShot(classifier).predict(["w5", "w5", "w6", "a\ud800"], WORDS)
    with pytest.raises(ValueError, match=r"labels\[1\] holds a lone surrogate"):
        ZeroShot(classifier).predict("w5", ["w5", "a\ud800"])
    with torch.no_grad():
        classifier.backbone.embeddings.word_embeddings.weight[7] = torch.nan
    with pytest.raises(RuntimeError, match=r"texts\[3\] is not finite"):
        ZeroShot(classifier).predict(texts[:4], WORDS, template=TEMPLATE)
    model = ZeroShot(make_lm(max_position_embeddings=64), tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match=r"texts\[2\] has 90 tokens"):
        model.predict(["w5", "w5", *random_texts([90])], ["w5", "w6"], long="error")


def test_warnings_point_to_the_line_that_asked(tiny):
    for model in (ZeroShot(tiny), ZeroShot(make_nli())):
        for method in (model.predict, model.scores):
            with pytest.warns(UserWarning, match="cut") as told:
                method(random_texts([60]), WORDS, template=TEMPLATE)
            assert [one.filename for one in told] == [__file__]
