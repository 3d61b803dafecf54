"""One process of `scripts/compare_bits.py`: runs cases against the package that PYTHONPATH names."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastunlearn

from . import all_cases
from .api import public_api
from .parts import check_origin
from .registry import Case, Place, hashed


def outcome(case: Case, place: Place) -> dict[str, Any]:
    try:
        return {"tensors": hashed(case.run(place))}
    except Exception as error:
        message = str(error).replace(str(place.scratch), "SCRATCH").replace(str(place.handed), "HANDED")
        return {"error": f"{type(error).__name__}: {message}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--titles", type=Path, required=True, help="JSON: the cases to run")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--handed", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()

    package = Path(fastunlearn.__file__).resolve().parent
    if package.parent != options.tree.resolve():
        raise SystemExit(f"fastunlearn: expected it from {options.tree}, got it from {package}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    titles = set(json.loads(options.titles.read_text()))
    place = Place(options.scratch, options.handed)
    with ExitStack() as stack:
        if options.mode == "rehearsal":
            from fastunlearn.testing.accelerator import rehearsal

            stack.enter_context(rehearsal())
        if options.mode == "pair":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group(
                "gloo", init_method=f"file://{options.scratch}/store", rank=options.rank, world_size=2
            )
            stack.callback(dist.destroy_process_group)
        cases = {
            case.title: outcome(case, place)
            for case in all_cases()
            if case.mode == options.mode and case.title in titles
        }
    api = public_api() if options.mode == "plain" else {}
    check_origin(options.tree)
    options.output.write_text(json.dumps({"cases": cases, "api": api}))


if __name__ == "__main__":
    main()
