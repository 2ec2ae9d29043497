"""Which layers make the error of an fp8 model: one kind of them quantised at a time.

python bench/fp8_error.py                                  # what suits the machine
python bench/fp8_error.py --preset 3.9b --json error.json
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from gate import Inputs, expected_output, output
from support import CLIP, say, significant
from workload import build_model, load_batch

from snapkernels import RECIPES, Recipe, quantise
from snapkernels.recipes import layers_taken
from snapkernels.roofline import measure_ceilings
from snapkernels.testing.load import Load
from snapkernels.testing.numerics import relative_rms
from snapkernels.testing.record import new_record, record_path, write
from snapvideo_core import PRESETS, FITConfig, SnapDiffusion
from snapvideo_core.flops import graph_tflop

# {kind: the names of its layers}; every layer that the recipe quantises is of one kind. It keeps
# first_cond_read, which is here to say what that is for.
KINDS = {
    "self_conditioning_ff": "self_conditioning.ff",
    "first_cond_read": "blocks.0.cond_read",
    "cond_read": "blocks.[1-9]*.cond_read",
    "cond_ff": "blocks.*.cond_ff",
    "read": "blocks.*.read",
    "read_ff": "blocks.*.read_ff",
    "latent_attention": "blocks.*.global_layers.*.0",
    "global_ff": "blocks.*.global_layers.*.1",
    "write": "blocks.*.write",
    "write_ff": "blocks.*.write_ff",
}
FP8 = RECIPES["fp8"]
RECIPES_OF = {
    "none": RECIPES["bf16"],
    **{
        kind: replace(FP8, kept=tuple(name for other, name in KINDS.items() if other != kind))
        for kind in KINDS
    },
    "all": FP8,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 0, or 1 when an error was not finite."""
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = args.preset or ("3.9b" if device.type == "cuda" else "mini")
    say("measuring the ceilings of this machine")
    ceilings, load = measure_ceilings(device), Load(device)
    errors = {}
    for kind, error in measured(PRESETS[preset], device):
        errors[kind] = error
        say(f"{preset}: {kind} quantised, relative rms error {error:.3e}")
    rows = rows_of(PRESETS[preset], errors)
    for row in rows:
        share = f", {row['share']:.1%} of what fp8 adds" if "share" in row else ""
        print(f"{row['case']}: {row['error']['rms_vs_fp64']:.3e}{share}")
    if args.json:
        command = f"python bench/fp8_error.py --preset {preset}"
        write(new_record(command, device, load.fields(), ceilings, rows), args.json)
    return int(any(row["gate"] != "ok" for row in rows))


def measured(config: FITConfig, device: torch.device) -> Iterator[tuple[str, float]]:
    """The error of F of a bf16 model with each kind of layers quantised, for each it has.

    Against the float64 equations with the weights before they were quantised, as in the gate.
    """
    data = load_batch(CLIP, config, 1, 24.0, device)
    diffusion = SnapDiffusion(sigma_in=config.sigma_in)
    x = diffusion.network_input(data.x_sigma, data.sigma)
    inputs = expected = None
    for kind, recipe in RECIPES_OF.items():
        model = build_model(config, device, torch.bfloat16, None).eval()
        if recipe.layers and not layers_taken(model, recipe):
            continue  # a read or write that is absorbed
        if inputs is None or expected is None:
            with torch.no_grad():
                _, previous = model(x, data.sigma, data.cond)
            inputs = Inputs(x, data.sigma, data.cond, previous)
            expected = expected_output(model, inputs)
        quantise(model, recipe)
        yield kind, relative_rms(output(model, inputs), expected)
        del model  # before the next is built


def rows_of(config: FITConfig, errors: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of a record; the share is of the squared error that quantising all adds."""
    added = {kind: error**2 - errors["none"] ** 2 for kind, error in errors.items()}
    rows = []
    for kind, error in errors.items():
        recipe: Recipe = RECIPES_OF[kind]
        row: dict[str, Any] = {
            "case": f"model/{config.name}/fp8_error/{kind}",
            "variant": f"ours-{recipe.name}",
            "batch": 1,
            "unit": "relative rms",
            "better": "lower",
            "gate": "ok" if error < float("inf") else "the output is not finite",
            "error": {"rms_vs_fp64": error},
            "includes": "F of one evaluation against the float64 equations; one seed of weights",
        }
        if row["gate"] == "ok":
            value = significant(error)
            # One draw, and an error has no floor that is known.
            row |= {"value": value, "p20": value, "p80": value, "floor": 0.0, "pct_of_floor": 0.0}
            row["tflop"] = significant(graph_tflop(config))
            if kind not in ("none", "all") and added["all"] > 0:
                row["share"] = significant(added[kind] / added["all"])
        rows.append(row)
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="default: 3.9b on a GPU, else mini")
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
