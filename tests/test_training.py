"""The loop around `Unlearner.step`: metrics, trackers, checkpoints, signals, skipped steps, the run record,
and `purge`.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from locks import at_one_instant, held_elsewhere
from torch import nn

from fastunlearn.host.folder_lock import FolderLocked, locked
from fastunlearn.host.store import ImageStore
from fastunlearn.methods import NegGrad, Vanilla
from fastunlearn.neighbors.nearest import nearest_neighbors
from fastunlearn.runs import checkpoint, run_record
from fastunlearn.runs.training import RunInterrupted, TooManySkippedSteps, WeightsNotFinite, purge, unlearn
from fastunlearn.step.take import StepOutput

STORE = ImageStore(torch.arange(2 * 16, dtype=torch.uint8).view(2, 1, 4, 4))


class FakeUnlearner:
    """The surface of `Unlearner` that the loop uses, with a step that costs nothing.

    `bad_steps` are reported as skipped.
    """

    def __init__(self, bad_steps=(), on_step=None, method=None, seed=0):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.lr_scheduler, self.ema, self.method, self.batch_size = None, None, method or Vanilla(), 4
        self.forget, self.retain = None, STORE
        self.process_group, self.num_processes = None, 1
        self.lr_of_step = 0.1
        self.step_index, self.skipped_steps, self.seed = 0, torch.zeros((), dtype=torch.int64), seed
        self.bad_steps, self.on_step = set(bad_steps), on_step

    def step(self) -> StepOutput:
        self.step_index += 1
        skipped = torch.tensor(self.step_index in self.bad_steps)
        self.skipped_steps += skipped
        if not skipped:
            with torch.no_grad():
                self.model.weight += torch.randn(
                    2, 3, generator=torch.Generator().manual_seed(self.step_index)
                )
        if self.on_step is not None:
            self.on_step(self.step_index)
        loss = torch.tensor(float("nan") if skipped else float(self.step_index))
        return StepOutput(loss, None, loss, torch.tensor(2.0), None, None, skipped)

    def state_dict(self) -> dict:
        return {"seed": self.seed, "step_index": self.step_index, "skipped_steps": int(self.skipped_steps)}

    def load_state_dict(self, state: dict) -> None:
        self.step_index = state["step_index"]
        self.skipped_steps.fill_(state["skipped_steps"])


def run(unlearner, output_dir: Path, num_steps: int = 10, **options):
    return unlearn(
        unlearner,
        num_steps=num_steps,
        output_dir=output_dir,
        **{"show_progress": False, "checkpointing_steps": 3} | options,
    )


def stopped(unlearner: FakeUnlearner, output_dir: Path, step: int, **options) -> None:
    """A run that a signal stops after `step`."""
    work = unlearner.on_step or (lambda step: None)
    unlearner.on_step = lambda at: (work(at), at == step and signal.raise_signal(signal.SIGTERM))
    with pytest.raises(RunInterrupted):
        run(unlearner, output_dir, **options)


def kept(unlearner: FakeUnlearner, output_dir: Path, **options):
    """A run that keeps its checkpoints, which it warns of."""
    with pytest.warns(UserWarning, match="images to forget, and the seed: whoever reads them can get images"):
        return run(unlearner, output_dir, keep_checkpoints=True, **options)


def checkpoints(output_dir: Path) -> list[int]:
    """The steps of those that a run could go on from."""
    found = (output_dir / "private").glob("checkpoint-*")
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in found)


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- metrics and checkpoints


def test_a_run_leaves_metrics_checkpoints_and_a_record(tmp_path: Path):
    history = run(FakeUnlearner(), tmp_path, logging_steps=4, show_progress=True)
    assert [record["step"] for record in history.records] == [4, 8, 10]
    assert history.records == run_record.read_metrics(tmp_path)
    assert {
        name: history.records[0][name]
        for name in ("loss", "retain_loss", "grad_norm", "lr", "skipped", "skipped_steps")
    } == {
        "loss": 4.0,
        "retain_loss": 4.0,
        "grad_norm": 2.0,
        "lr": 0.1,
        "skipped": False,
        "skipped_steps": 0,
    }
    assert "forget_loss" not in history.records[0]
    assert checkpoints(tmp_path) == []
    assert history.checkpoint == tmp_path / "checkpoint-10"
    assert set(checkpoint.load(history.checkpoint).tensors) == {"model"}
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["steps"] == 10
    assert record["method"] == {"name": "Vanilla"}
    assert record["arguments"]["logging_steps"] == 4
    assert record["data"] == {
        "forget": None,
        "retain": {
            "rows": 2,
            "shape": [1, 4, 4],
            "dtype": "torch.uint8",
            "hmac_sha256": hmac_of(tmp_path, STORE.content_hash()),
        },
    }
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )


def hmac_of(run_dir: Path, text: str) -> str:
    key = json.loads((run_dir / "private" / "record.json").read_text())["identifiers_key"]
    return hmac.new(bytes.fromhex(key), text.encode(), "sha256").hexdigest()


def test_checkpoints_that_are_kept_and_their_limit(tmp_path: Path):
    assert kept(FakeUnlearner(), tmp_path / "all").checkpoint == tmp_path / "all/private/checkpoint-10"
    assert checkpoints(tmp_path / "all") == [3, 6, 9, 10]
    assert not list((tmp_path / "all").glob("checkpoint-*"))
    kept(FakeUnlearner(), tmp_path / "two", checkpoints_total_limit=2)
    assert checkpoints(tmp_path / "two") == [9, 10]


def test_only_the_end_is_saved_by_default(tmp_path: Path):
    kept(FakeUnlearner(), tmp_path, checkpointing_steps=None)
    assert checkpoints(tmp_path) == [10]


def test_resume_drops_metrics_beyond_the_checkpoint_and_a_torn_line(tmp_path: Path):
    expected = run(FakeUnlearner(), tmp_path / "whole")
    stopped(FakeUnlearner(), tmp_path / "run", 8)
    # as if killed after step 8 had been logged and before it was saved
    os.rename(tmp_path / "run" / "private" / "checkpoint-8", tmp_path / "gone")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    resumed = FakeUnlearner()
    history = run(resumed, tmp_path / "run", resume_from_checkpoint="latest")
    assert [record | {"seconds": 0} for record in history.records] == [
        record | {"seconds": 0} for record in expected.records
    ]
    assert all(
        before["seconds"] <= after["seconds"]
        for before, after in zip(history.records, history.records[1:], strict=False)
    )
    found, whole = (
        checkpoint.load(tmp_path / name / "checkpoint-10").tensors["model"] for name in ("run", "whole")
    )
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_resume_from_an_explicit_path_into_another_folder(tmp_path: Path):
    kept(FakeUnlearner(), tmp_path / "first", num_steps=6)
    saved = tmp_path / "first" / "private" / "checkpoint-3"
    history = kept(FakeUnlearner(), tmp_path / "second", resume_from_checkpoint=str(saved))
    assert [record["step"] for record in history.records] == list(range(4, 11))
    assert checkpoints(tmp_path / "second") == [6, 9, 10]


@pytest.mark.parametrize("keep", [False, True])
def test_resume_of_a_complete_run_does_nothing(tmp_path: Path, capsys, keep: bool):
    expected = (kept if keep else run)(FakeUnlearner(), tmp_path)
    before = everything_in(tmp_path)
    # Another run, too: it is not looked at any more.
    unlearner = FakeUnlearner(on_step=pytest.fail, seed=7)
    assert run(unlearner, tmp_path, resume_from_checkpoint="latest") == expected
    assert (
        capsys.readouterr().err
        == f"{tmp_path}: the run is complete, nothing is left to do (its settings were not compared)\n"
    )
    assert unlearner.step_index == 0
    assert everything_in(tmp_path) == before


def test_a_complete_run_does_not_go_on(tmp_path: Path):
    run(FakeUnlearner(), tmp_path)
    before = everything_in(tmp_path)
    with pytest.raises(ValueError, match=r"^num_steps: expected the 10 steps of the finished run in "):
        run(FakeUnlearner(), tmp_path, num_steps=12, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder without a finished run"):
        run(FakeUnlearner(), tmp_path)
    left = tmp_path / "checkpoint-10"
    with pytest.raises(ValueError, match=r"checkpoint-10, which holds the model alone$"):
        run(FakeUnlearner(), tmp_path / "other", resume_from_checkpoint=left)
    assert everything_in(tmp_path) == before


def test_another_run_does_not_go_on_in_the_folder_of_a_complete_one(tmp_path: Path):
    run(FakeUnlearner(), tmp_path / "first")
    stopped(FakeUnlearner(), tmp_path / "second", step=6)
    saved = tmp_path / "second" / "private" / "checkpoint-6"
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder without a finished run"):
        run(FakeUnlearner(), tmp_path / "first", resume_from_checkpoint=saved)
    # Its own are gone, and nothing is left to do.
    own = tmp_path / "first" / "private" / "checkpoint-10"
    assert len(run(FakeUnlearner(), tmp_path / "first", resume_from_checkpoint=own).records) == 10


def test_latest_without_a_checkpoint_starts_anew(tmp_path: Path):
    assert len(run(FakeUnlearner(), tmp_path, resume_from_checkpoint="latest").records) == 10


def test_resume_passes_over_a_damaged_newest(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 6)
    (tmp_path / "private" / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    steps = []
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        stopped(FakeUnlearner(on_step=steps.append), tmp_path, 7, resume_from_checkpoint="latest")
    assert steps[0] == 4
    assert checkpoint.verify(tmp_path / "private" / "checkpoint-6")


def test_random_state_comes_back(tmp_path: Path):
    drawn = []
    run(FakeUnlearner(on_step=lambda step: drawn.append(torch.rand(()).item())), tmp_path / "whole")
    again = []
    stopped(FakeUnlearner(on_step=lambda step: again.append(torch.rand(()).item())), tmp_path / "run", 6)
    torch.manual_seed(99)
    run(
        FakeUnlearner(on_step=lambda step: again.append(torch.rand(()).item())),
        tmp_path / "run",
        resume_from_checkpoint="latest",
    )
    assert again == drawn


# --- refusals


class NotAModule(FakeUnlearner):
    def __init__(self):
        super().__init__()
        self.model = lambda x, t: x


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_steps": -1}, ValueError, "num_steps: expected an integer >= 0, got -1"),
        ({"num_steps": 2.5}, TypeError, "num_steps: expected an integer, got 2.5"),
        ({"checkpointing_steps": 0}, ValueError, "checkpointing_steps: expected an integer >= 1, got 0"),
        (
            {"checkpoints_total_limit": 0},
            ValueError,
            "checkpoints_total_limit: expected an integer >= 1, got 0",
        ),
        ({"leave": "model"}, TypeError, "leave: expected a function or None, got 'model'"),
        ({"logging_steps": 0}, ValueError, "logging_steps: expected an integer >= 1, got 0"),
        ({"max_skipped_steps": -1}, ValueError, "max_skipped_steps: expected an integer >= 0, got -1"),
        ({"max_skipped_share": 1.5}, ValueError, r"max_skipped_share: expected a finite number in \[0, 1\]"),
        ({"max_skipped_share": None}, TypeError, "max_skipped_share: expected a number, got None"),
        ({"report_to": "stdout"}, ValueError, "report_to: expected one of tensorboard, wandb, got 'stdout'"),
        (
            {"resume_from_checkpoint": "/nowhere"},
            ValueError,
            "resume_from_checkpoint: expected 'latest' or the folder of a checkpoint, got '/nowhere'",
        ),
        (
            {"unlearner": NotAModule()},
            TypeError,
            "unlearner: expected an Unlearner whose model is a torch.nn.Module",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_step(tmp_path: Path, options, error, text):
    options = {"unlearner": FakeUnlearner(on_step=pytest.fail), "output_dir": tmp_path / "run"} | options
    with pytest.raises(error, match=text):
        run(**options)
    assert not (tmp_path / "run").exists()


def test_new_run_does_not_mix_with_an_old_one(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 5)
    with pytest.raises(ValueError, match="output_dir: expected a folder without checkpoints for a new run"):
        run(FakeUnlearner(), tmp_path)


def test_all_checkpoints_damaged_is_an_error_not_a_new_start(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 2)
    (tmp_path / "private" / "checkpoint-2" / "manifest.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="expected an undamaged checkpoint"),
    ):
        run(FakeUnlearner(), tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda u: setattr(u, "method", NegGrad()),
            r"a run with method as here, got another with name \('NegGrad' here",
        ),
        (lambda u: setattr(u, "batch_size", 5), "a run with batch_size 5, got 4"),
        (lambda u: setattr(u, "retain", ImageStore(STORE.images + 1)), "a run with data"),
        (
            lambda u: setattr(u, "lr_scheduler", torch.optim.lr_scheduler.ConstantLR(u.optimizer)),
            "a run with lr_scheduler {'name': 'ConstantLR'",
        ),
        (
            lambda u: u.optimizer.param_groups[0].update(lr=0.2),
            r"a run with optimizer as here, got another with learning_rates.0 \(0.2 here",
        ),
        (lambda u: setattr(u, "ema", nn.Linear(1, 1)), r"expected the state of \['ema'\]"),
        (lambda u: setattr(u, "step_index", 1), "unlearner: expected a new one to resume into"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, change, text):
    stopped(FakeUnlearner(), tmp_path, 3)
    other = FakeUnlearner()
    change(other)
    with pytest.raises(ValueError, match=text):
        run(other, tmp_path, resume_from_checkpoint="latest")


def test_fewer_steps_than_taken(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 9)
    with pytest.raises(ValueError, match="num_steps: expected at least the 9 steps"):
        run(FakeUnlearner(), tmp_path, num_steps=8, resume_from_checkpoint="latest")


# --- skipped steps, signals


def test_skipped_steps_within_the_limit_are_counted(tmp_path: Path):
    history = run(FakeUnlearner(bad_steps={4, 5}), tmp_path, max_skipped_steps=2)
    assert [record["skipped"] for record in history.records] == [step in (4, 5) for step in range(1, 11)]
    assert "loss" not in history.records[3]
    assert history.records[-1]["skipped_steps"] == 2


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_too_many_skipped_steps_stop_with_the_last_good_checkpoint(tmp_path: Path, logging_steps: int):
    with pytest.raises(
        TooManySkippedSteps,
        match=r"(?s)[45] of [56] steps .*max_skipped_steps=3.*last good checkpoint is .*checkpoint-3",
    ):
        run(
            FakeUnlearner(bad_steps={2, 4, 5, 6, 7}),
            tmp_path,
            max_skipped_steps=3,
            logging_steps=logging_steps,
            checkpoints_total_limit=1,
        )
    assert checkpoints(tmp_path) == [3]
    assert run_record.read_run(tmp_path)["status"] == "failed: TooManySkippedSteps"
    with pytest.raises(TooManySkippedSteps, match="no checkpoint was written yet"):
        run(FakeUnlearner(bad_steps={1}), tmp_path / "early", max_skipped_steps=0)


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize(("skipped", "share"), [(9, 0.5), (6, 0.5), (1, 0.0), (10, 0.9)])
def test_a_run_of_skipped_steps_is_not_complete(tmp_path: Path, skipped, share, logging_steps):
    """Within max_skipped_steps, but more than the share: it fails, and leaves no checkpoint of its end."""
    bad = FakeUnlearner(bad_steps=range(1, skipped + 1))
    certain = int(share * 10) + 1  # when it can no longer be made up for
    found = f"{certain} of {certain}" if logging_steps == 1 else f"{skipped} of 10"
    with pytest.raises(TooManySkippedSteps, match=f"{found} steps .*max_skipped_share={share:g} of 10 steps"):
        run(bad, tmp_path, logging_steps=logging_steps, max_skipped_share=share, checkpointing_steps=None)
    assert checkpoints(tmp_path) == []
    assert run_record.read_run(tmp_path)["status"] == "failed: TooManySkippedSteps"


@pytest.mark.parametrize(("skipped", "share"), [(5, 0.5), (10, 1.0), (0, 0.0), (9, 0.9)])
def test_a_share_within_the_limit_is_complete(tmp_path: Path, skipped: int, share: float):
    run(FakeUnlearner(bad_steps=range(1, skipped + 1)), tmp_path, max_skipped_share=share)
    assert run_record.read_run(tmp_path)["status"] == "complete"


def test_the_share_counts_over_the_whole_run(tmp_path: Path):
    """Three of the first five steps skipped, and three of the last five: six of ten."""
    stopped(FakeUnlearner(bad_steps={1, 2, 3}), tmp_path, 5)
    with pytest.raises(TooManySkippedSteps, match="6 of 10 steps"):
        run(FakeUnlearner(bad_steps={6, 9, 10}), tmp_path, resume_from_checkpoint="latest")
    assert checkpoints(tmp_path) == [3, 5, 6, 9]


# --- weights that are not finite ----------------------------------------------------------------------------


class Ruined(FakeUnlearner):
    """From step 5 on a number of `part` is `value`, and no step says so: an update overflowed."""

    def __init__(self, part: str = "model", value: float = float("nan"), at: int = 5):
        super().__init__(on_step=self.ruin)
        self.model.register_buffer("running_mean", torch.zeros(3))
        self.ema = nn.Linear(3, 2)
        self.at, self.part, self.value = at, part, value

    def ruin(self, step: int) -> None:
        if step == self.at:
            parts = {"model": self.model.weight, "buffer": self.model.running_mean, "ema": self.ema.bias}
            parts[self.part].data.view(-1)[-1] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("part", "name"), [("model", "model.weight"), ("buffer", "model.running_mean"), ("ema", "ema.bias")]
)
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, part: str, name: str, value: float):
    found = rf"step 6: .*got NaN or Inf in {name} \(of 5 .*last good checkpoint is .*checkpoint-3\."
    with pytest.raises(WeightsNotFinite, match=found):
        run(Ruined(part, value), tmp_path)
    assert checkpoints(tmp_path) == [3]
    assert run_record.read_run(tmp_path)["status"] == "failed: WeightsNotFinite"


@pytest.mark.parametrize("average", [False, True])
def test_a_mask_of_infinities_is_no_weight(tmp_path: Path, average: bool):
    def masked() -> FakeUnlearner:
        unlearner = FakeUnlearner()
        unlearner.model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        unlearner.ema = torch.optim.swa_utils.AveragedModel(unlearner.model) if average else None
        return unlearner

    kept(masked(), tmp_path / "run", checkpointing_steps=None)
    saved = tmp_path / "run" / "private" / "checkpoint-10"
    run(masked(), tmp_path / "other", resume_from_checkpoint=str(saved))
    broken = masked()
    broken.on_step = lambda step: broken.model.weight.data.fill_(torch.inf)
    with pytest.raises(WeightsNotFinite, match=r"NaN or Inf in model\.weight \(of"):
        run(broken, tmp_path / "broken")


def test_private_files_of_a_run_without_checkpoint_stay_listed(tmp_path: Path):
    def fail(step: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        run(FakeUnlearner(on_step=fail), tmp_path / "run")
    nearest_neighbors(STORE, STORE, 1, cache_dir=tmp_path / "caches")
    cache = next((tmp_path / "caches").iterdir())
    run_record.list_private(tmp_path / "run", cache)
    run(FakeUnlearner(), tmp_path / "run", resume_from_checkpoint="latest")
    assert listed(tmp_path / "run") == [str(cache)]


def listed(run_dir: Path) -> list[str]:
    """The files elsewhere that a run told of."""
    return json.loads((run_dir / "private" / "record.json").read_text())["private_files"]


def test_the_error_of_a_run_is_told_though_its_end_cannot_be_noted(tmp_path: Path):
    def remove_and_fail(step: int) -> None:
        (tmp_path / "run.json").unlink()
        raise MemoryError("of the step")

    with pytest.raises(MemoryError, match="of the step"):
        run(FakeUnlearner(on_step=remove_and_fail), tmp_path)


def test_neither_the_last_checkpoint_nor_that_of_a_signal_is_spared(tmp_path: Path):
    with pytest.raises(WeightsNotFinite, match=r"step 10: .*no checkpoint was written yet"):
        run(Ruined(at=10), tmp_path / "end", checkpointing_steps=None)
    ruined = Ruined(at=4)
    ruined.on_step = lambda step: step == 4 and (ruined.ruin(step), signal.raise_signal(signal.SIGTERM))
    with pytest.raises(WeightsNotFinite, match="step 4: "):
        run(ruined, tmp_path / "signal")
    assert checkpoints(tmp_path / "end") == []
    assert checkpoints(tmp_path / "signal") == [3]


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_resumed(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 3)
    state = FakeUnlearner()
    state.step_index = 6
    state.model.weight.data.fill_(float("nan"))
    private = tmp_path / "private"
    found = checkpoint.load(private / "checkpoint-3")
    found.metadata["unlearner"]["step_index"] = 6
    checkpoint.save(private, 6, {"model": state.model.state_dict()}, found.metadata, states=found.states)
    text = (
        r"checkpoint-6/model\.safetensors: model\.weight: expected finite values, not 6 that are NaN or Inf"
    )
    for num_steps in (10, 6):  # also where nothing is left to do
        with pytest.raises(ValueError, match=text):
            run(FakeUnlearner(), tmp_path, num_steps=num_steps, resume_from_checkpoint="latest")
    run(FakeUnlearner(), tmp_path, resume_from_checkpoint=str(private / "checkpoint-3"))
    assert run_record.read_run(tmp_path)["status"] == "complete"


def test_weights_that_are_large_are_finite(tmp_path: Path):
    assert run(Ruined(value=3e38), tmp_path).checkpoint.name == "checkpoint-10"


# --- two runs into one folder -------------------------------------------------------------------------------


def test_a_second_run_into_the_folder_of_one_that_goes_on_is_refused(tmp_path: Path):
    refused = []

    def second() -> None:
        try:
            run(FakeUnlearner(), tmp_path / "run", checkpointing_steps=None)
        except FolderLocked as error:
            refused.append(error)

    def meanwhile(step: int) -> None:
        if step in (1, 7):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    run(FakeUnlearner(on_step=meanwhile), tmp_path / "run", checkpointing_steps=None)
    assert [error.owner.pid for error in refused] == [os.getpid()] * 2
    assert [record["step"] for record in run_record.read_metrics(tmp_path / "run")] == list(range(1, 11))
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-10", "metrics.jsonl", "private", "run.json"]


def test_a_run_inside_a_run_into_the_same_folder_is_refused(tmp_path: Path):
    """From the function that a run reports to: in the same thread."""

    def report(step: int, values: dict) -> None:
        run(FakeUnlearner(), tmp_path, checkpointing_steps=None)

    with pytest.raises(FolderLocked):
        run(FakeUnlearner(), tmp_path, report_to=report)
    assert run_record.read_run(tmp_path)["status"] == "failed: FolderLocked"


def run_at_once(folder: str, start, done) -> tuple[int, str]:
    """This process, and how its run ended. No run takes its second step before all have begun."""
    start.wait(300)
    try:
        run(FakeUnlearner(on_step=lambda step: done.wait(300) if step == 1 else None), Path(folder))
    except FolderLocked as error:
        done.wait(300)
        return os.getpid(), str(error)
    return os.getpid(), "complete"


def test_of_two_runs_that_start_at_one_instant_one_goes_through(tmp_path: Path):
    answers = at_one_instant(2, run_at_once, str(tmp_path / "run"))
    ((winner, _),) = [answer for answer in answers if answer[1] == "complete"]
    ((_, message),) = [answer for answer in answers if answer[1] != "complete"]
    assert f"got one held by process {winner} on " in message
    assert run_record.read_run(tmp_path / "run")["status"] == "complete"


def test_a_run_in_a_folder_below_a_locked_one_is_free(tmp_path: Path):
    with held_elsewhere(locked, tmp_path):
        run(FakeUnlearner(), tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path: Path, capsys, number: int):
    before = signal.getsignal(number)
    unlearner = FakeUnlearner(on_step=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    with pytest.raises(RunInterrupted) as interrupted:
        run(unlearner, tmp_path)
    assert interrupted.value.code == 128 + number
    assert interrupted.value.checkpoint == tmp_path / "private" / "checkpoint-4"
    assert checkpoints(tmp_path) == [3, 4]
    message = capsys.readouterr().err
    assert "stopped after step 4 of 10" in message
    assert "resume_from_checkpoint='latest'" in message
    assert run_record.read_run(tmp_path)["status"] == "interrupted"
    assert signal.getsignal(number) is before
    expected = run(FakeUnlearner(), tmp_path / "whole")
    history = run(FakeUnlearner(), tmp_path, resume_from_checkpoint="latest")
    assert [record["loss"] for record in history.records] == [record["loss"] for record in expected.records]


@pytest.fixture
def interruptible():
    """As from a terminal: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_signal_acts_at_once(tmp_path: Path):
    def twice(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(FakeUnlearner(on_step=twice), tmp_path)
    assert checkpoints(tmp_path) == [3]


def test_an_error_in_a_step_is_recorded_and_passed_on(tmp_path: Path):
    def fail(step: int) -> None:
        raise MemoryError("no more")

    with pytest.raises(MemoryError):
        run(FakeUnlearner(on_step=fail), tmp_path)
    assert run_record.read_run(tmp_path)["status"] == "failed: MemoryError"


# --- trackers


def test_report_to_a_callable(tmp_path: Path):
    seen = {}
    run(FakeUnlearner(), tmp_path, report_to=lambda step, values: seen.update({step: values["loss"]}))
    assert seen == {step: float(step) for step in range(1, 11)}


@dataclass
class RecordingTracker:
    """Stands for accelerate's TensorBoardTracker, whose package need not be installed."""

    run_name: str
    logging_dir: Path
    calls: ClassVar[list] = []

    def start(self) -> None:
        self.calls.append("start")

    def log(self, values: dict, step: int) -> None:
        self.calls.append(step)

    def finish(self) -> None:
        self.calls.append("finish")


def test_report_to_an_accelerate_tracker(tmp_path: Path, monkeypatch):
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", RecordingTracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    run(FakeUnlearner(), tmp_path, num_steps=3, report_to="tensorboard")
    assert RecordingTracker.calls == ["start", 1, 2, 3, "finish"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(
        ValueError, match=r"report_to: expected an installed tracker, got 'wandb' \(pip install wandb\)"
    ):
        run(FakeUnlearner(), tmp_path, report_to="wandb")


# --- purge


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run with a store and a folder of its own, and a neighbour cache elsewhere."""
    run_dir = tmp_path / "run"
    run(FakeUnlearner(), run_dir)
    private = run_dir / run_record.PRIVATE_FOLDER
    (private / "stores").mkdir(parents=True)
    (private / "stores" / "forget.npy").write_bytes(b"forget rows")
    nearest_neighbors(STORE, STORE, 1, cache_dir=tmp_path / "cache")
    run_record.list_private(run_dir, private / "stores", *(tmp_path / "cache").iterdir())
    return run_dir


def tamper(run_dir: Path, *paths: Path) -> None:
    record = run_record.read_run(run_dir)
    run_record.write_run(run_dir, record | {"private_files": [*record["private_files"], *map(str, paths)]})


def test_purge_removes_what_is_listed_and_says_so(finished: Path, tmp_path: Path):
    (cache,) = (tmp_path / "cache").iterdir()
    result = purge(finished)
    assert set(result.removed) == {finished / "private" / "stores", finished / "private/record.json", cache}
    assert not result.refused
    assert f"removed {cache}" in str(result)
    assert not cache.exists()
    assert not list((finished / "private").iterdir())
    assert checkpoint.is_model_alone(finished / "checkpoint-10")
    record = run_record.read_run(finished)
    assert record["private_files"] == []
    assert record["purged"][0]["removed"] == 3
    assert str(purge(finished)) == "nothing to remove"
    assert [set(line) for line in run_record.read_metrics(finished)] == [set(run_record.KEPT_METRICS)] * 10


def test_purge_leaves_nothing_to_compare_a_candidate_with(tmp_path: Path):
    """Of a run that keeps everything: no state, no hash, no row, no loss; the key of its lineage stays."""
    record = {"forget_in_retain": {"dropped_equal": [3]}, "protocol": {"rows": [5], "of": 2}}
    kept(FakeUnlearner(seed=987654321987), tmp_path, record=record)
    (tmp_path / "private" / "lineage.key").write_bytes(b"key")
    text = json.loads((tmp_path / "run.json").read_text())
    assert {"start_weights", "data", "forget_in_retain"} < text.keys()
    purge(tmp_path)
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["lineage.key"]
    purged = json.loads((tmp_path / "run.json").read_text())
    assert purged["protocol"] == {"of": 2}
    assert purged["data"]["retain"] == {"rows": 2, "shape": [1, 4, 4], "dtype": "torch.uint8"}
    assert not {"start_weights", "forget_in_retain", "seed"} & purged.keys()
    for path, content in everything_in(tmp_path).items():
        assert not re.search(rb"[0-9a-f]{64}|987654321987|loss\"", content), path
    assert run(FakeUnlearner(), tmp_path, resume_from_checkpoint="latest").checkpoint.name == "checkpoint-10"


def test_a_run_that_is_not_finished_cannot_go_on_once_it_is_purged(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 4)
    assert "the run was not finished, and cannot be resumed any more" in str(purge(tmp_path))
    assert not list(tmp_path.rglob("checkpoint-*"))
    steps = []
    run(FakeUnlearner(on_step=steps.append), tmp_path, resume_from_checkpoint="latest")
    assert steps == list(range(1, 11))


def list_one_more(run_dir: Path) -> None:
    run_record.list_private(run_dir, run_dir / "private" / "more")


def test_a_run_that_goes_on_is_not_purged_nor_its_record_changed(finished: Path):
    before = everything_in(finished)
    (finished / "private" / "more").write_text("x")
    with held_elsewhere(locked, finished):
        for change in (purge, list_one_more, run_record.update_run):
            with pytest.raises(FolderLocked, match=rf"{finished}: .*held by process {os.getpid()} on "):
                change(finished)
    (finished / "private" / "more").unlink()
    assert everything_in(finished) == before


def test_a_purge_that_is_killed_still_knows_what_is_listed(finished: Path, tmp_path: Path):
    """What lies elsewhere goes before the record that names it."""
    removed = purge(finished).removed
    elsewhere = [path for path in removed if path.parent == tmp_path / "cache"]
    assert [path.name for path in removed[-2:]] == [elsewhere[0].name, "record.json"]


def test_purge_makes_no_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="run_dir: expected a run folder"):
        purge(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_purge_removes_unlisted_files_of_the_private_folder(finished: Path):
    (finished / "private" / "forgotten.npy").write_bytes(b"x")
    assert finished / "private" / "forgotten.npy" in purge(finished).removed


def test_purge_refuses_what_a_tampered_record_names(finished: Path, tmp_path: Path):
    """Files outside, traversal, links, folders, and files that only look like a cache: all stay, and are
    reported.
    """
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    looks_like = outside / f"fastunlearn-neighbors-{'0' * 40}.safetensors"
    looks_like.write_bytes(b"not one")
    link = outside / f"fastunlearn-neighbors-{'1' * 40}.safetensors"
    link.symlink_to(outside / "thesis.tex")
    targets = [
        outside / "thesis.tex",
        outside,
        looks_like,
        link,
        finished / "private" / ".." / ".." / "precious" / "thesis.tex",
        finished / "private",
        finished / "checkpoint-10",
        finished,
        finished / "private" / "..",
        tmp_path / "cache",
        Path("/"),
        Path("run.json"),
        Path(""),
    ]
    tamper(finished, *targets)
    result = purge(finished)
    assert {str(path) for path, _ in result.refused} == {
        str(path) for path in targets if path != Path("run.json")
    }
    assert Path("run.json") in result.missing
    assert all(
        path.exists()
        for path in (
            outside / "thesis.tex",
            looks_like,
            finished / "checkpoint-10",
            finished / "run.json",
            tmp_path / "cache",
        )
    )
    assert link.is_symlink()
    assert (
        f"NOT removed {outside / 'thesis.tex'}: neither in the run's private folder nor named like a "
        f"neighbour cache" in str(result)
    )


def test_purge_does_not_follow_links(finished: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (finished / "private" / "link").symlink_to(tmp_path / "precious")
    (finished / "private" / "stores" / "inner").symlink_to(tmp_path / "precious")
    tamper(finished, finished / "private" / "link" / "file")
    purge(finished)
    assert (tmp_path / "precious" / "file").exists()
    assert not (finished / "private" / "link").is_symlink()


def test_purge_refuses_a_private_folder_that_is_a_link(finished: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    os.rename(finished / "private", tmp_path / "moved")
    private = finished / "private"
    private.symlink_to(tmp_path / "precious")
    # What is behind it stays, which nobody should take for nothing to remove.
    assert [path for path, _ in purge(finished).refused] == [private]
    tamper(finished, private / "file")
    assert [path for path, _ in purge(finished).refused] == [private, private / "file"]
    assert (tmp_path / "precious" / "file").exists()


def test_purge_reports_what_is_gone_and_needs_a_record(finished: Path, tmp_path: Path):
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert [path.parent for path in purge(finished).missing] == [tmp_path / "cache"]
    for content in ("", "[]", '{"format": "other"}', '{"format": "fastunlearn-run", "private_files": "x"}'):
        (finished / "run.json").write_text(content)
        with pytest.raises(ValueError, match="run_dir: expected"):
            purge(finished)
    with pytest.raises(ValueError, match="run_dir: expected a run folder"):
        purge(tmp_path)


def test_only_what_purge_would_remove_can_be_listed(finished: Path, tmp_path: Path):
    (tmp_path / "store.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"paths: expected files in .*private or neighbour caches"):
        run_record.list_private(finished, tmp_path / "store.npy")


def test_a_resumed_run_keeps_the_list(tmp_path: Path):
    stopped(FakeUnlearner(), tmp_path, 4)
    (tmp_path / "private" / "store.npy").write_bytes(b"rows")
    run_record.list_private(tmp_path, tmp_path / "private" / "store.npy")
    run(FakeUnlearner(), tmp_path, resume_from_checkpoint="latest")
    assert listed(tmp_path) == [str(tmp_path / "private" / "store.npy")]
