"""What windows of time, bands of frequency, SISS' mixture and ReTrack's neighbours do to the embedded model.

    python scripts/ablations.py --output bench/results/selection_ablations.json
    python scripts/ablations.py --output ... --only windows bands   # some groups
    python scripts/ablations.py --output ... --table                # the tables of what is there

Every run is written as soon as it has ended, and is not repeated: the command goes on where it was stopped.
The tables stand in docs/selection.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastunlearn import LowPass, NoiseSchedule, Unlearner, __version__, functional, nearest_neighbors
from fastunlearn.demo import load_model
from fastunlearn.demo.evaluation import INJECTION_TIMESTEPS, NLL_TOLERANCE, REAL_DIGITS
from fastunlearn.host import finite
from fastunlearn.host.atomic import atomic_file
from fastunlearn.host.finite import NotFiniteError
from fastunlearn.host.store import ImageStore
from fastunlearn.methods import SISS, Method, ReTrack
from fastunlearn.metrics.classifier import load_mnist_classifier
from fastunlearn.metrics.distance import distances
from fastunlearn.metrics.inception import inception_scores
from fastunlearn.metrics.nll import bits_per_dim
from fastunlearn.metrics.reconstruction import reconstruct
from fastunlearn.models.sampling import sample
from fastunlearn.objective.time import Density, Stratified, TimeWindow, Uniform
from fastunlearn.recipes.mnist_tshirt import FREQUENCY_THRESHOLD, load_demo

LR = 1.5e-4  # of AdamW, falling to 0 along a cosine: the demo's


@dataclass(frozen=True)
class Settings:
    """What every run of a file has in common."""

    steps: int = 40
    batch_size: int = 32
    chains: int = 32  # from each injection time
    chain_steps: int = 20  # of the sampler over all timesteps; a chain takes those below its start
    num_samples: int = 256
    sample_steps: int = 10
    retain_rows: int = 512  # on which the retain loss is measured
    weight_draws: int = 32  # noises at each timestep at which weights are compared


@dataclass(frozen=True)
class Arm:
    """One way to unlearn; without a method, the model as it was trained."""

    method: Method | None = None
    time_window: Density | None = None
    lowpass: LowPass | None = None
    retain_density: Density | None = None

    def selections(self) -> dict:
        """The arguments of `Unlearner` for what it selects."""
        names = "time_window", "lowpass", "retain_density"
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Group:
    """A table: its arms, and what the paper has for each."""

    title: str
    seeds: int
    arms: tuple[str, ...]
    paper: str = ""  # the title of the paper's column
    papers: dict[str, str] | None = None  # the paper's numbers, of the arms that it has


# SISS is the paper's own base. The forget gradient is set to the norm of the retain gradient of this network
# (30 to 60), not to a tenth of it as in runs of 300 steps: in 40 steps that leaves the T-shirt where it was,
# and there is nothing to compare.
ASCENT = SISS(lambd=0.5, scaling_norm=30.0)
REDIRECT = {"k": 10, "lambd": 0.05}  # the demo's

WINDOWS = {
    "early": TimeWindow(0, 250),
    "middle": TimeWindow.middle(),
    "late": TimeWindow.late(),
    "full": None,
}
LAST = TimeWindow.last()
CUTOFFS = {"radius .15": LowPass(0.15), "radius .3": LowPass(0.3), "radius .6": LowPass(0.6)}
# The paper's own setting is a low band in the middle window.
BANDS = {
    "low": LowPass(0.3),
    "mid": LowPass(0.6, band="mid", inner=0.3),
    "high": LowPass(0.6, band="high"),
}
# Around one mean radius.
SCHEDULES = {
    "fixed": LowPass(0.3),
    "linear increase": LowPass(schedule="linear_increase", start=0.1, stop=0.5),
    "linear decay": LowPass(schedule="linear_decay", start=0.5, stop=0.1),
    "step increase": LowPass(schedule="step_increase", start=0.1, stop=0.5),
    "step decay": LowPass(schedule="step_decay", start=0.5, stop=0.1),
}

# One run may stand in several tables: arms that are equal have one name.
ARMS = {
    "pretrained": Arm(),
    **{f"{window}, all frequencies": Arm(ASCENT, density) for window, density in WINDOWS.items()},
    **{
        f"{window}, {cutoff}": Arm(ASCENT, density, band)
        for window, density in WINDOWS.items()
        for cutoff, band in CUTOFFS.items()
    },
    **{f"middle, {name} band": Arm(ASCENT, WINDOWS["middle"], BANDS[name]) for name in ("mid", "high")},
    **{
        f"middle, {name}": Arm(ASCENT, WINDOWS["middle"], band)
        for name, band in SCHEDULES.items()
        if name != "fixed"
    },
    **{f"SISS, lambda {lambd:g}": Arm(SISS(lambd, ASCENT.scaling_norm)) for lambd in (0, 0.25, 0.75, 1)},
    **{f"ReTrack, k = {k}": Arm(ReTrack(**REDIRECT | {"k": k})) for k in (1, 10, 100)},
    "ReTrack, without regulariser": Arm(ReTrack(**REDIRECT | {"lambd": 1.0})),
    "middle, as weight": Arm(ASCENT, TimeWindow.middle(as_weight=True)),
    "middle, stratified": Arm(ASCENT, Stratified(TimeWindow.middle())),
    "full, stratified": Arm(ASCENT, Stratified(Uniform())),
    "middle, box of radius .3": Arm(ASCENT, WINDOWS["middle"], LowPass(0.3, kind="box")),
    "ReTrack, middle window": Arm(ReTrack(**REDIRECT), WINDOWS["middle"]),
    "ReTrack, radius .3": Arm(ReTrack(**REDIRECT), lowpass=LowPass(0.3)),
    # What SISS' released code draws for faces and for Stable Diffusion, in both branches.
    "t = 999 alone": Arm(ASCENT, LAST, retain_density=LAST),
}

# The most valuable first.
GROUPS = {
    "pretrained": Group("The model as it was trained", 3, ("pretrained",)),
    "siss": Group(
        "SISS: the share of forget images in the mixture",
        3,
        (
            "SISS, lambda 0",
            "SISS, lambda 0.25",
            "full, all frequencies",
            "SISS, lambda 0.75",
            "SISS, lambda 1",
        ),
        "SISS, table 2: NLL / IS / frequency, %",
        {
            "SISS, lambda 0": "1.04 / 9.4 / .003",
            "full, all frequencies": "8.09 / 9.2 / 0",
            "SISS, lambda 1": "9.30 / 1.2 (100 steps)",
        },
    ),
    "retrack": Group(
        "ReTrack: the number of neighbours, and no regulariser",
        3,
        ("ReTrack, k = 1", "ReTrack, k = 10", "ReTrack, k = 100", "ReTrack, without regulariser"),
        "ReTrack, tables 1, 4, 5: NLL / FID / IS",
        {
            "ReTrack, k = 1": "8.29 / 2.22",
            "ReTrack, k = 10": "8.28 / 2.09 / 9.48",
            "ReTrack, k = 100": "8.28 / 2.04",
            "ReTrack, without regulariser": "9.74 / 14.22 / 9.40",
        },
    ),
    "windows": Group(
        "Windows of time, all frequencies",
        3,
        tuple(f"{window}, all frequencies" for window in WINDOWS),
        "table 5 (faces): distortion within the window over that of a full run",
        {
            "early, all frequencies": "1.2515",
            "middle, all frequencies": "1.4950",
            "late, all frequencies": "1.3095",
        },
    ),
    "bands": Group(
        "Bands, in the middle window",
        3,
        ("middle, all frequencies", "middle, radius .3", "middle, mid band", "middle, high band"),
        "table 11 (faces): SSCD / aesthetic from t = 250; from the larger t",
        {
            "middle, radius .3": ".331 / 5.553; .264 / 5.904",
            "middle, mid band": ".364 / 4.374; .329 / 5.043",
            "middle, high band": ".379 / 4.143; .227 / 4.670",
        },
    ),
    "schedules": Group(
        "Schedules of the radius, in the middle window",
        3,
        ("middle, radius .3", *(f"middle, {name}" for name in SCHEDULES if name != "fixed")),
        "table 12 (faces, t = 250): SSCD / SSCDn / aesthetic",
        {
            "middle, radius .3": ".345 / .349 / 5.520",
            "middle, linear increase": ".323 / .322 / 5.709",
            "middle, linear decay": ".429 / .422 / 5.296",
            "middle, step increase": ".328 / .331 / 5.631",
            "middle, step decay": ".431 / .419 / 5.186",
        },
    ),
    "cutoffs": Group(
        "Windows and low-pass cutoffs",
        2,
        tuple(f"{window}, {cutoff}" for window in WINDOWS for cutoff in CUTOFFS),
    ),
    "variants": Group(
        "Other ways to draw, and another mask",
        2,
        (
            "middle, all frequencies",
            "middle, as weight",
            "middle, stratified",
            "full, all frequencies",
            "full, stratified",
            "t = 999 alone",
            "middle, radius .3",
            "middle, box of radius .3",
        ),
    ),
    "selected": Group(
        "ReTrack with a window and with a band, which no paper has",
        2,
        ("ReTrack, k = 10", "ReTrack, middle window", "ReTrack, radius .3"),
    ),
}
WEIGHTS = "weights"  # the comparison of ReTrack's weights: no runs

COLUMNS = {  # name -> (title, decimals)
    "chains_250": ("back from t = 250, %", 0),
    "distance_250": ("distance", 2),
    "chains_500": ("from t = 500, %", 0),
    "distance_500": ("distance", 2),
    "nll": ("NLL", 2),
    "retain_loss": ("retain loss", 2),
    "fid": ("FID", 1),
    "is": ("IS", 2),
    "frequency": ("frequency, %", 2),
}

WEIGHT_NEIGHBORS = (10, 100, 1000)
WEIGHT_TIMESTEPS = (0, 100, 250, 400, 500, 600, 750, 900, 999)
TIMED_ROWS, TIMED_RUNS = 32, 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    groups = [*GROUPS, WEIGHTS]
    parser.add_argument(
        "--only", nargs="+", choices=groups, default=groups, metavar="GROUP", help=str(groups)
    )
    parser.add_argument("--table", action="store_true", help="print the tables, and run nothing")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})

    if given.table:
        record = json.loads(given.output.read_text())
    else:
        record = open_record(given.output, settings)
        run_all(record, given.output, settings, given.only)
    print("\n\n".join(tables(record, given.only).values()))


# --- the file -----------------------------------------------------------------------------------------------


def open_record(path: Path, settings: Settings) -> dict:
    """What `path` holds, or a new record of `settings`.

    Raises:
        SystemExit: the file is one of other settings, or an arm of that name was another.
    """
    described = {
        **asdict(settings),
        "lr": LR,
    }
    record = {
        "settings": described,
        "version": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "arms": {name: told(arm) for name, arm in ARMS.items()},
        "runs": {},
    }
    if not path.exists():
        return record
    earlier = json.loads(path.read_text())
    if earlier["settings"] != described:
        raise SystemExit(f"{path}: expected a file of {described}, got one of {earlier['settings']}")
    for name in earlier["runs"]:
        expected, got = record["arms"].get(name), earlier["arms"].get(name)
        if got != expected:
            raise SystemExit(f"{path}: expected runs of {name} with {expected}, got runs with {got}")
    return {**record, **{name: earlier[name] for name in ("runs", WEIGHTS) if name in earlier}}


def told(value: object) -> str:
    """`repr` without what has its default: a hyperparameter that comes later changes no arm of a file."""
    if not is_dataclass(value):
        return repr(value)
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    changed = {each.name: values[each.name] for each in fields(value) if values[each.name] != each.default}
    return f"{type(value).__name__}({', '.join(f'{name}={told(each)}' for name, each in changed.items())})"


def write(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


# --- the runs -----------------------------------------------------------------------------------------------


def run_all(record: dict, path: Path, settings: Settings, only: list[str]) -> None:
    """Everything of the groups `only` that `record` does not hold yet, written run by run."""
    forget, retain = load_demo()
    if WEIGHTS in only and WEIGHTS not in record:
        schedule = NoiseSchedule.from_diffusers(load_model("cpu")[1])
        record[WEIGHTS] = compare_weights(schedule, forget, retain, settings.weight_draws)
        write(record, path)
    for arm, seed in ordered([group for name, group in GROUPS.items() if name in only]):
        done = record["runs"].setdefault(arm, {})
        if str(seed) in done:
            continue
        done[str(seed)] = run(ARMS[arm], seed, settings, forget, retain)
        write(record, path)
        print(f"{time.strftime('%H:%M:%S')} {arm}, seed {seed}: {done[str(seed)]}", flush=True)


def ordered(groups: list[Group]) -> list[tuple[str, int]]:
    """Arms and seeds: all arms of a seed before the next, so that what is there compares like with like."""
    most = max((group.seeds for group in groups), default=0)
    return [
        (arm, seed) for seed in range(most) for group in groups if seed < group.seeds for arm in group.arms
    ]


def run(arm: Arm, seed: int, settings: Settings, forget: ImageStore, retain: ImageStore) -> dict:
    """Unlearns with one seed, and measures: the numbers of COLUMNS, or why there are none (`failed`)."""
    started = time.process_time()
    model, scheduler = load_model("cpu")
    skipped = 0
    if arm.method is not None:
        skipped = unlearn(model, scheduler, arm, seed, settings, forget, retain)
    trained = time.process_time()
    try:
        measured = measure(model, scheduler, seed, settings, forget, retain)
    except NotFiniteError as error:
        measured = {"failed": str(error)}
    # Of the processor: they say what a run costs on one core, whoever else is at work there.
    seconds = {"unlearn": round(trained - started, 1), "measure": round(time.process_time() - trained, 1)}
    return {**measured, "skipped_steps": skipped, "cpu_seconds": seconds}


def unlearn(
    model: torch.nn.Module,
    scheduler,
    arm: Arm,
    seed: int,
    settings: Settings,
    forget: ImageStore,
    retain: ImageStore,
) -> int:
    """Takes the steps on `model` in place; how many of them were skipped."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
    )
    unlearner = Unlearner(
        model,
        optimizer,
        NoiseSchedule.from_diffusers(scheduler),
        arm.method,
        forget=forget,
        retain=retain,
        batch_size=settings.batch_size,
        total_steps=settings.steps,
        seed=seed,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps),
        **arm.selections(),
    )
    model.train()
    for _ in range(settings.steps):
        unlearner.step()
    model.eval()
    return int(unlearner.skipped_steps)


def measure(
    model: torch.nn.Module,
    scheduler,
    seed: int,
    settings: Settings,
    forget: ImageStore,
    retain: ImageStore,
) -> dict[str, float]:
    schedule = NoiseSchedule.from_diffusers(scheduler)
    image = forget.rows(torch.tensor([0]))
    common = {"seed": seed, "show_progress": False}
    found = {}
    for t in INJECTION_TIMESTEPS:
        counts = {"chains": settings.chains, "num_inference_steps": settings.chain_steps}
        result, _ = reconstruct(model, scheduler, image, t, threshold=FREQUENCY_THRESHOLD, **counts, **common)
        found[f"chains_{t}"] = 100 * result.returned.share
        found[f"distance_{t}"] = result.mean_distance
    likelihood = bits_per_dim(model, schedule, image, seed=seed, rtol=NLL_TOLERANCE, atol=NLL_TOLERANCE)
    found["nll"] = likelihood.mean
    found["retain_loss"] = retain_loss(model, schedule, retain, settings)

    # The quality of the digits: without the T-shirts, as in the papers.
    samples = sample(
        model,
        scheduler,
        settings.num_samples,
        shape=forget.shape,
        num_inference_steps=settings.sample_steps,
        **common,
    )
    hits = distances(samples, image) < FREQUENCY_THRESHOLD
    real = retain.rows(evenly(REAL_DIGITS, len(retain)))
    scores = inception_scores(samples[~hits], real, load_mnist_classifier())
    found["fid"], found["is"] = scores.fid, scores.inception_score
    found["frequency"] = 100 * hits.double().mean().item()
    return found


@torch.no_grad()
def retain_loss(
    model: torch.nn.Module, schedule: NoiseSchedule, retain: ImageStore, settings: Settings
) -> float:
    """The denoising loss, summed over pixels: of rows, timesteps and noises that all runs share."""
    rows = evenly(settings.retain_rows, len(retain))
    count = len(rows)
    # Timesteps are spread evenly over all, and in no order, since the rows have one.
    timesteps = (torch.arange(count) * len(schedule) // count)[torch.randperm(count, generator=fixed())]
    noise = torch.randn(count, *retain.shape, generator=fixed())
    losses = []
    for part in torch.arange(count).split(256):
        x_t, target = functional.noised(retain.rows(rows[part]), noise[part], timesteps[part], schedule)
        losses.append(functional.denoising_loss(model(x_t, timesteps[part]).sample, target))
    losses = finite.rows("retain losses", torch.cat(losses)[:, None])
    return losses.mean().item()


def evenly(count: int, total: int) -> Tensor:
    """At most `count` rows of `total`, at equal distances."""
    return torch.linspace(0, total - 1, min(count, total)).long()


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- ReTrack's weights, of k neighbours and of all ----------------------------------------------------------


def compare_weights(schedule: NoiseSchedule, forget: ImageStore, retain: ImageStore, draws: int) -> dict:
    """The weights over the k nearest images to keep, beside those over all of them.

    Returns:
        `timesteps`, and for each k: `variation` (the total variation `sum |p - q| / 2` of the weights) and
        `target` (the distance of the targets over the norm of the full one), means over the noises at each
        timestep; `seconds` of the targets of a batch with uniform timesteps, for each k and for all rows.
    """
    index, sqdist = nearest_neighbors(forget, retain, len(retain))
    sqdist = sqdist * (2 / 255) ** 2

    def redirected(k: int, timesteps: Tensor, noise: Tensor):
        rows = torch.zeros(len(noise), dtype=torch.long)
        return functional.redirect(
            forget.lazy(rows),
            retain.lazy(index[:, :k].expand(len(noise), -1)),
            noise,
            timesteps,
            schedule,
            sqdist=sqdist[:, :k].expand(len(noise), -1),
        )

    counts = [k for k in WEIGHT_NEIGHBORS if k < len(retain)]
    found = {str(k): {"variation": [], "target": []} for k in counts}
    noise = torch.randn(draws, *forget.shape, generator=fixed())
    for t in WEIGHT_TIMESTEPS:
        timesteps = torch.full((len(noise),), t)
        full = redirected(len(retain), timesteps, noise)
        for k in counts:
            truncated = redirected(k, timesteps, noise)
            variation = total_variation(full.weights.double(), truncated.weights.double())
            apart = (truncated.target - full.target).flatten(1).norm(dim=1)
            relative = apart / full.target.flatten(1).norm(dim=1)
            found[str(k)]["variation"].append(variation.mean().item())
            found[str(k)]["target"].append(relative.mean().item())

    seconds = {}
    timesteps = torch.randint(len(schedule), (TIMED_ROWS,), generator=fixed())
    noise = torch.randn(TIMED_ROWS, *forget.shape, generator=fixed())
    for k in (*counts, len(retain)):
        times = []
        for _ in range(TIMED_RUNS):
            started = time.perf_counter()
            redirected(k, timesteps, noise)
            times.append(time.perf_counter() - started)
        seconds[str(k)] = min(times)
    return {
        "timesteps": list(WEIGHT_TIMESTEPS),
        "neighbors": found,
        "images": len(retain),
        "seconds": seconds,
    }


def total_variation(full: Tensor, truncated: Tensor) -> Tensor:
    """`sum_j |p_j - q_j| / 2`, `[B]`, of p `[B, N]` and q `[B, k]`, which is 0 after its k."""
    k = truncated.shape[1]
    within = (full[:, :k] - truncated).abs().sum(1)
    return (within + full[:, k:].sum(1)) / 2


# --- the tables ---------------------------------------------------------------------------------------------


def tables(record: dict, only: list[str]) -> dict[str, str]:
    """Markdown of each group that has a run."""
    found = {name: table(GROUPS[name], record["runs"]) for name in only if name in GROUPS}
    if WEIGHTS in only and WEIGHTS in record:
        found[WEIGHTS] = weights_table(record[WEIGHTS])
    return {name: text for name, text in found.items() if text}


def table(group: Group, runs: dict[str, dict]) -> str:
    """Mean and deviation of each arm, over the seeds that all arms with runs have; nothing without any."""
    there = {arm: runs[arm] for arm in group.arms if runs.get(arm)}
    # One seed's numbers differ from another's more than one arm's do: only equal seeds compare.
    seeds = [str(seed) for seed in range(group.seeds) if all(str(seed) in done for done in there.values())]
    if not there or not seeds:
        return ""
    heads = ["", *(title for title, _ in COLUMNS.values())]
    if group.paper:
        heads.append(group.paper)
    rows = []
    for arm, done in there.items():
        measured = [done[seed] for seed in seeds if "failed" not in done[seed]]
        failed = len(seeds) - len(measured)
        name = f"{arm} ({failed} of {len(seeds)} not finite)" if failed else arm
        cells = [name, *(cell(column, measured) for column in COLUMNS)]
        if group.paper:
            cells.append(group.papers.get(arm, ""))
        rows.append(cells)
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"**{group.title}** ({count})\n\n{markdown(heads, rows)}"


def cell(column: str, measured: list[dict]) -> str:
    values = [numbers[column] for numbers in measured]
    if not values:
        return ""
    decimals = COLUMNS[column][1]
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{deviation}"


def weights_table(found: dict) -> str:
    heads = ["timestep", *map(str, found["timesteps"]), "seconds a batch"]
    rows = []
    for k, numbers in found["neighbors"].items():
        seconds = f"{found['seconds'][k]:.4f}"
        rows.append([f"k = {k}: total variation", *(f"{x:.3f}" for x in numbers["variation"]), seconds])
        rows.append([f"k = {k}: target off by", *(f"{x:.3f}" for x in numbers["target"]), ""])
    every = found["images"]
    rows.append([f"all {every}", *("0" for _ in found["timesteps"]), f"{found['seconds'][str(every)]:.4f}"])
    return f"**ReTrack's weights over k neighbours, against all**\n\n{markdown(heads, rows)}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
