"""Peers: plain modules that compute what the FIT does, one compilation a kind of block."""

import sys
import types
from dataclasses import replace

import peers
import pytest
import torch
from fit_subject import FITSubject
from gate import Inputs, expected_output, judged
from subject import PEERS, Variant
from support import CLIP
from workload import build_model, load_batch

from snapkernels import RECIPES
from snapvideo_core import FIT
from snapvideo_core.config import TINY

CPU = torch.device("cpu")


def a_call(config=TINY, dtype=torch.float64):
    """A model that is all PyTorch's calls, and inputs of it."""
    model = build_model(config, CPU, dtype, "eager").eval()
    data = load_batch(CLIP, config, 2, 24.0, CPU)
    latents = torch.randn(2, config.num_latents, config.latent_dim, dtype=dtype)
    return model, Inputs(data.x_sigma.to(dtype), data.sigma, data.cond, latents)


def plain(model, monkeypatch, backend="torchao", **how):
    monkeypatch.setattr(peers, "compile_by_block", lambda _: None)
    peers.by_peer(model, backend, **({"training": False} | how))


def test_plain_modules_compute_the_model_with_its_own_parameters(monkeypatch):
    model, inputs = a_call()
    expected, named = expected_output(model, inputs), dict(model.named_parameters())
    monkeypatch.setattr(peers, "_quantise_by_torchao", lambda _: None)
    plain(model, monkeypatch)
    assert judged(model, inputs, expected, 1e-6)[0] == "ok"
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"PlainFeedForward", "PlainCrossAttention", "PlainSelfAttention"} <= kinds
    assert not kinds & {"FeedForward", "GroupRead", "GroupWrite", "LatentAttention"}
    after = dict(model.named_parameters())
    assert {id(one) for one in after.values()} == {id(one) for one in named.values()}


def test_dropout_acts_in_training_alone_and_only_where_the_model_has_it(monkeypatch):
    model, _ = a_call()
    monkeypatch.setattr(peers, "_quantise_by_torchao", lambda _: None)
    plain(model, monkeypatch)
    rates = {n: m.dropout.p for n, m in model.named_modules() if hasattr(m, "dropout")}
    assert {name for name, p in rates.items() if p} == {
        f"blocks.{block}.global_layers.0.1" for block in range(TINY.blocks)
    }


def test_another_attention_is_called_where_there_is_no_mask(monkeypatch):
    seen = []

    def attention(q_BHQE, k_BHKE, v_BHKE, *, attn_mask):
        assert attn_mask is None
        seen.append(k_BHKE.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE)

    model, inputs = a_call()
    expected = expected_output(model, inputs)
    monkeypatch.setitem(peers.ATTENTIONS, "flash-attn", attention)
    plain(model, monkeypatch, "flash-attn")
    assert judged(model, inputs, expected, 1e-6)[0] == "ok"
    group_latents = TINY.num_latents // TINY.num_groups
    block = [TINY.group_tokens, TINY.num_latents, group_latents]  # read, global, write
    assert seen == block * TINY.blocks


def test_torchao_is_given_the_linears_of_the_recipe_alone(monkeypatch):
    model, _ = a_call()
    taken, said = [], []
    fake = types.ModuleType("torchao.quantization")
    fake.PerRow = lambda: "rows"
    fake.Float8DynamicActivationFloat8WeightConfig = lambda **how: said.append(how)
    fake.quantize_ = lambda model, _, filter_fn: taken.extend(
        name for name, module in model.named_modules() if filter_fn(module, name)
    )
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    plain(model, monkeypatch)
    assert said == [{"granularity": "rows", "set_inductor_config": False}]
    sublayers = ("read", "write", "global_layers.0.0")
    block = {f"{name}.{linear}" for name in sublayers for linear in "qkvo"}
    ffs = ("cond_ff", "read_ff", "write_ff", "global_layers.0.1")
    block |= {f"{name}.{linear}" for name in ffs for linear in ("fc1", "fc2")}
    wanted = {f"blocks.{number}.{name}" for number in range(TINY.blocks) for name in block}
    wanted |= {f"blocks.1.cond_read.{linear}" for linear in "qkvo"}
    assert set(taken) == wanted | {"self_conditioning.ff.fc1", "self_conditioning.ff.fc2"}


@pytest.mark.parametrize("name", list(PEERS))
def test_an_absent_peer_says_so(name, monkeypatch):
    monkeypatch.setattr(peers, "NEEDS", dict.fromkeys(peers.NEEDS, "no_such_module_here"))
    with pytest.raises((ImportError, NotImplementedError), match="absent"):
        peers.require_peer(name)


def test_a_block_is_compiled_once_for_all(monkeypatch):
    compiled = []

    def counted(graph, inputs):
        compiled.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend=counted, **how))
    monkeypatch.setattr(FIT, "compile", lambda model, **how: None)
    counts = []
    for blocks in (2, 5):
        compiled.clear()
        torch.compiler.reset()
        model, inputs = a_call(replace(TINY, blocks=blocks))
        expected = expected_output(model, inputs)
        peers.compile_by_block(model)
        with torch.no_grad():
            assert judged(model, inputs, expected, 1e-6)[0] == "ok"
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0


def test_a_peer_quantised_is_held_to_the_limit_of_fp8_and_gated_at_its_batch(
    monkeypatch, cpu_options
):
    options = cpu_options(dtype=torch.bfloat16)
    monkeypatch.setattr("fit_subject.require_peer", lambda name: None)
    batches = []

    def off_by_a_tenth(model, backend, *, training):
        batches.append(len(model.positions))
        real = model.forward
        model.forward = lambda x, *rest: (
            batches.append(len(x)) or real(x, *rest)[0] * 1.1,
            real(x, *rest)[1],
        )

    monkeypatch.setattr("fit_subject.by_peer", off_by_a_tenth)
    for recipe, ok in (("fp8", True), ("bf16", False)):
        batches.clear()
        subject = FITSubject(TINY, Variant("torchao", RECIPES[recipe]), options, 3, "infer")
        verdict, error = subject.gated()
        assert (verdict == "ok") is ok and error["rms_vs_fp64"] == pytest.approx(0.1, abs=0.01)
        assert batches == [1, 3]  # what is compiled is compiled once
