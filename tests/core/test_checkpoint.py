"""Checkpoints: what is saved is what is loaded, and anything else is refused by name."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from snapkernels import RECIPES, FeedForward, quantise
from snapkernels.testing.numerics import relative_rms
from snapvideo_core import FIT, CheckpointError, checkpoint, load_model, save_model
from snapvideo_core.config import TINY, TINY_UP

FP8 = RECIPES["fp8"]
FF = "blocks.0.write_ff"
CONFIGS = (
    TINY,
    replace(TINY_UP, name="mine", positions="token"),
    replace(TINY, name="wide", num_latents=48),  # a read and a write that are not absorbed
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path, rng, random_fit):
    """An fp8 model and the file it is in."""
    model = quantise(random_fit(TINY, rng).bfloat16(), "fp8")
    save_model(model, path)
    return model, path


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, tensors=None, **texts):
    """The file with some of its texts or tensors changed, None to take one out."""
    changed = load_file(path) | (tensors or {})
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, path, {k: v for k, v in (header(path) | texts).items() if v is not None})


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_loaded_is_what_was_saved(
    config, dtype, recipe, path, rng, random_fit, conditioning
):
    model = quantise(random_fit(config, rng, backend="reference").to(dtype), recipe)
    save_model(model, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = load_model(path, backend="reference")
    assert (loaded.config, loaded.recipe) == (config, RECIPES[recipe])
    assert not any(module.training for module in loaded.modules())
    quantised = recipe == "fp8" and config.name == "wide"
    assert ("blocks.1.write.kv_scale" in model.state_dict()) == quantised
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor.float(), state[name].float()), name
    grads = {one.requires_grad for one in loaded.parameters()}
    assert grads == {recipe == "bf16"}
    video = torch.randn(1, 3, config.frames, config.height, config.width, generator=rng)
    call = (video, torch.ones(1), conditioning(config, 1, rng))
    expected = model(*call)
    for found, other in zip(loaded(*call), expected, strict=True):
        assert relative_rms(found, other) < 1e-2
    # Equal to the bit only from memory that begins as theirs does: a CPU sums in an order of that.
    copies = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    loaded.load_state_dict(copies, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded(*call), expected, strict=True))


def test_an_fp8_file_is_half_a_bf16_one(saved, rng, random_fit, tmp_path):
    model = random_fit(TINY, rng).bfloat16()
    save_model(model, tmp_path / "bf16")
    matrices = sum(2 * m.fc1.weight.numel() for m in model.modules() if isinstance(m, FeedForward))
    saving = (tmp_path / "bf16").stat().st_size - saved[1].stat().st_size
    assert saving > 0.8 * matrices  # a byte each, and scales and names are small


def test_loading_makes_no_weight_that_is_not_in_the_file(saved, monkeypatch):
    """Not in bf16 either: every layer is quantised as a tensor without memory."""
    real = checkpoint.quantise

    def on_meta(model, recipe):
        assert all(one.is_meta for one in (*model.parameters(), *model.buffers()))
        return real(model, recipe)

    monkeypatch.setattr(checkpoint, "quantise", on_meta)
    loaded = load_model(saved[1])
    assert not any(one.is_meta for one in (*loaded.parameters(), *loaded.buffers()))


def test_a_new_file_takes_the_place_of_an_old_one(saved, rng, random_fit):
    model = random_fit(TINY_UP, rng)
    save_model(model, saved[1])
    assert load_model(saved[1]).config == TINY_UP


def test_nothing_half_written_stays(saved, rng, random_fit, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="not written: no space left"):
        save_model(random_fit(TINY_UP, rng), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_looks_half_written_is_not_ours_to_take(saved):
    model, path = saved
    other = path.with_name(path.name + ".partial")
    other.write_text("of someone else")
    save_model(model, path)
    assert other.read_text() == "of someone else"


def test_a_model_whose_tensors_share_memory_is_not_written(path, rng, random_fit):
    model = random_fit(TINY, rng)
    model.blocks[0].cond_ff.fc1.bias = model.blocks[0].read_ff.fc1.bias
    with pytest.raises(CheckpointError, match="not written: "):
        save_model(model, path)
    assert not path.exists() and list(path.parent.iterdir()) == []


def test_a_folder_and_a_device_that_is_not_here_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="load_model: device 'cuda:77' is not here"):
        load_model(saved[1], "cuda:77")


def test_a_folder_that_is_not_there_is_named(rng, random_fit, tmp_path):
    with pytest.raises(CheckpointError, match="no/such/file: not written: "):
        save_model(random_fit(TINY, rng), tmp_path / "no" / "such" / "file")


def test_a_model_of_which_a_part_was_quantised_is_not_written(path, rng, random_fit):
    model = random_fit(TINY, rng)
    quantise(model.blocks, "fp8")
    message = "not written: the tensor blocks.0.cond_ff.fc1.bias is missing"
    with pytest.raises(CheckpointError, match=message):
        save_model(model, path)
    assert not path.exists()


def test_a_recipe_of_ones_own_is_loaded_by_itself_only(path, rng, random_fit):
    mine = replace(FP8, name="mine", kept=("*.write_ff",))
    save_model(quantise(random_fit(TINY, rng), mine), path)
    assert isinstance(load_model(path, recipe=mine).get_submodule(FF), FeedForward)
    with pytest.raises(CheckpointError, match="must be one of 'bf16', 'fp8', but the file has 'mi"):
        load_model(path)
    with pytest.raises(CheckpointError, match="its recipe is 'mine', asked for was 'fp8'"):
        load_model(path, recipe="fp8")
    with pytest.raises(CheckpointError, match=r"'mine' has changed .*: kept is \('\*.write_ff',\)"):
        load_model(path, recipe=replace(mine, kept=()))


def test_a_file_of_another_recipe_than_the_one_asked_for(saved):
    with pytest.raises(CheckpointError, match="its recipe is 'fp8', asked for was 'bf16'"):
        load_model(saved[1], recipe="bf16")
    with pytest.raises(CheckpointError, match="but 'fp4' was asked for"):
        load_model(saved[1], recipe="fp4")
    assert load_model(saved[1], recipe="fp8").recipe is FP8


def text_of(field, change):
    """A change of one of the header's JSON texts."""
    return lambda texts: {field: json.dumps(change(json.loads(texts[field])))}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (lambda _: {"format": None}, "its format is None, not 'snapvideo_core.FIT'"),
        (lambda _: {"version": "0"}, "version '0' is not '1'"),
        (lambda _: {"dtype": "BF8"}, "dtype 'BF8' is not one of F64"),
        (lambda _: {"recipe": None}, "its header cannot be read: 'recipe'"),
        (lambda _: {"config": "{"}, "its header cannot be read"),
        (text_of("config", lambda c: c | {"heads": 3}), "its header cannot be read: .*'heads'"),
        (text_of("config", lambda c: c | {"width": 31}), "its header cannot be read: tiny: width"),
        (
            text_of("config", lambda c: c | {"latent_dim": 64}),
            r"the tensor blocks.0.cond_ff.fc1_bias must be BF16 \(256,\), but is BF16 \(128,\)",
        ),
        (
            text_of("recipe", lambda r: r | {"hidden": "e4m3, a scale for 128"}),
            "recipe 'fp8' has changed since .*: hidden is 'e4m3, a scale for 128', not 'e4m3",
        ),
        (
            text_of("recipe", lambda r: r | {"layers": ["FeedForward", "LatentAttention"]}),
            r"recipe 'fp8' has changed .*: layers is \('FeedForward', 'LatentAttention'\), not ",
        ),
        (text_of("recipe", lambda r: r | {"name": "fp6"}), "recipe must be one of 'bf16', 'fp8'"),
        (text_of("recipe", lambda r: "fp8"), "its header cannot be read"),
        (lambda _: {"dtype": "F32"}, "the tensor .* must be F32 .*, but is BF16"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(texts, message, saved):
    _, path = saved
    rewrite(path, **texts(header(path)))
    with pytest.raises(CheckpointError, match=f"{path.name}: {message}"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, f"the tensor {FF}.fc1_scale is missing"),
        (lambda t: t.double(), f"the tensor {FF}.fc1_scale must be F32 .*, but is F64"),
        (lambda t: t.half(), f"the tensor {FF}.fc1_scale must be F32 .*, but is F16"),
        (lambda t: t.int(), f"the tensor {FF}.fc1_scale must be F32 .*, but is I32"),
        (lambda t: t[1:], rf"the tensor {FF}.fc1_scale must be F32 \(96,\), but is F32 \(95,\)"),
    ],
)
def test_a_tensor_that_is_not_the_models_is_refused(change, message, saved):
    _, path = saved
    name = f"{FF}.fc1_scale"
    rewrite(path, {name: change(load_file(path)[name])})
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_a_tensor_more_is_refused(saved):
    rewrite(saved[1], {"blocks.9.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"the tensor blocks.9.extra is not of such a model"):
        load_model(saved[1])


@pytest.mark.parametrize("length", [0, 4, 200, -1, -1000])
def test_a_file_that_is_cut_off_is_refused(length, saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="no safetensors file, or cut off"):
        load_model(path)


def test_a_foreign_file_and_none_are_refused(path):
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no safetensors file, or cut off"):
        load_model(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="its format is None"):
        load_model(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_model(path)


def test_without_safetensors_it_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'pip install "snapkernels\[checkpoints\]"'):
        load_model(saved[1])
    with pytest.raises(ImportError, match=r"snapkernels\[checkpoints\]"):
        save_model(FIT(TINY), saved[1])
