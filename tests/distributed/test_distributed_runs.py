"""`unlearn` on several processes: one of them writes, all end together, and a run goes on where it was, on as
many processes as there are then.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from run_cases import (
    KILLED,
    STEPS,
    FailAt,
    LongStep,
    NotFinite,
    Ruin,
    SignalAt,
    interrupt_first,
    lines_of_run,
    run,
    run_killed,
)
from team import Team

from fastunlearn import ImageStore
from fastunlearn.runs import checkpoint, lineage
from fastunlearn.runs.run_record import read_metrics, read_run
from fastunlearn.runs.signals import EX_TEMPFAIL


def together(
    team: Team,
    folder: Path,
    num_steps: int = STEPS,
    *,
    of_unlearner: dict[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    return team.run(run, False, folder, num_steps, options, of_unlearner or {})


def alone(
    folder: Path, num_steps: int = STEPS, *, of_unlearner: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    return run(True, folder, num_steps, options, of_unlearner or {})


def numbers(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name != "seconds"}
        for record in read_metrics(folder)
    ]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.linalg.vector_norm(found - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Bit for bit: weights, optimizer, schedule, average, random states."""
    for file in ("model", "optimizer", "ema", "random"):
        assert (found / f"{file}.safetensors").read_bytes() == (
            expected / f"{file}.safetensors"
        ).read_bytes(), file
    assert runs.same_run(found, expected)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_run_is_that_of_a_single_process_and_written_once(pair: Team, tmp_path: Path, wrapped: bool):
    results = together(pair, tmp_path / "pair", checkpointing_steps=4, of_unlearner={"wrapped": wrapped})
    single = alone(tmp_path / "single", checkpointing_steps=4)
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
        assert result["history"] == results[0]["history"]
    assert_close(results[0]["weights"], single["weights"])
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == [
        "checkpoint-6",
        "metrics.jsonl",
        "private",
        "run.json",
    ]
    assert [path.name for path in (tmp_path / "pair" / "private").iterdir()] == ["record.json"]
    assert results[0]["history"].records == read_metrics(tmp_path / "pair")
    for found, expected in zip(numbers(tmp_path / "pair"), numbers(tmp_path / "single"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    found, expected = (
        checkpoint.load(tmp_path / name / f"checkpoint-{STEPS}") for name in ("pair", "single")
    )
    # the network's own names, whatever it was wrapped in
    assert found.tensors["model"].keys() == expected.tensors["model"].keys()
    assert found.metadata == expected.metadata
    record, expected_record = read_run(tmp_path / "pair"), read_run(tmp_path / "single")
    assert (record["num_processes"], expected_record["num_processes"]) == (2, 1)
    assert record["status"] == expected_record["status"] == "complete"


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(pair: Team, tmp_path: Path):
    """With dropout, whose masks come from each process's own generator."""
    dropout = {"dropout": 0.3}
    whole = together(pair, tmp_path / "whole", of_unlearner=dropout, keep_checkpoints=True)
    together(pair, tmp_path / "parts", 3, of_unlearner=dropout, keep_checkpoints=True)
    resumed = {"resume_from_checkpoint": "latest", "keep_checkpoints": True}
    runs.unfinish(tmp_path / "parts", 3)
    parts = together(pair, tmp_path / "parts", of_unlearner=dropout, **resumed)
    for first, second in zip(whole, parts, strict=True):
        assert torch.equal(first["weights"], second["weights"])
        assert not [told for told in second["warnings"] if "keep_checkpoints" not in told]
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    found, expected = (runs.saved_in(tmp_path / name, STEPS) for name in ("parts", "whole"))
    assert_same_checkpoint(found, expected)
    states = checkpoint.load(expected).states["random"]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_a_run_goes_on_with_another_number_of_processes(pair: Team, tmp_path: Path):
    whole = alone(tmp_path / "whole")["weights"]
    together(pair, tmp_path / "from two", 3, keep_checkpoints=True)
    runs.unfinish(tmp_path / "from two", 3)
    one = alone(tmp_path / "from two", resume_from_checkpoint="latest")
    alone(tmp_path / "from one", 3, keep_checkpoints=True)
    runs.unfinish(tmp_path / "from one", 3)
    two = together(pair, tmp_path / "from one", resume_from_checkpoint="latest")
    for result in (one, *two):
        assert_close(result["weights"], whole)
    assert "written by 2 processes, and 1 resume it" in one["warnings"][0]
    assert "written by 1 processes, and 2 resume it" in two[0]["warnings"][0]
    assert read_run(tmp_path / "from one")["num_processes"] == 2
    assert [record["step"] for record in read_metrics(tmp_path / "from one")] == list(range(1, STEPS + 1))


def test_all_start_with_the_weights_of_the_first(pair: Team, tmp_path: Path):
    results = together(pair, tmp_path / "pair", of_unlearner={"wrapped": False, "own_weights": True})
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert_close(results[0]["weights"], alone(tmp_path / "single")["weights"])


@pytest.mark.parametrize("steps", [{1: 3}, {0: 3}, {0: 3, 1: 3}, {1: 2}], ids=str)
def test_a_signal_to_any_process_stops_all_at_one_step(pair: Team, tmp_path: Path, steps: dict[int, int]):
    results = together(pair, tmp_path / "run", of_unlearner={"before_step": SignalAt(steps), "dropout": 0.3})
    stopped_at = next(iter(steps.values())) + 1  # a signal that comes in a step is told before the next one
    for result in results:
        assert result["step"] == stopped_at
        assert result["stopped"] == (128 + 15, runs.saved_in(tmp_path / "run", stopped_at))
    assert read_run(tmp_path / "run")["status"] == "interrupted"
    whole = together(pair, tmp_path / "whole", of_unlearner={"dropout": 0.3})
    resumed = together(pair, tmp_path / "run", resume_from_checkpoint="latest", of_unlearner={"dropout": 0.3})
    assert torch.equal(resumed[1]["weights"], whole[1]["weights"])


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_one_of_two_processes_is_killed_anywhere(tmp_path: Path, kills: int):
    """The other one ends, too, and the run that goes on ends with the bits of one that was left alone."""
    with Team(2) as pair:
        lines = pair.run(lines_of_run, tmp_path / "whole")
        whole = together(pair, tmp_path / "again", **KILLED)
    generator = random.Random(0)
    for number in range(kills):
        folder, rank = tmp_path / str(number), number % 2
        # What waits for the other process takes more lines at one time than at another.
        line = generator.randint(1, lines[rank] * 9 // 10)
        with Team(2) as pair:
            answers = pair.answers(run_killed, folder, rank, line)
            assert answers[rank] == (False, f"process {rank} ended with -9"), line
            assert not answers[1 - rank][0], line
        with Team(2) as pair:
            resumed = together(pair, folder, resume_from_checkpoint="latest", **KILLED)
        for found, expected in zip(resumed, whole, strict=True):
            assert torch.equal(found["weights"], expected["weights"]), line
        assert numbers(folder) == numbers(tmp_path / "whole"), line
        assert not [path for path in folder.rglob(".*") if path.name != ".fastunlearn.lock"], line


@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_that_is_short_of_time_stops_all(pair: Team, tmp_path: Path, rank: int):
    of_unlearner = {"before_step": LongStep(rank, 2)}
    for result in together(pair, tmp_path, of_unlearner=of_unlearner, max_time="9999-00:00:00"):
        assert result["stopped"] == (EX_TEMPFAIL, runs.saved_in(tmp_path, 3))


def test_who_waits_for_a_process_that_a_signal_stops_is_told(pair: Team):
    told = "RunInterrupted: SIGTERM"
    assert pair.run(interrupt_first) == [told, f"OtherProcessFailed: process 0: {told}"]


def failing(team: Team, *arguments: Any) -> list[str]:
    """The tracebacks of a function that fails in all processes."""
    answers = team.answers(*arguments)
    assert not any(succeeded for succeeded, _ in answers)
    return [text.strip().splitlines()[-1] for _, text in answers]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_does_not_leave_the_others_waiting(tmp_path: Path, rank: int):
    """If the other waited for the group's timeout, the team would say that it did not answer."""
    with Team(2) as team:
        texts = failing(
            team,
            run,
            False,
            tmp_path / "run",
            STEPS,
            {"checkpointing_steps": 2},
            {"before_step": FailAt(rank, 4)},
        )
    assert texts[rank] == f"process {rank} ended with 7"
    assert "RuntimeError" in texts[1 - rank]
    assert read_run(tmp_path / "run")["status"] == (
        "failed: RuntimeError" if rank == 1 else "failed: MemoryError"
    )
    assert checkpoint.latest(tmp_path / "run" / "private").name == "checkpoint-2"


def test_what_fails_in_the_first_process_alone_is_told_to_the_others(pair: Team, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    texts = failing(pair, run, False, tmp_path / "file" / "run", STEPS, {}, {})
    assert texts[0].startswith("NotADirectoryError")
    assert texts[1].startswith("fastunlearn.runs.processes.OtherProcessFailed: process 0: NotADirectoryError")
    texts = failing(pair, run, False, tmp_path / "run", STEPS, {"report_to": "nobody"}, {})
    assert "report_to: expected one of tensorboard, wandb" in texts[0]
    assert "process 0: ValueError: report_to: expected one of tensorboard, wandb" in texts[1]
    assert not (tmp_path / "run").exists()


def test_arguments_that_differ_are_refused(pair: Team, tmp_path: Path):
    for text in failing(pair, run, False, tmp_path / "run", STEPS, {}, {"own_seed": True}):
        assert (
            text
            == "ValueError: unlearner: expected the same seed in all processes, got 5 in process 0 and 6 "
            "in process 1"
        )


def test_too_many_skipped_steps_end_all(pair: Team, tmp_path: Path):
    options, unlearner = (
        {"max_skipped_steps": 1, "checkpointing_steps": 1, "logging_steps": 100},
        {"before_step": NotFinite(rank=1, first=3)},
    )
    for text in failing(pair, run, False, tmp_path / "run", STEPS, options, unlearner):
        assert "TooManySkippedSteps: 2 of 4 steps" in text
    assert read_run(tmp_path / "run")["status"] == "failed: TooManySkippedSteps"


def test_weights_that_are_not_finite_in_one_process_end_all(pair: Team, tmp_path: Path):
    """Only a fault of its device makes them differ: then nobody goes on."""
    ruin = {"before_step": Ruin(rank=1, step=5)}
    texts = failing(pair, run, False, tmp_path / "run", STEPS, {"checkpointing_steps": 2}, ruin)
    assert "OtherProcessFailed: process 1: WeightsNotFinite: step 6: expected finite weights" in texts[0]
    assert "WeightsNotFinite: step 6: expected finite weights, got NaN or Inf in " in texts[1]
    assert f"last good checkpoint is {runs.saved_in(tmp_path / 'run', 4)}" in texts[1]
    written = sorted(path.name for path in (tmp_path / "run" / "private").glob("checkpoint-*"))
    assert written == ["checkpoint-2", "checkpoint-4"]


def test_all_leave_out_what_was_forgotten_and_only_the_first_has_the_key(pair: Team, tmp_path: Path):
    pytest.importorskip("tyro")
    images = torch.arange(5 * 16, dtype=torch.uint8).view(5, 1, 4, 4)
    key, forgotten = lineage.new_key(), ImageStore(images[[1, 3]])
    (tmp_path / "model").mkdir()
    (tmp_path / "private").mkdir()
    content = lineage.with_rows(lineage.Lineage(), key, forgotten).content()
    (tmp_path / "model" / lineage.FILE).write_bytes(content)
    lineage.write_key(tmp_path / "private" / lineage.LINEAGE_KEY, key)
    first, second = pair.run(keep_the_rest, tmp_path, images)
    assert first == ([0, 2, 4], {"forgotten_before": 2, "left_out": 2}, True)
    assert second == (*first[:2], False)
    (tmp_path / "private" / lineage.LINEAGE_KEY).unlink()
    texts = failing(pair, keep_the_rest, tmp_path, images)
    assert texts[0].startswith("ValueError: --lineage_key: expected the key of ")
    assert "OtherProcessFailed: process 0: ValueError: --lineage_key: expected " in texts[1]


def keep_the_rest(run_before: Path, images: torch.Tensor) -> tuple[list[int], dict[str, Any], bool]:
    import torch.distributed as dist

    from fastunlearn.cli.lineage_flags import LineageFlags, Past
    from fastunlearn.runs.processes import Processes

    retain, read = ImageStore(images), {"retain": {"options": None}}
    past = Past(LineageFlags(), run_before / "model", run_before / "next", forgets=True)
    with Processes(dist.group.WORLD) as processes:
        processes.by_first(past.open)
        rows, record = processes.by_first(lambda: past.rows_to_keep(retain, read))
    return rows.tolist(), record, past.key is not None


def test_a_part_of_the_processes_is_refused(tmp_path: Path):
    with Team(3) as trio:
        texts = failing(trio, run_in_a_part, tmp_path)
    assert "process_group: expected a group of all 3 processes for unlearn(), got one of 2" in texts[0]
    assert texts[2] == "AssertionError: not one of them"


def run_in_a_part(folder: Path) -> None:
    import torch.distributed as dist
    from run_cases import build

    from fastunlearn.runs.training import unlearn

    part = dist.new_group([0, 1])
    assert dist.get_rank() < 2, "not one of them"
    unlearner = build(False, wrapped=False)
    unlearner.process_group = part
    unlearn(unlearner, num_steps=1, output_dir=folder)
