"""The gate passes the model as it is and turns red for each seeded bug."""

import gate as gate_module
import pytest
import torch
from support import CLIP
from workload import build_model, load_batch

from snapkernels import dispatch, library, quantise
from snapkernels.ops.latent_attn import op as latent_attn
from snapkernels.registry import OPS
from snapvideo_core import PRESETS, SnapDiffusion

CPU = torch.device("cpu")


def without_mask(f):
    """group_read has a mask after its weights, group_write none."""
    return lambda q, kv, w, *rest: f(q, kv, w, *[None for _ in rest[:-2]], *rest[-2:])


def without_last_key(f):
    def call(q, kv, w, *rest):
        masked = len(rest) == 3 and rest[0] is not None
        return f(q, kv if masked else kv[:, :, :-1], w, *rest)

    return call


def q_and_k_swapped(f):
    return lambda z, w, *a: f(z, w._replace(q_weight=w.k_weight, k_weight=w.q_weight), *a)


# {bug: (where the implementation is looked up, the ops that have it, what it does to one)}
CROSS = ("group_read", "group_write")
BUGS = {
    "groups rolled": (library, CROSS, lambda f: lambda q, kv, *a: f(q, kv.roll(1, 1), *a)),
    "mask ignored": (library, CROSS, without_mask),
    "last key of each group dropped": (library, CROSS, without_last_key),
    "q and k swapped": (latent_attn, ["latent_attention"], q_and_k_swapped),
    "self-attention left out": (latent_attn, ["latent_attention"], lambda f: lambda z, *a: z),
    "residual left out": (library, ["feed_forward"], lambda f: lambda x, *a: f(x, *a) - x),
    "video mirrored": (library, ["head"], lambda f: lambda x, *a: f(x, *a).flip(-1)),
    "not a number": (library, ["head"], lambda f: lambda x, *a: f(x, *a) * float("nan")),
}


def run_gate(preset, dtype):
    config = PRESETS[preset]
    model = build_model(config, CPU, dtype, "eager").eval()
    data = load_batch(CLIP, config, 1, 24.0, CPU)
    x = SnapDiffusion(sigma_in=config.sigma_in).c_in(data.sigma.view(1, 1, 1, 1, 1)) * data.x_sigma
    previous = torch.randn(1, config.num_latents, config.latent_dim)
    return gate_module.gate(model, x, data.sigma, data.cond, previous)


@pytest.mark.parametrize("dtype", gate_module.LIMITS, ids=str)
@pytest.mark.parametrize("preset", ["mini", "tiny-up"])
def test_the_model_passes(preset, dtype):
    verdict, error = run_gate(preset, dtype)
    assert verdict == "ok"
    assert 0 < error["rms_vs_fp64"] <= gate_module.LIMITS[dtype]


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_turns_it_red(bug, monkeypatch):
    module, ops, break_it = BUGS[bug]
    broken = [OPS[name].spec.backend("eager") for name in ops]

    def implementation(backend):
        function = dispatch.implementation(backend)
        return break_it(function) if any(backend is one for one in broken) else function

    monkeypatch.setattr(module, "implementation", implementation)
    verdict, _ = run_gate("mini", torch.bfloat16)
    assert verdict.startswith("relative rms error")


def test_the_model_comes_back_as_it_was():
    model = build_model(PRESETS["tiny"], CPU, torch.bfloat16, "eager").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with gate_module.float64_reference(model):
        assert model.positions.dtype == torch.float64
        assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"reference"}
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"eager"}
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, before[name]), name


def test_a_quantised_model_is_judged_by_the_weights_it_had():
    """And plain fp8 is measured on it without changing which backend its layers have."""
    config = PRESETS["tiny"]
    model = build_model(config, CPU, torch.bfloat16, "reference").eval()
    data = load_batch(CLIP, config, 1, 24.0, CPU)
    previous = torch.randn(1, config.num_latents, config.latent_dim)
    inputs = gate_module.Inputs(data.x_sigma, data.sigma, data.cond, previous)
    expected = gate_module.expected_output(model, inputs)
    assert expected.dtype == torch.float64
    quantise(model, "fp8")
    plain = gate_module.plain_error(model, inputs, expected)
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"reference"}
    verdict, error = gate_module.judged(model, inputs, expected, plain)
    assert verdict == "ok"  # the reference leaves activations as they are
    assert 5e-3 < error["rms_vs_fp64"] < plain < gate_module.QUANTISED_LIMIT
    verdict, _ = gate_module.judged(model, inputs, expected, error["rms_vs_fp64"] / 1.01)
    assert verdict.startswith("relative rms error")
    own = gate_module.expected_output(model, inputs)  # of the weights as they are now
    assert gate_module.judged(model, inputs, own, 1.5e-2)[0] == "ok"
