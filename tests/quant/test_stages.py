import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from torsh_quant._batches import first_tensor, run_model
from torsh_quant._stages import (
    Feed,
    Stage,
    chained_blocks,
    count_calls,
    plan_stages,
    without_cache,
)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def tokens(n=3, length=7):
    ids = torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def test_blocks_of_real_architectures():
    assert chained_blocks(llama(), tokens()) == [f"model.layers.{n}" for n in range(3)]
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
    )
    found = chained_blocks(BertModel(config).eval(), tokens())
    assert found == [f"encoder.layer.{n}" for n in range(2)]
    mlp = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))).eval()
    assert chained_blocks(mlp, torch.rand(2, 4)) == ["0", "1", "2"]


def test_what_only_looks_like_blocks_is_none():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x):
            y = self.layers[0](x)
            return self.layers[1](x + y)

    class Conditioned(Residual):
        def forward(self, x):
            for number, layer in enumerate(self.layers):
                x = layer(x) if number else layer(x.clone())
            return self.layers[0](x)

    assert chained_blocks(Residual().eval(), torch.rand(2, 4)) == []
    assert chained_blocks(Conditioned().eval(), torch.rand(2, 4)) == []


def test_stages_follow_the_calls():
    net, batch = llama(), tokens()
    calls = count_calls(net, batch)
    stages = plan_stages(net, batch, calls, layerwise=True)
    assert [len(stage.layers) for stage in stages] == [7, 7, 7, 1]
    assert stages[0].layers[0] == "model.layers.0.self_attn.q_proj"
    assert stages[-1] == Stage(("lm_head",), None, ends=True)
    assert plan_stages(net, batch, calls, layerwise=False) == [Stage(tuple(calls))]


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_each_stage_sees_what_the_model_gives_it(kind):
    if kind == "llama":
        net, batches = llama(), [tokens(3), tokens(5)]
    else:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 2)).eval()
        batches = [torch.rand(3, 4), torch.rand(2, 4)]
    seen = {}

    def look(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].clone())

    with without_cache(net):
        calls = count_calls(net, batches[0])
        stages = plan_stages(net, batches[0], calls, layerwise=True)
        feed = Feed(net, batches)
        for number, stage in enumerate(stages):
            hooks = [
                net.get_submodule(name).register_forward_pre_hook(look(name))
                for name in stage.layers
            ]
            for batch in range(len(batches)):
                feed.run(stage, batch)
            for hook in hooks:
                hook.remove()
            with torch.no_grad():  # as quantization would change it
                net.get_submodule(stage.layers[0]).weight.mul_(0.5)
            feed.hand_on(stage, stages[number + 1] if number + 1 < len(stages) else None)
    found = dict(seen.items())
    assert all(len(inputs) == len(batches) for inputs in found.values())
    # The first layer of each stage: all stages before it are changed, as they are now.
    for stage in stages:
        name, wanted = stage.layers[0], []
        hook = net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, wanted=wanted: wanted.append(args[0].clone())
        )
        with torch.no_grad(), without_cache(net):
            for batch in batches:
                first_tensor(run_model(net, batch))
        hook.remove()
        for a, b in zip(found[name], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_called_twice_is_not_cut_short():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    net = Shared().eval()
    calls = count_calls(net, torch.rand(2, 4))
    assert calls == {"fc": 2}
    (stage,) = plan_stages(net, torch.rand(2, 4), calls, layerwise=True)
    assert not stage.ends
    seen = []
    net.fc.register_forward_hook(lambda *_: seen.append(1))
    Feed(net, [torch.rand(2, 4)]).run(stage, 0)
    assert len(seen) == 2


def test_the_cache_setting_comes_back():
    net = llama()
    net.config.use_cache = True
    with without_cache(net):
        assert net.config.use_cache is False
    assert net.config.use_cache is True
