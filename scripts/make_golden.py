"""Makes golden vectors of whole steps by running the papers' official code, unmodified, on fixed inputs.

    python scripts/make_golden.py OUT --retrack CHECKOUT --siss CHECKOUT [--selection small|wide] [--weights]

CHECKOUT is a clone of the official repository at the commit that `tests/golden/data/README.md` names. Nothing
of it is here: it is imported, told its inputs, and asked for its numbers. OUT gets `NAME.npz` and
`manifest_accumulation.json`, with --weights also `NAME.final.safetensors` (1 MB each). The start weights and
the digits are read from `tests/golden/data`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
from golden_cases import Setting, selection
from golden_official import (
    DATA,
    INIT,
    MODEL,
    OPTIMIZER,
    Run,
    imported,
    norm,
    precision,
    retrack_run,
    siss_run,
)
from safetensors.torch import save_file
from torch import Tensor


def make(setting: Setting, steps: list[dict[str, Tensor]], modules, commit: str, threads: int):
    """Runs the official code in both precisions: arrays of the case's `.npz`, last float32 parameters."""
    of_retrack = setting.kind == "retrack_train_step"
    official = retrack_run if of_retrack else siss_run
    runs: dict[str, Run] = {}
    for label, dtype, count in (
        ("f32", torch.float32, threads), ("f64", torch.float64, threads), ("1thread", torch.float32, 1),
    ):  # fmt: skip
        torch.set_num_threads(count)
        with precision(dtype):
            runs[label] = official(setting, steps, modules, dtype)
    arrays = {
        f"in.step{s}.{key}": value.numpy() for s, step in enumerate(steps) for key, value in step.items()
    }
    updates = {label: run.update() for label, run in runs.items()}
    for label in ("f32", "f64"):
        run = runs[label]
        for key, values in run.series.items():
            arrays[f"out.{label}.{key}"] = np.array(values)
        arrays[f"tensor.delta_l2_{label}"] = norms(updates[label])
        arrays[f"tensor.grad0_l2_{label}"] = norms(run.first_gradient)
        if not of_retrack:
            arrays[f"out.{label}.delta_norm_final"] = np.array(norm(updates[label]))
    f32, f64, single = (updates[label] for label in ("f32", "f64", "1thread"))
    gradients = [runs[label].first_gradient for label in ("f32", "f64")]
    if of_retrack:
        branches = [key.removeprefix("images.") for key in steps[0] if key.startswith("images.")]
        order = [(s, branch) for s in range(len(steps)) for branch in branches]
        for (s, branch), output in zip(order, runs["f32"].outputs, strict=True):
            arrays[f"out.step{s}.model_outputs.{branch}"] = output.numpy()
        own = {
            "method": setting.method,
            "params": setting.params,
            "extra": setting.extra,
            "dataset_types": branches,
        }
    else:
        own = {
            "loss": setting.method, "loss_params": setting.params, "batch": setting.batch,
            "eta": setting.extra.get("eta"), "scaling_norm": setting.extra.get("scaling_norm"),
            "optimizer_steps": len(steps) // setting.accumulation, "forwards": len(runs["f32"].outputs),
        }  # fmt: skip
    arrays["tensor.delta_relL2_f32_f64"] = norms(differences(f32, f64)) / arrays["tensor.delta_l2_f64"]
    meta = {
        "kind": setting.kind, **own, "model": MODEL, "init": INIT, "seed": setting.seed,
        "gradient_accumulation_steps": setting.accumulation, "micro_steps": len(steps),
        "optimizer": {"name": "AdamW", **OPTIMIZER}, "clip_max_norm": 1.0, "lr_scheduler": "constant",
        "rel_l2_delta_f32_vs_f64": norm(differences(f32, f64)) / norm(f64),
        "rel_l2_delta_1thread_vs_2threads": norm(differences(single, f32)) / norm(f32),
        "rel_l2_grad0_f32_vs_f64": norm(differences(*gradients)) / norm(gradients[1]),
        "commit": commit, "versions": versions(),
    }  # fmt: skip
    names = [name for name, _ in runs["f32"].model.named_parameters()]
    arrays["meta"] = np.array(json.dumps(meta | {"param_names": names}))
    return arrays, dict(zip(names, runs["f32"].parameters(), strict=True))


def differences(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a.double() - b.double() for a, b in zip(left, right, strict=True)]


def norms(tensors: list[Tensor]) -> np.ndarray:
    return np.array([float(tensor.double().norm()) for tensor in tensors])


def versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "accelerate", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def commit_of(checkout: Path) -> str:
    """The commit of a clone, or what the file COMMIT beside an unpacked archive says."""
    if (checkout / "COMMIT").is_file():
        return (checkout / "COMMIT").read_text().strip()
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--retrack", type=Path, required=True, help="a checkout of github.com/sqt24/ReTrack")
    parser.add_argument("--siss", type=Path, required=True, help="a checkout of github.com/claserken/SISS")
    parser.add_argument("--selection", choices=("small", "wide"), default="small")
    parser.add_argument(
        "--weights", action="store_true", help="keep the parameters after the last step as well"
    )
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    official = {
        "retrack_train_step": (given.retrack, imported(given.retrack, "retrack.methods", "retrack.train")),
        "siss_train_loop": (given.siss, imported(given.siss, "losses.ddpm_deletion_loss", "delete_tshirt")),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    digits = np.load(DATA / "knn" / "digits_uint8.npz")["data"]
    manifest = {}
    for name, setting in selection(given.selection).items():
        checkout, modules = official[setting.kind]
        steps = setting.inputs(digits)
        arrays, final = make(setting, steps, modules, commit_of(checkout), given.threads)
        np.savez_compressed(given.out / f"{name}.npz", **arrays)
        if given.weights:
            save_file(final, given.out / f"{name}.final.safetensors")
        meta = json.loads(str(arrays["meta"]))
        manifest[f"public/{name}"] = {"kind": meta["kind"], "commit": meta["commit"]}
        spread = {key: f"{value:.2g}" for key, value in meta.items() if key.startswith("rel_l2")}
        print(name, (given.out / f"{name}.npz").stat().st_size, spread)
    (given.out / "manifest_accumulation.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
