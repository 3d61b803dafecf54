"""Runs of the papers' official code, unmodified, on given inputs; see `make_golden.py`.

The official modules come from checkouts and are told their inputs from outside: what they draw is what is
stored. Also replaced are data sets, the tracker (it collects the reported numbers), `Accelerator` (a subclass
that notes losses and gradients), and packages that a train step does not need.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import io
import sys
import types
from pathlib import Path
from unittest import mock

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from golden_cases import Setting
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "tests" / "golden" / "data"
INIT = "unet_init_public.safetensors"
MODEL = {
    "sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 32],
    "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
OPTIMIZER = {"lr": 5e-5, "betas": [0.95, 0.999], "weight_decay": 1e-6, "eps": 1e-8}
UNUSED = (
    "hydra", "hydra.utils", "omegaconf", "torchvision", "torchvision.io", "torchvision.utils", "transformers",
    "transformers.utils", "pytz", "wandb", "matplotlib", "matplotlib.pyplot",
)  # fmt: skip


class Standin:
    """An object with some attributes replaced."""

    def __init__(self, whole: object, **replaced: object):
        self.__dict__.update(replaced, _whole=whole)

    def __getattr__(self, name: str) -> object:
        return getattr(self._whole, name)


class Settings(dict):
    """A dict whose entries are attributes as well, as in a configuration of the official code."""

    __getattr__ = dict.__getitem__


def imported(root: Path, *names: str) -> list[types.ModuleType]:
    """Modules of a checkout. Packages that only other parts of it need are empty while they are imported."""
    for needed in ("datasets", "accelerate", "sklearn.neighbors"):
        importlib.import_module(needed)
    for lazy in ("UNet2DModel", "DDPMPipeline", "DDIMPipeline"):  # loaded now, before anything is replaced
        getattr(diffusers, lazy)
    sys.path.insert(0, str(root))
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in UNUSED}):
        modules = [importlib.import_module(name) for name in names]
    sys.path.remove(str(root))
    return modules


class Run:
    """One run in one precision: the network at its start weights, and what the official code did with it."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.model = diffusers.UNet2DModel(**MODEL)
        self.model.load_state_dict(load_file(DATA / "steps" / INIT))
        self.model.to(dtype)
        self.scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(dtype)
        self.start = self.parameters()
        self.series: dict[str, list[float]] = {}
        self.outputs: list[Tensor] = []
        self.losses: list[float] = []
        self.first_gradient: list[Tensor] = []
        self.model.register_forward_hook(self._keep_output)

    def _keep_output(self, model, inputs, output) -> None:
        self.outputs.append((output[0] if isinstance(output, tuple) else output.sample).detach().clone())

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def update(self) -> list[Tensor]:
        return [now - start for now, start in zip(self.parameters(), self.start, strict=True)]

    def note(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.series.setdefault(name, []).append(float(value))

    def optimizer(self, parameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, **OPTIMIZER)

    def accelerator(self, gradient_accumulation_steps: int, **ignored: object) -> Accelerator:
        """A fresh accelerator for this run, on the CPU."""
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        run = self

        class Watched(Accelerator):
            def backward(self, loss, **kwargs):
                run.losses.append(float(loss.detach()))
                super().backward(loss, **kwargs)

            def clip_grad_norm_(self, parameters, *args, **kwargs):
                norm = super().clip_grad_norm_(run.unclipped(), *args, **kwargs)
                run.note(grad_norm_preclip=norm)
                return norm

        return Watched(cpu=True, gradient_accumulation_steps=gradient_accumulation_steps)

    def unclipped(self) -> list[torch.nn.Parameter]:
        parameters = list(self.model.parameters())
        if not self.first_gradient:
            self.first_gradient = [parameter.grad.detach().clone() for parameter in parameters]
        return parameters


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


@contextlib.contextmanager
def precision(dtype: torch.dtype):
    """float64: the default dtype, and what the official code calls `float()`."""
    single = Tensor.float
    if dtype == torch.float64:
        Tensor.float = Tensor.double
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        Tensor.float = single
        torch.set_default_dtype(torch.float32)


def retrack_run(setting: Setting, steps: list[dict[str, Tensor]], modules, dtype: torch.dtype) -> Run:
    """ReTrack's `train_step`, once for each micro-step."""
    methods, train = modules
    run = Run(dtype)
    accelerator = run.accelerator(setting.accumulation)
    model, optimizer, rate = accelerator.prepare(
        run.model, run.optimizer(run.model.parameters()), constant_rate(run.optimizer(run.model.parameters()))
    )
    loss = methods.create_loss(setting.method, setting.params, run.scheduler, "cpu")
    branches = [name for name, needed in loss.need_dataset.items() if needed]
    extra = types.SimpleNamespace(**setting.extra)
    config = types.SimpleNamespace(device="cpu", algorithm=types.SimpleNamespace(siss=extra, erasediff=extra))
    runtime = train.ModelRuntime(model, optimizer, rate, run.scheduler, {}, {}, {}, dtype)
    state = {"main": {}, "correction": {}} if loss.need_rescale else None
    for step in steps:
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in step.items()}
        noises = iter([given[f"noises.{branch}"] for branch in branches])
        timesteps = iter([given[f"timesteps.{branch}"] for branch in branches])
        batches = {branch: given[f"images.{branch}"] for branch in branches}
        if "knn" in batches:
            batches["knn"] = (batches["knn"], given["knn_neighbors"])
        found: dict[str, float] = {}

        def finished(found=found) -> None:  # the last call of the rescaling: its results are still there
            there = sys._getframe(1).f_locals
            for name in ("correction_norm", "scaling_factor", "inner_product"):
                if name in there:
                    found[name] = float(there[name])

        train.torch = Standin(
            torch,
            randn_like=lambda like, drawn=noises: next(drawn),
            randint=lambda *args, drawn=timesteps, **kwargs: next(drawn),
            cuda=Standin(torch.cuda, empty_cache=finished),
        )
        methods.torch = Standin(
            torch,
            rand=lambda *args, given=given, **kwargs: given["siss_uniform"],
            rand_like=lambda like, given=given: given["erasediff_uniform"],
        )
        train.train_step(
            config, accelerator, runtime, {k: iter([v]) for k, v in batches.items()}, loss, state
        )
        n = setting.accumulation
        names = ("loss_main", "loss_correction") if loss.need_rescale else ("loss",)
        run.note(**dict(zip(names, run.losses, strict=True)), **found)
        run.note(param_norm=norm(run.parameters()), delta_norm=norm(run.update()))
        run.losses.clear()
        assert len(run.series.get("grad_norm_preclip", [])) == len(run.series["param_norm"]) // n
    return run


def constant_rate(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def siss_run(setting: Setting, steps: list[dict[str, Tensor]], modules, dtype: torch.dtype) -> Run:
    """SISS' own training loop, from its first line to its last."""
    loss_module, loop = modules
    run = Run(dtype)
    given = [
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in step.items()}
        for step in steps
    ]
    noises, timesteps = (iter([step[key] for step in given]) for key in ("noise", "timesteps"))
    uniforms, targets = (
        iter([step[key] for step in given if key in step]) for key in ("mask_uniform", "erasediff_uniform")
    )

    def report(values: dict, step: int) -> None:
        if "gradient/scaling_factor" in values:
            run.note(
                main_norm=values["gradient/norm_loss_x"],
                correction_norm=values["gradient/norm_loss_a"],
                scaling_factor=values["gradient/scaling_factor"],
            )

    tracker = types.ModuleType("wandb")
    tracker.__spec__, tracker.log = importlib.machinery.ModuleSpec("wandb", None), report
    made = types.SimpleNamespace
    scheduler = lambda: run.scheduler  # noqa: E731
    scheduler._type, scheduler.prediction_type = "initialize", "epsilon"
    config = made(
        output_dir="", project_name="", logging=made(logging_dir="", logger="wandb"), mixed_precision="no",
        gradient_accumulation_steps=setting.accumulation, random_seed=None, ema=made(use_ema=False),
        checkpoint_path="", subfolders=made(unet_ema="", unet=""), unet=made(_target_=""),
        scheduler=scheduler,
        optimizer=run.optimizer, transform=lambda: mock.MagicMock(), train_batch_size=setting.batch,
        dataset_all=lambda transform: torch.cat([step["images.remain"] for step in steps]),
        dataset_deletion=lambda transform: torch.cat([step["images.deletion"] for step in steps]),
        dataloader_num_workers=0, lr_scheduler="constant", warmup_steps=0, eval_images=0, eval_batch_size=0,
        training_steps=len(steps) // setting.accumulation, sampling_steps=None, checkpointing_steps=None,
        metrics=made(
            membership_loss=None, classifier=made(tshirt_path=""), likelihood=None, classifier_cfg=None,
            inception_score=None, fraction_deletion=None,
        ),
        deletion=made(
            loss_fn=setting.method, loss_params=Settings(setting.params), timestep_del_window=None,
            superfactor_decay=None,
            eta=setting.extra.get("eta"), scaling_norm=setting.extra.get("scaling_norm"),
        ),
    )  # fmt: skip
    loop.hydra = made(
        utils=made(
            get_class=lambda name: made(from_pretrained=lambda *args, **kwargs: run.model),
            instantiate=lambda what, *args, **kwargs: what(*args, **kwargs),
        )
    )
    loop.Image, loop.Accelerator, loop.is_wandb_available = mock.MagicMock(), run.accelerator, lambda: True
    loop.InfiniteSampler, loop.tqdm = torch.utils.data.SequentialSampler, mock.MagicMock()
    loop.torch = Standin(
        torch,
        float32=dtype,  # what the loop casts images and noise to
        randn=lambda *args, **kwargs: next(noises),
        randint=lambda *args, **kwargs: next(timesteps),
    )
    loss_module.torch = Standin(
        torch, rand=lambda *args, **kwargs: next(uniforms), rand_like=lambda like: next(targets)
    )
    with mock.patch.dict(sys.modules, wandb=tracker), contextlib.redirect_stdout(io.StringIO()):
        loop.DeleteTShirt(config).run()
    one_term = len(run.losses) == len(steps)
    for name, at in (("loss", 0),) if one_term else (("loss_x", 0), ("loss_a", 1)):
        run.series[name] = run.losses[at :: 1 if one_term else 2]
    return run
