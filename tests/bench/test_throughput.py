"""The throughput bench as a user runs it: figures, records, one line for what is wrong."""

import json
import re
import subprocess
import sys

import fit_subject
import pytest
import support
import throughput
import torch
from fit_subject import inference
from subject import CAPTURED, Variant
from support import CLIP
from video_files import quadrants, write_image
from workload import load_batch

from snapkernels import RECIPES, FeedForward, Fp8FeedForward, LatentAttention
from snapkernels.testing import record
from snapkernels.testing.timing import Timing
from snapvideo_core import FIT, read_clip
from snapvideo_core.config import TINY, TINY_UP
from snapvideo_core.flops import graph_tflop, least_tflop, quantised_tflop


def run(*arguments):
    command = [sys.executable, "bench/throughput.py", *arguments]
    return subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These tests hold on any machine: the GPU is hidden from them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_every_mode_gives_figures_and_a_record(tmp_path):
    target = tmp_path / "figures.json"
    done = run("--preset", "tiny", "tiny-up", "--batch", "1", "2", "--json", str(target))
    assert done.returncode == 0, done.stderr
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    cases = [(row["case"], row["batch"]) for row in written["rows"]]
    assert cases == [
        (f"model/{preset}/{mode}", batch)
        for preset in ("tiny", "tiny-up")
        for batch in (1, 2)
        for mode in ("infer", "train")
    ]
    for row in written["rows"]:
        assert row["gate"] == "ok" and row["variant"] == "ours-fp32"
        assert 0 < row["p20"] <= row["value"] <= row["p80"]
        assert row["pct_of_floor"] == pytest.approx(100 * row["floor"] / row["value"], abs=0.1)
        assert f"| {row['case']} " in done.stdout
    infer, train = written["rows"][0], written["rows"][1]
    ceiling = written["ceilings"]["fp32_tflop_s"]
    assert infer["floor"] == pytest.approx(least_tflop(TINY) / ceiling * 1e3, rel=0.05)
    assert train["tflop"] == pytest.approx(4 * graph_tflop(TINY), rel=1e-4)
    assert "CPU figures" in done.stdout
    assert "model/500m/infer" in done.stdout and "23.4" in done.stdout  # the paper's row
    assert "repetition 3 of 3" in done.stderr  # progress
    assert "GPU record" in done.stdout
    assert str(tmp_path) not in target.read_text()


def test_the_batch_is_the_clip():
    """Every pixel comes from the file, at the size each model asks for."""
    for config in (TINY, TINY_UP):
        data = load_batch(CLIP, config, 2, 12.5, torch.device("cpu"))
        size = (config.height, config.width)
        clip = read_clip(CLIP, frames=config.frames, size=size, framerate=12.5)
        assert torch.equal(data.video, clip.video.expand(2, -1, -1, -1, -1))
        assert data.cond.framerate.tolist() == [12.5, 12.5]
        assert data.cond.resolution.tolist() == [[360.0, 640.0]] * 2
        left = data.x_sigma - data.video / config.sigma_in
        spread = left.flatten(1).std(1)
        torch.testing.assert_close(spread, data.sigma, rtol=0.05, atol=0)
        assert torch.corrcoef(left.flatten(1))[0, 1].abs() < 0.1
    low = read_clip(CLIP, frames=4, size=TINY_UP.low_res, framerate=12.5).video
    similarity = torch.corrcoef(torch.stack([data.cond.low_res[0].flatten(), low.flatten()]))
    assert similarity[0, 1] > 0.7  # the rest is the augmentation's noise


def test_an_image_is_a_clip_of_infinite_framerate(tmp_path):
    path = write_image(tmp_path / "still.png", "png", "rgb24", quadrants())
    data = load_batch(path, TINY, 1, 24.0, torch.device("cpu"))
    assert data.cond.framerate.tolist() == [float("inf")]
    done = run("--preset", "tiny", "--mode", "infer", "--clip", str(path))
    assert done.returncode == 0, done.stderr


def test_inference_is_self_conditioned():
    """The timed evaluation has the latents of one before it."""
    data, seen = load_batch(CLIP, TINY, 1, 24.0, torch.device("cpu")), []
    model = FIT(TINY).eval()
    model.register_forward_hook(lambda _, arguments, result: seen.append((arguments[3], result[1])))
    inference(model, model, data)()
    (nothing, latents), (previous, _) = seen
    assert not nothing.any() and previous is latents


def test_every_case_reads_the_clip_at_the_framerate_asked_for(monkeypatch):
    read = []

    def record_it(clip, config, batch, framerate, device):
        read.append((str(clip), batch, framerate))
        return load_batch(clip, config, batch, framerate, device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit_subject, "load_batch", record_it)
    flags = ["--preset", "tiny", "--mode", "infer", "--batch", "2", "--framerate", "12.5"]
    assert throughput.main(flags) == 0
    clip = str(CLIP)
    assert read == [(clip, 1, 12.5), (clip, 2, 12.5)]  # for the gate, and to be timed


def test_flags_reach_the_run(tmp_path):
    target = tmp_path / "figures.json"
    flags = [
        "--preset",
        "tiny",
        "--dtype",
        "bf16",
        "--backend",
        "reference",
        "--mode",
        "infer",
        "--repeats",
        "5",
    ]
    done = run(*flags, "--framerate", "12.5", "--json", str(target))
    assert done.returncode == 0, done.stderr
    assert "repetition 5 of 5" in done.stderr
    written = json.loads(target.read_text())
    (row,) = written["rows"]
    assert (row["case"], row["variant"]) == ("model/tiny/infer", "reference-bf16")
    for flag in ("--dtype bf16", "--backend reference", "--repeats 5", "--framerate 12.5"):
        assert flag in written["command"]
    assert set(written["ceilings"]) == {"copy_tb_s", "bf16_tflop_s"}
    too_fast = run("--preset", "tiny", "--framerate", "60")
    assert too_fast.returncode == 2 and "fewer than the 60 asked for" in too_fast.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "4b"], "invalid choice: '4b'"),
        (["--clip", "missing.mp4"], "error: missing.mp4: "),
        (["--clip", "README.md"], "error: README.md: "),
        (["--batch", "0"], "must be a whole number above 0, got '0'"),
        (["--repeats", "two"], "must be a whole number above 0, got 'two'"),
        (["--framerate", "-1"], "must be a number above 0, got '-1'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--backend", "cudnn"], "invalid choice: 'cudnn'"),
        (["--recipe", "fp4"], "invalid choice: 'fp4'"),
        (["--recipe", "fp8", "--mode", "train"], "--mode train needs --recipe bf16: what is quan"),
        (["--json", "no/such/folder/figures.json"], "a folder that exists and can be written to"),
        (["--json", "bench"], "it must be a file in a folder that exists"),
        (["--resume"], "--resume needs --json: the record to go on with"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=["gpu", "python", "allocator", "cublas"],
)
def test_running_out_of_memory_is_one_line_and_the_rest_goes_on(failure, monkeypatch, capsys):
    whole = fit_subject.training_loss

    def loss(model, diffusion, video, cond, **options):
        if len(video) > 1:
            raise failure
        return whole(model, diffusion, video, cond, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit_subject, "training_loss", loss)
    assert throughput.main(["--preset", "tiny", "--batch", "2", "1"]) == 0
    out, err = capsys.readouterr()
    assert "model/tiny/train batch 2: no figure: out of memory" in err
    assert len(re.findall(r"no figure[^|]*\|", out)) == 1
    assert len(re.findall(r"\| model/tiny/(infer|train) .*\(.*-.*\)", out)) == 3


def test_gradients_of_a_case_that_ran_out_do_not_stay(monkeypatch, capsys):
    def loss(model, *_, **__):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        raise MemoryError

    def infer(network, model, data):
        assert all(parameter.grad is None for parameter in model.parameters())
        return lambda: None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit_subject, "training_loss", loss)
    monkeypatch.setattr(fit_subject, "inference", infer)
    throughput.main(["--preset", "tiny", "--batch", "2", "1"])
    assert capsys.readouterr().err.count("no figure: out of memory") == 2


def test_a_model_too_large_for_a_cpus_memory_is_refused_before_it_is_built(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 1e8 < support.available_bytes() < 1e14
    monkeypatch.setattr(fit_subject, "available_bytes", lambda: 100_000)
    monkeypatch.setattr(fit_subject, "build_model", lambda *_: pytest.fail("it was built"))
    assert throughput.main(["--preset", "tiny", "--mode", "infer"]) == 1
    assert "no figure: out of memory" in capsys.readouterr().err


def test_figures_are_a_videos_share_of_a_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: Timing(12.0, 10.0, 14.0))
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: {"fp32_tflop_s": 0.5})
    target = tmp_path / "figures.json"
    assert throughput.main(["--preset", "tiny", "--batch", "2", "--json", str(target)]) == 0
    infer, train = json.loads(target.read_text())["rows"]
    for row, forwards in ((infer, 1), (train, 4)):
        assert (row["value"], row["p20"], row["p80"], row["batch"]) == (6.0, 5.0, 7.0, 2)
        floor = forwards * least_tflop(TINY) / 0.5 * 1e3
        assert row["floor"] == pytest.approx(floor, rel=1e-4)
        assert row["pct_of_floor"] == pytest.approx(100 * floor / 6.0, abs=0.05)


def test_a_run_that_is_cut_off_leaves_what_it_measured(monkeypatch, tmp_path):
    whole = throughput.bench_variant

    def cut_off(name, *others):
        if name != "tiny":
            raise KeyboardInterrupt
        return whole(name, *others)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(throughput, "bench_variant", cut_off)
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: Timing(12.0, 10.0, 14.0))
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: {"fp32_tflop_s": 0.5})
    target = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        throughput.main(["--preset", "tiny", "tiny-up", "--json", str(target)])
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    assert written["command"].endswith("(so far)")
    assert {row["case"] for row in written["rows"]} == {"model/tiny/infer", "model/tiny/train"}


def test_no_speed_on_a_red_gate(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit_subject, "judged", lambda *_: ("wrong", {"rms_vs_fp64": 1.0}))
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: pytest.fail("it was timed"))
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: {"fp32_tflop_s": 1.0})
    assert throughput.main(["--preset", "tiny"]) == 1
    assert "no figure: wrong" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_a_red_gate(monkeypatch, capsys):
    whole = fit_subject.training_loss
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit_subject, "training_loss", lambda *a, **o: whole(*a, **o) * float("nan"))
    assert throughput.main(["--preset", "tiny", "--mode", "train"]) == 1
    assert "a gradient is missing or not finite" in capsys.readouterr().err


def test_training_alone_is_of_what_can_be_trained(rows):
    found = rows("--recipe", "fp8", "bf16", "--mode", "train")
    assert [(row["case"], row["variant"]) for row in found] == [("model/tiny/train", "ours-fp32")]


def test_recipes_and_backends_are_rows_of_one_record(rows, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(fit_subject, "compile_by_block", compiled.append)
    found = rows("--recipe", "bf16", "fp8", "--backend", "ours", "eager", "compile")
    assert [(row["case"], row["variant"]) for row in found] == [
        (f"model/tiny/{mode}", f"{backend}-{number}")
        for number, modes in (("fp32", ("infer", "train")), ("fp8", ("infer",)))
        for backend in ("ours", "eager", "compile")
        for mode in modes
    ]
    assert {row["gate"] for row in found} == {"ok"}
    assert [model.backend for model in compiled] == ["eager", "eager"]
    assert isinstance(compiled[1].self_conditioning.ff, Fp8FeedForward)
    told = capsys.readouterr()
    assert "tiny: ours-fp8 has no row of training: it is quantised, for inference" in told.err
    assert re.search(r"\| model/tiny/infer +\| ours-fp8 ", told.out)


def test_the_floor_of_fp8_is_each_product_at_its_own_rate(rows):
    (row,) = rows("--recipe", "fp8")
    quantised = quantised_tflop(TINY, RECIPES["fp8"])
    assert 0 < quantised < least_tflop(TINY)
    floor = 1e3 * (quantised / 1.0 + (least_tflop(TINY) - quantised) / 0.5)
    assert row["floor"] == pytest.approx(floor, rel=1e-4)


def test_an_fp8_model_is_held_to_plain_fp8_and_to_the_weights_it_was_made_of(rows, monkeypatch):
    (row,) = rows("--recipe", "fp8")
    error = row["error"]
    assert error["rms_eager"] == error["rms_vs_fp64"]  # a CPU runs the same calls
    assert 1e-2 < error["rms_vs_fp64"] < 0.1  # the weights' own rounding is in it
    monkeypatch.setattr(fit_subject, "plain_error", lambda *_: error["rms_vs_fp64"] / 1.05)
    (row,) = rows("--recipe", "fp8", code=1)
    assert row["gate"].startswith("relative rms error") and "value" not in row
    monkeypatch.setattr(fit_subject, "plain_error", lambda *_: float("inf"))
    monkeypatch.setattr(fit_subject, "QUANTISED_LIMIT", error["rms_vs_fp64"] / 2)
    (row,) = rows("--recipe", "fp8", code=1)
    assert "value" not in row


def test_a_captured_model_is_gated_and_timed_and_says_so(played, cpu_options):
    """With a graph that is played."""
    options = cpu_options(capture=True)
    found = throughput.bench_variant("tiny", Variant("ours"), [2], ("infer", "train"), options)
    infer, train = found
    assert played == [1, 2]  # for the gate, and to be timed
    assert infer["gate"] == train["gate"] == "ok"
    assert CAPTURED in infer["includes"] and CAPTURED not in train["includes"]


def test_a_quantised_model_has_no_layer_left_as_it_was(rows, monkeypatch):
    seen = []
    real = fit_subject.inference
    monkeypatch.setattr(fit_subject, "inference", lambda m, *a: seen.append(m) or real(m, *a))
    rows("--recipe", "fp8")
    assert not any(type(m) in (FeedForward, LatentAttention) for m in seen[0].modules())
