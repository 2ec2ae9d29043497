"""Records of the page in valid form, made up."""

import report
import torch

from snapkernels.testing import record

CEILINGS = {"copy_tb_s": 4.0, "bf16_tflop_s": 800.0, "fp8_tflop_s": 1600.0}

MODELS = {"500m": 2.0, "3.9b": 10.0}
PARTS = {"stem": (0.1, 4e-4), "read": (0.3, 0.1), "write FF": (0.5, 0.35)}  # ms and TFLOP, shares


def row(case, variant, batch, value, **more):
    return {
        "case": case,
        "variant": variant,
        "batch": batch,
        "unit": "ms/video",
        "better": "lower",
        "gate": "ok",
        "includes": "one denoiser evaluation, no guidance",
        "value": value,
        "p20": 0.95 * value,
        "p80": 1.05 * value,
        "floor": 0.6 * value,
        "pct_of_floor": 60.0,
        "tflop": 0.5 * value,
    } | more


def red(gate, case, variant, batch, **more):
    return as_red(row(case, variant, batch, 1.0, **more), gate)


def as_red(whole, gate):
    lost = (*record.MEASURED_FIELDS, *report.ROW_FIELDS["costs"], "peak_gib")
    return {key: one for key, one in whole.items() if key not in lost} | {"gate": gate}


def throughput_rows():
    for model, ms in MODELS.items():
        for batch in (16, 64):
            for variant, factor in {"ours-bf16": 1.0, "eager-bf16": 1.4, "ours-fp8": 0.6}.items():
                yield row(f"model/{model}/infer", variant, batch, ms * factor * (1 + 1 / batch))
        yield row(f"model/{model}/train", "ours-bf16", 16, 4 * ms)
        yield row(f"model/{model}/train", "eager-bf16", 16, 3 * ms)
        yield red("te is absent", f"model/{model}/infer", "te-fp8", 16, peer=True, absent=True)


def costs_rows():
    for model, ms in MODELS.items():
        for variant, factor in {"ours-bf16": 1.0, "ours-fp8": 0.6}.items():
            value = ms * factor
            parts = [
                {
                    "part": name,
                    "ops": {"linear": 2},
                    "ms": share * value,
                    "predicted_ms": 0.5 * share * value,
                    "tflop": tflop * ms,
                    "gb": value * share * 2,
                }
                for name, (share, tflop) in PARTS.items()
            ]
            yield row(f"model/{model}/infer", variant, 16, value) | {
                "explained_pct": 90.0,
                "parts": parts,
                "blocks": [{"block": 0, "ms": 0.9 * value, "predicted_ms": 0.4 * value}],
                "rest": {"between the parts": 0.1 * value},
            }


def scaling_rows():
    for axis in ("tokens", "batch", "latents"):
        for variant, factor in {"ours-bf16": 1.0, "eager-bf16": 1.5}.items():
            for size in (256, 512, 1024):
                more = {"unit": "ms", "axis": axis, "point": size}
                if variant == "eager-bf16" and size == 1024:
                    yield red("out of memory", "model/3.9b-up/infer", variant, 1, **more)
                else:
                    peak = {"peak_gib": factor * size / 100}
                    ms = factor * size / 10
                    yield row("model/3.9b-up/infer", variant, 1, ms, **more, **peak)


def make_records():
    rows = {
        "throughput": throughput_rows(),
        "costs": costs_rows(),
        "model_scaling": scaling_rows(),
    }
    load = {"sm_clock_mhz": [345.0, 1755.0], "power_w": [80.0, 690.0]}
    found = {}
    for name, some in rows.items():
        command = f"python bench/{name}.py"
        found[name] = record.new_record(command, torch.device("cpu"), load, CEILINGS, list(some))
        assert record.problems(found[name]) == []
    found["model_scaling"] |= {
        "exponents": {"infer tokens ours-bf16": 1.02},
        "memory_exponents": {"infer tokens ours-bf16": 0.77},
    }
    return found
