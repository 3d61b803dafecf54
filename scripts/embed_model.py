"""Puts a pretrained pipeline into the package: bfloat16 weights, and its training record beside them.

python scripts/embed_model.py runs/mnist-tshirt-small fastunlearn/assets/mnist-tshirt-small
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fastunlearn.models import load_checkpoint, save_checkpoint

# steps between the entries of the loss curve that are kept; each is a mean over the steps in between
LOG_EVERY = 250


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="what `fastunlearn pretrain` wrote")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    model, scheduler = load_checkpoint(arguments.source, dtype=torch.bfloat16)
    record = json.loads((arguments.source / "pretraining.json").read_text())
    record["log"] = thin(record["log"])
    # not the path on the machine that it was trained on
    model.register_to_config(_name_or_path="mnist-tshirt-small")
    save_checkpoint(arguments.target, model, scheduler)
    (arguments.target / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    for file in arguments.target.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for the owner alone; this is to be shipped
            print(f"{file.relative_to(arguments.target)}  {file.stat().st_size:,} bytes")


def thin(log: list[dict]) -> list[dict]:
    """One entry every `LOG_EVERY` steps, with the mean loss since the one before."""
    kept, since = [], []
    for entry in log:
        since.append(entry["loss"])
        if entry["step"] % LOG_EVERY == 0 or entry is log[-1]:
            kept.append({**entry, "loss": sum(since) / len(since)})
            since = []
    return kept


if __name__ == "__main__":
    main()
