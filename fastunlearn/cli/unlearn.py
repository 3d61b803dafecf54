"""`fastunlearn unlearn`."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from .keeping import Dropping, Kept, rows_to_keep
from .lineage_flags import LineageFlags, Past
from .method_flags import (
    MethodFlags,
    method_choices,
    method_flags,
    methods_in_a_line_each,
    methods_that_do_not_read,
)
from .options import unset
from .picture_flags import PictureFlags
from .protocol_flags import ProtocolFlags
from .rule_flags import RuleFlags, RuleWork
from .selection_flags import FrequencyFlags, TimestepFlags, given_flags, selection
from .unlearn_flags import Execution, Optimization, RunFlags

if TYPE_CHECKING:
    import torch

    from ..engine.unlearner import Unlearner
    from ..host.store import ImageStore
    from ..methods import Method
    from ..objective.schedule import NoiseSchedule
    from ..objective.selection import Selection
    from ..runs.processes import Processes

FORGET_HELP = "Images to forget; image files are cropped and resized to the model's size."
RETAIN_HELP = "Images to keep."
METHOD_HELP = "What to forget with; see above."
REPORTED_IMAGES, REPORTED_CHAINS, REPORTED_TIMESTEP, REPORTED_STEPS = 8, 4, 250, 50  # of --report-images


@dataclass(frozen=True)
class Work:
    """What the runs of one command have in common."""

    processes: Processes
    device: torch.device
    method: Method
    scheduler: Any  # diffusers'
    schedule: NoiseSchedule
    chosen: Selection
    forget: ImageStore | None  # of all runs together
    retain: ImageStore | None
    seed: int
    record: dict[str, Any]  # for run.json
    private: dict[str, Any]  # for private/record.json
    past: Past  # what --model was made to forget before


@dataclass(kw_only=True)
class Unlearn:
    """Make a checkpoint forget given training images, and keep the rest.

    METHODS

    Images: folders, image files, .npy, .npz, idx(.gz), .parquet, or data sets saved by Hugging Face datasets.

    Try: fastunlearn unlearn --model pretrained --forget forget/ --retain retain.npy --method retrack --output
    runs/forget-7
    """

    model: Path
    """Folder of a diffusers pipeline with a UNet2DModel; safetensors only, nothing is downloaded."""
    # What the help says of these three, and the flags of `hyperparameter`, are filled in by `with_methods`.
    forget: tuple[Path, ...] = ()
    retain: tuple[Path, ...] = ()
    method: str
    from_scratch: bool = False
    """With --method vanilla: begin not with the weights of --model, but with new ones (of --seed) for its \
network, and learn --retain from nothing: what unlearning is compared with. It takes as many --steps as \
training did."""
    output: Path
    """Folder of the run: model/ (for DDPMPipeline.from_pretrained), run.json (manifest), metrics.jsonl, \
private/ (seed, and until the end checkpoints and caches, mode 0600)."""
    allow_overlap: bool = False
    """Accept forget images that are also among the images to keep; otherwise an error names them."""
    drop_overlap: bool = False
    """Leave the forget images out of the images to keep: --retain may then be the whole training set."""
    drop_within: Annotated[str | None, unset("warn of them", "auto|RADIUS|off")] = None
    """Leave near copies of the forget images out too, and equal ones: JPEGs of them, resized, turned or \
mirrored ones (auto), or all that are, in one of the 8 orientations, within a radius: L2 over all pixels, in \
grey levels 0..255. off: do not look for any, which takes long for many forget images."""
    report_images: bool = False
    """Write private/reconstructions.png (mode 0600), which shows forget images; without it nothing that is \
written shows or stores one."""
    lineage: LineageFlags = field(default_factory=LineageFlags)
    pictures: PictureFlags = field(default_factory=PictureFlags)
    protocol: ProtocolFlags = field(default_factory=ProtocolFlags)
    hyperparameter: MethodFlags = field(default_factory=MethodFlags)
    timesteps: TimestepFlags = field(default_factory=TimestepFlags)
    frequencies: FrequencyFlags = field(default_factory=FrequencyFlags)
    rules: RuleFlags = field(default_factory=RuleFlags)
    optimizer: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)
    bookkeeping: RunFlags = field(default_factory=RunFlags)

    @classmethod
    def with_methods(cls) -> type[Unlearn]:
        """The command as it is parsed: with the names, flags and needs of the methods that there are now."""
        flags = method_flags()
        forget = f"{FORGET_HELP} {methods_that_do_not_read('forget')}".strip()
        retain = f"{RETAIN_HELP} {methods_that_do_not_read('retain', 'neighbors')}".strip()
        filled_in = [
            ("forget", Annotated[tuple[Path, ...], unset("none", help=forget)], ()),
            ("retain", Annotated[tuple[Path, ...], unset("none", help=retain)], ()),
            ("method", Annotated[method_choices(), arg(help=METHOD_HELP)]),
            ("hyperparameter", flags, field(default_factory=flags)),
        ]
        made = make_dataclass(cls.__name__, filled_in, bases=(cls,), kw_only=True)
        made.__doc__ = cls.__doc__.replace("METHODS", methods_in_a_line_each())
        return made

    def run(self) -> int:
        from .launched import launched
        from .options import check_not_inside, check_not_private, check_outside
        from .told_as_flags import told_as_flags

        check_outside(self.output, forget=self.forget, retain=self.retain)
        check_not_private(self.output)
        self.bookkeeping.check()
        check_not_inside(self.output, forget=self.forget, retain=self.retain)
        check_not_inside(self.output / "model", model=(self.model,))
        if self.output.resolve() == self.model.resolve():
            raise ValueError(f"--output: expected another folder than that of --model, got {self.output}")
        work = "fastunlearn unlearn"
        asked = self.bookkeeping.device
        with told_as_flags(), launched(asked) as (processes, device), processes.alone_in(self.output, work):
            self.execution = self.execution.as_launched()
            self._run(processes, device)
        return 0

    def _run(self, processes: Processes, device: torch.device) -> None:
        if processes.by_first(self._is_finished):
            return
        from ..engine.checks import check_stores
        from ..models import check_replaceable, fresh_network
        from ..objective.schedule import NoiseSchedule
        from .options import prepare_host

        dropping = Dropping.from_flags(self.drop_overlap, self.drop_within)
        self.rules.check(self.forget, self.retain)
        self.protocol.check(self)
        if self.from_scratch:
            self._check_from_scratch()
        method = self.hyperparameter.build(self.method)
        self.rules.check_beside(method)
        _check_conditions(method)
        self.optimizer.check()
        check_replaceable(self.output / "model")
        past = Past(self.lineage, self.model, self.output, forgets=bool(self.forget))
        processes.by_first(past.open)
        self._check_unoccupied()
        prepare_host(device)
        seed = processes.by_first(self._seed)
        model, scheduler = self._network(self.model, device)
        if self.from_scratch:
            model = self._in_layout(fresh_network(model, seed), device)
        schedule = NoiseSchedule.from_diffusers(scheduler)
        chosen = self._selection(method, schedule, model)
        images: dict[str, Any] = {}  # what was read, for run.json
        forget, retain = self._load(method, model, images)
        dropping.check_sets(forget, retain)
        among, known = processes.by_first(lambda: past.rows_to_keep(retain, images))
        kept = Kept(among, {})
        if forget is not None and retain is not None:
            overlap = {"among": among, "allow_overlap": self.allow_overlap}
            kept = processes.by_first(lambda: rows_to_keep(forget, retain, dropping, **overlap))
        retain = kept.of(retain)
        remedy = "--drop_overlap leaves them out of --retain, --allow_overlap keeps them there"
        check_stores(method, forget, retain, allow_overlap=self.allow_overlap, remedy=remedy)
        record = {"base_model": str(self.model.absolute()), "images": images}
        record |= {"forget_in_retain": kept.counts, "lineage": known}
        if self.from_scratch:
            record["from_scratch"] = True
        paths = [str(path.absolute()) for path in self.forget]
        private = {"forget": paths, "images": images, "forget_in_retain": kept.record}
        sets = forget, retain, seed, record, private, past
        work = Work(processes, device, method, scheduler, schedule, chosen, *sets)
        if self.protocol.protocol == "together":
            self._run_together(work, model)
        else:
            self._run_each(work)

    def _is_finished(self) -> bool:
        """Whether there is nothing left to do in --output, which is said then.

        Raises:
            ValueError: naming the flag: what is finished there was asked for anew, or with another length.
        """
        from ..runs import protocols, resume
        from ..runs.run_record import remove_caches
        from .options import called

        asked = self.bookkeeping.resume_from_checkpoint, self.output, self.optimizer.max_train_steps
        together = self.protocol.protocol == "together"
        is_finished = resume.is_finished if together else protocols.is_finished
        with called(output_dir="output", num_steps="max_train_steps"):
            finished = is_finished(*asked)
        if finished:
            what = "run" if together else "protocol"
            for folder in [self.output] if together else protocols.folders(self.output):
                resume.tidy(folder)
                remove_caches(folder)
            print(f"{self.output}: the {what} {resume.NOTHING_LEFT}")
        return finished

    def _seed(self) -> int:
        """--seed, else that of the run to go on with, else one that nobody knows."""
        from ..runs import protocols, resume
        from ..runs.private import new_seed

        flags = self.bookkeeping
        if flags.seed is not None:
            return flags.seed
        room = resume if self.protocol.protocol == "together" else protocols
        kept = room.kept_seed(flags.resume_from_checkpoint, self.output)
        return new_seed(of_torch=self.from_scratch) if kept is None else kept

    def _check_from_scratch(self) -> None:
        """Whether the other flags have a meaning for a network without a past.

        Raises:
            ValueError: naming the one that has none.
        """
        protocol = self.protocol.protocol
        if self.method != "vanilla":
            expected = "expected --method vanilla (new weights know nothing to forget)"
            raise ValueError(f"--from_scratch: {expected}, got {self.method}")
        if protocol != "together":
            raise ValueError(f"--from_scratch: expected --protocol together beside it, got {protocol}")
        for name in ("anchor", "mask_fraction"):
            if getattr(self.rules, name) is not None:
                expected = f"expected no --{name}, which holds weights where they are"
                raise ValueError(f"--from_scratch: {expected}, got --{name} {getattr(self.rules, name)}")
        if "max_train_steps" not in given_flags(self.optimizer):
            expected = "expected --max_train_steps beside it (the papers' MNIST T-Shirt: 118500)"
            raise ValueError(
                f"--from_scratch: {expected}, got the {self.optimizer.max_train_steps} of unlearning"
            )

    def _check_unoccupied(self) -> None:
        """Whether a run may begin in --output: what is said of it when it begins is known before its work.

        Raises:
            ValueError: naming the flag.
        """
        from ..runs.private import check_private
        from ..runs.resume import find_checkpoint
        from ..runs.run_record import METRICS_FILE, RUN_FILE
        from .options import called, check_file

        with called(output_dir="output"):
            check_private(self.output)
        for name in (RUN_FILE, METRICS_FILE):
            check_file("--output", self.output / name)
        resume = self.bookkeeping.resume_from_checkpoint
        # The requests of a protocol have folders of their own. The latest checkpoint is read as a whole to
        # see whether it is damaged, which is done once, when the run begins.
        if self.protocol.protocol == "together" and resume != "latest":
            with called(output_dir="output"):
                find_checkpoint(resume, self.output)

    def _run_together(self, work: Work, model) -> None:
        """One run, of all images to forget."""
        from ..host.precision import tf32
        from ..runs import training
        from ..runs.private import check_private
        from ..runs.run_record import remove_caches

        private = check_private(self.output)
        unlearner = self._unlearner(work, model, work.forget, private, work.seed)
        self._say_selection(work, unlearner)
        with tf32(True if self.execution.allow_tf32 else None):
            training.unlearn(
                unlearner,
                output_dir=self.output,
                record=work.record,
                leave=lambda: self._leave(work, unlearner, work.forget, work.forget, self.output),
                **self._options(work),
            )
        work.processes.by_first(lambda: remove_caches(self.output))

    def _run_each(self, work: Work) -> None:
        """One run a request, and what the networks that they leave know of the images."""
        import torch

        from ..host.precision import tf32
        from ..metrics.deletion import Measures
        from ..runs.private import check_private
        from ..runs.protocols import folders, unlearn_each
        from ..runs.run_record import remove_caches
        from .protocol_flags import show

        def make(request):
            start = self.model if request.start is None else request.start / "model"
            model, _ = self._network(start, work.device)
            private = check_private(request.folder)
            unlearner = self._unlearner(work, model, request.forget, private, request.seed)
            if request.number == 1:
                self._say_selection(work, unlearner)
            return unlearner

        def leave(request, unlearner):
            forgotten = request.forget
            if self.protocol.protocol == "continual":
                forgotten = work.forget.select(torch.arange(request.rows[-1] + 1))
            self._leave(work, unlearner, request.forget, forgotten, request.folder)
            return unlearner.model

        measures = Measures(work.schedule, work.retain, work.scheduler, seed=work.seed)
        with tf32(True if self.execution.allow_tf32 else None):
            content = unlearn_each(
                work.forget,
                make,
                leave,
                protocol=self.protocol.protocol,
                output_dir=self.output,
                measures=measures,
                images_per_request=self.protocol.images_per_request,
                seed=work.seed,
                process_group=work.processes.group,
                record=work.record,
                **self._options(work),
            )
        for folder in folders(self.output):
            work.processes.by_first(lambda folder=folder: remove_caches(folder))
        show(content, self.output)

    def _network(self, folder: Path, device: torch.device):
        """The network and the scheduler in `folder`, ready to be trained."""
        from ..models import load_checkpoint

        model, scheduler = load_checkpoint(folder, device=device)
        return self._in_layout(model, device).train(), scheduler

    def _in_layout(self, model, device: torch.device):
        return model.to(memory_format=self.execution.memory_format(device))

    def _unlearner(self, work: Work, model, forget: ImageStore | None, private: Path, seed: int) -> Unlearner:
        """What takes the steps of one run on `model`, with everything else new."""
        import torch

        from ..engine.unlearner import Unlearner
        from ..models.frozen import frozen_copy

        optimization, execution = self.optimizer, self.execution
        method, processes = work.method, work.processes
        processes.by_first(lambda: work.past.keep_key(private))
        reference = None
        if "reference" in method.needs:  # the checkpoint as it is, also where a run is resumed
            reference = frozen_copy(model)
        autocast_dtype = execution.autocast_dtype(work.device)
        optimizer, lr_scheduler, ema = optimization.build(model)
        rules = RuleWork(
            self.rules,
            model,
            work.schedule,
            forget,
            work.retain,
            time_window=work.chosen.time_window,
            batch_size=optimization.train_batch_size,
            micro_batch_size=optimization.micro_batch_size,
            learning_rate=optimization.learning_rate,
            autocast_dtype=autocast_dtype,
            seed=seed,
            folder=private,
            processes=processes,
        ).rules()
        neighbors = None
        if "neighbors" in method.needs:
            neighbors = processes.by_first(lambda: _neighbors(forget, work.retain, method, private))
        grad_scaler = None
        if autocast_dtype == torch.float16:
            grad_scaler = torch.amp.GradScaler(work.device.type, init_scale=2.0**10)
        return Unlearner(
            model,
            optimizer,
            work.schedule,
            method,
            forget=forget,
            retain=work.retain,
            neighbors=neighbors,
            reference_model=reference,
            rules=rules,
            batch_size=optimization.train_batch_size,
            micro_batch_size=optimization.micro_batch_size,
            total_steps=optimization.max_train_steps,
            seed=seed,
            autocast_dtype=autocast_dtype,
            grad_scaler=grad_scaler,
            max_grad_norm=optimization.max_grad_norm,
            ema=ema,
            lr_scheduler=lr_scheduler,
            allow_overlap=self.allow_overlap,
            compile=execution.compile_argument,
            process_group=processes.group,
            warn_of_near_copies=False,  # said by `rows_to_keep`, of all orientations
            **vars(work.chosen),
        )

    def _say_selection(self, work: Work, unlearner: Unlearner) -> None:
        from ..objective.selection import Selection
        from ..runs.selections import in_words

        if work.chosen != Selection():
            for name, words in in_words(unlearner).items():
                print(f"{name}: {words}")

    def _options(self, work: Work) -> dict[str, Any]:
        """What every run is told by the flags."""
        flags = self.bookkeeping
        return {
            "num_steps": self.optimizer.max_train_steps,
            "checkpointing_steps": flags.checkpointing_steps,
            "checkpoints_total_limit": flags.checkpoints_total_limit,
            "resume_from_checkpoint": flags.resume_from_checkpoint,
            "report_to": flags.report_to,
            "logging_steps": flags.logging_steps,
            "max_skipped_steps": flags.max_skipped_steps,
            "max_skipped_share": flags.max_skipped_share,
            "private": work.private,
            "keep_checkpoints": flags.keep_checkpoints,
            "max_time": flags.max_time,
            "identity": {"scheduler": _scheduler_identity(work.scheduler)},
        }

    def _selection(self, method: Method, schedule: NoiseSchedule, model) -> Selection:
        from .options import model_shape

        _, height, width = model_shape(model)
        return selection(
            self.timesteps,
            self.frequencies,
            self.method,
            method,
            schedule,
            (height, width),
            self.optimizer.max_train_steps,
        )

    def _leave(
        self,
        work: Work,
        unlearner: Unlearner,
        forget: ImageStore | None,
        forgotten: ImageStore | None,
        output: Path,
    ) -> dict[str, Any]:
        """Writes the network that a run in `output` leaves, and returns what run.json says of it.

        Args:
            forget: what this run was asked to forget.
            forgotten: that, and what the runs of this command were asked to that it began with.
        """
        from ..models import save_checkpoint
        from ..runs.run_health import WeightsNotFinite

        model, scheduler = unlearner.model, work.scheduler
        if unlearner.ema is not None:
            unlearner.ema.copy_to(model.parameters())
        model.eval()
        if not _answers(model, len(scheduler)):
            text = "expected a network that answers with finite numbers after its last step, got NaN or Inf"
            raise WeightsNotFinite(
                f"{output}: {text}; no model is written. A lower learning rate usually helps."
            )
        files = work.past.files(forgotten, work.record["images"])
        save_checkpoint(output / "model", model, scheduler, files=files)
        if self.report_images and forget is not None:
            self._draw_reconstructions(model, scheduler, forget, output)
        print(f"unlearned model: {output / 'model'}")
        return {"model": "model"}

    def _load(self, method, model, images: dict[str, Any]) -> tuple[ImageStore | None, ImageStore | None]:
        """Forget and retain set; what the method does not read may be left out."""
        from .options import load_for

        for name, paths, reads in (
            ("forget", self.forget, {"forget"}),
            ("retain", self.retain, {"retain", "neighbors"}),
        ):
            if not paths and reads & method.needs:
                raise ValueError(
                    f"--{name}: expected at least one path with --method {self.method}, got none"
                )
        sets = (("forget", self.forget), ("retain", self.retain))
        forget, retain = (
            load_for(model, name, paths, self.pictures, images) if paths else None for name, paths in sets
        )
        return forget, retain

    def _draw_reconstructions(self, model, scheduler, forget: ImageStore, output: Path) -> None:
        """Each forget image, and what the two models make of it from the same noise."""
        import torch

        from ..host.atomic import atomic_file
        from ..models import load_checkpoint
        from ..models.sampling import inject_and_denoise
        from ..report.pictures import side_by_side
        from ..runs.private import private_folder

        images = forget.rows(torch.arange(min(REPORTED_IMAGES, len(forget))))
        before, _ = load_checkpoint(self.model, device=model.device)
        timestep = min(REPORTED_TIMESTEP, len(scheduler) - 1)
        halves = []
        for network in (before, model):
            chains = inject_and_denoise(
                network,
                scheduler,
                images,
                timestep,
                chains=REPORTED_CHAINS,
                num_inference_steps=min(REPORTED_STEPS, timestep + 1),
            )
            halves.append(
                torch.cat(
                    [images[:, None].cpu(), chains.view(len(images), REPORTED_CHAINS, *images.shape[1:])],
                    dim=1,
                ).flatten(0, 1)
            )
        private = private_folder(output)
        with atomic_file(private / "reconstructions.png", mode=0o600) as file:
            file.write(side_by_side(*halves, columns=1 + REPORTED_CHAINS))
        print(f"forget images and reconstructions, before and after: {private / 'reconstructions.png'}")


def _check_conditions(method: Method) -> None:
    """That the method reads no labels: those of the images are not read.

    Raises:
        ValueError: naming the flag that makes it read them.
    """
    asked = None
    if getattr(method, "within_condition", False):
        asked = "within_condition", True
    if getattr(method, "target", None) == "other_condition":
        asked = "target", "other_condition"
    if asked is not None:
        name, value = asked
        expected = "expected another value (it compares labels, which no command reads: it is for Python)"
        raise ValueError(f"--{name}: {expected}, got {value}")


def _answers(model, num_timesteps: int) -> bool:
    """Whether the network's answers are finite: of what the last step did to it, no later step can tell."""
    import torch

    from .options import model_shape

    noise = torch.randn(1, *model_shape(model), generator=torch.Generator().manual_seed(0)).to(model.device)
    ends = torch.tensor([0, num_timesteps - 1], device=model.device)
    with torch.no_grad():
        return bool(model(noise.expand(2, -1, -1, -1), ends).sample.isfinite().all())


def _scheduler_identity(scheduler) -> dict:
    """Class and configuration of a diffusers scheduler, which the unlearned model is saved with."""
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"name": type(scheduler).__name__} | settings


def _neighbors(forget: ImageStore, retain: ImageStore, method, cache_dir: Path):
    from ..neighbors.nearest import nearest_neighbors

    return nearest_neighbors(forget, retain, method.k, cache_dir=cache_dir, show_progress=True)
