"""The README's table: every method on the embedded model, several seeds, mean and deviation.

    python scripts/compare_methods.py --seeds 0 1 2 --num-samples 1024 --output
    bench/results/mnist_tshirt_small.json

A seed's numbers are added to the file as soon as they are there; seeds that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from fastunlearn import __version__
from fastunlearn.demo import forget_tshirt, load_model
from fastunlearn.demo import settings as demo_settings
from fastunlearn.demo.evaluation import Evaluator
from fastunlearn.recipes.mnist_tshirt import load_demo

COLUMNS = {  # name -> (title, decimals)
    "frequency": ("frequency, %", 2),
    "chains_250": ("chains from t = 250 that restore it, %", 1),
    "chains_500": ("from t = 500, %", 1),
    "nll": ("NLL of the T-shirt, bits/dim", 2),
    "fid": ("FID of the digits", 1),
    "is": ("IS of the digits", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = {
        "num_samples": arguments.num_samples,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
    }
    record = {
        "settings": settings,
        "methods": {name: repr(setting) for name, setting in demo_settings().items()},
        "version": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "runs": {},
    }
    if arguments.output.exists():
        earlier = json.loads(arguments.output.read_text())
        if earlier["settings"] != settings:
            raise SystemExit(
                f"{arguments.output}: expected a file of {settings}, got one of {earlier['settings']}"
            )
        record["runs"] = earlier["runs"]
    for seed in arguments.seeds:
        if str(seed) not in record["runs"]:
            record["runs"][str(seed)] = run(seed, **settings)
            arguments.output.write_text(json.dumps(record, indent=1))
    print(table(list(record["runs"].values())))


def run(seed: int, num_samples: int, steps: int, batch_size: int) -> dict[str, dict[str, float]]:
    """One seed: the pretrained model, and what every method makes of it."""
    forget, retain = load_demo()
    model, scheduler = load_model("cpu")
    evaluate = Evaluator(scheduler, forget, retain, num_samples, seed, show_progress=False)
    results = {"pretrained": numbers(evaluate(model, "before", {}))}
    for name, setting in demo_settings().items():
        model, scheduler = load_model("cpu")
        forget_tshirt(model, scheduler, setting, forget, retain, steps, batch_size, seed, show_progress=False)
        results[name] = numbers(evaluate(model, "after", {}))
        print(f"seed {seed} {name}: {results[name]}", flush=True)
    return results


def numbers(evaluation) -> dict[str, float]:
    chains = {
        f"chains_{result.timestep}": 100 * result.returned.share for result, _ in evaluation.reconstructions
    }
    scores = evaluation.scores
    return {
        "frequency": 100 * evaluation.frequency.share,
        **chains,
        "nll": evaluation.likelihood.mean,
        "fid": scores.fid,
        "is": scores.inception_score,
    }


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Markdown, mean and deviation over the runs."""
    lines = [
        "| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for name in runs[0]:
        cells = []
        for column, (_, decimals) in COLUMNS.items():
            values = [run[name][column] for run in runs]
            deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{decimals}f}{deviation}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
