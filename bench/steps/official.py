"""The real repositories' step, from checkouts that the user names; none of their code is here.

ReTrack's `train_step` runs as it is, on loaders like those of `papers_way`. Of SISS' repository the loss
module runs, in this project's rendering of the loop around it: the loop itself is part of a function that
also samples, logs to wandb and saves.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from . import papers_way
from .job import Job
from .networks import SISS_LAMBD, Step

# Imported by ReTrack's modules, not used by a step: empty stand-ins where they are not installed.
_STAND_INS = {
    "hydra": {},
    "hydra.utils": {"instantiate": None},
    "omegaconf": {"OmegaConf": object, "DictConfig": dict},
    "torchvision": {},
    "torchvision.io": {"read_image": None},
}


def retrack(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, path: str
) -> Step:
    """Its own draws and loaders' batches; it clips to 1.0 whatever `max_grad_norm` is.

    Raises:
        ImportError, FileNotFoundError: the checkout cannot be imported.
    """
    methods, train = _import_retrack(path)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from diffusers.optimization import get_scheduler

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accumulation = job.batch // (job.network.papers_micro or job.batch)
    accelerator = Accelerator(cpu=job.device.type == "cpu", gradient_accumulation_steps=accumulation)
    model, optimizer, rates = accelerator.prepare(
        model, optimizer, get_scheduler("constant", optimizer=optimizer)
    )
    parameters = {"lambda": job.instance.lambd} if job.method in ("retrack", "siss") else {}
    loss = methods.create_loss(job.method, parameters, job.scheduler, str(job.device))
    batches = papers_way.loaders(job)
    iterators = {
        theirs: batches[ours]
        for theirs, ours in (("remain", "retain"), ("deletion", "forget"), ("knn", "knn"))
        if loss.need_dataset[theirs]
    }
    algorithm = SimpleNamespace(
        siss=SimpleNamespace(rescale_factor=getattr(job.instance, "scaling_norm", None)),
        erasediff=SimpleNamespace(eta=getattr(job.instance, "eta", None)),
    )
    gradients = {"main": {}, "correction": {}} if job.timed.two_gradients else None
    runtime = train.ModelRuntime(
        model=model,
        optimizer=optimizer,
        lr_scheduler=rates,
        noise_scheduler=job.scheduler,
        weight_dtype=torch.float32,
        model_params=job.conditioning(job.network.papers_micro or job.batch),
        dataset_params={},
        evaluator_params={},
    )
    config = SimpleNamespace(device=str(job.device), algorithm=algorithm)

    def step(draw=None) -> None:
        for _ in range(accumulation):
            train.train_step(
                cfg=config,
                accelerator=accelerator,
                model_runtime=runtime,
                dataset_iterators=iterators,
                loss_fn=loss,
                gradient_state=gradients,
            )

    return step


def siss(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, path: str
) -> Step:
    """Raises:
    FileNotFoundError, ImportError: the checkout has no `losses/ddpm_deletion_loss.py` that can be imported.
    """
    file = Path(path) / "losses" / "ddpm_deletion_loss.py"
    spec = importlib.util.spec_from_file_location("siss_ddpm_deletion_loss", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    alphas = job.alphas_cumprod.to(job.device)
    loss = module.DDPMDeletionLoss(gamma=alphas.sqrt(), sigma=(1 - alphas).sqrt())
    name = {
        "siss": "importance_sampling_with_mixture",
        "siss no_is": "double_forward_with_neg_del",
        "siss bernoulli": "subscore_bernoulli",
    }[job.method]
    more = {} if job.method == "siss no_is" else {"lambd": SISS_LAMBD}

    def terms(images, draw):
        timesteps, noise = draw.forget_timesteps, draw.forget_noise
        samples = [
            {"og_latents": clean, "noisy_latents": job.scheduler.add_noise(clean, noise, timesteps)}
            for clean in (images.retain, images.forget)
        ]
        _, loss_x, loss_a, weight_x, weight_a, *weighted = getattr(loss, name)(
            model, timesteps, noise, job.conditioning(len(noise)), *samples, **more
        )
        papers_way.log_statistics(
            *(values for values in (loss_x, loss_a, weight_x, weight_a) if values is not None)
        )
        return tuple(term.sum() / len(noise) for term in weighted)

    return papers_way.siss_repository(job, model, optimizer, max_grad_norm, terms)


def _import_retrack(path: str) -> tuple[ModuleType, ModuleType]:
    if not (Path(path) / "retrack" / "train.py").is_file():
        raise FileNotFoundError(f"--official-retrack: expected a checkout with retrack/train.py, got {path}")
    # before anything has a stand-in
    for name in (
        "diffusers.optimization",
        "accelerate",
        "datasets",
        "transformers.utils",
        "sklearn.neighbors",
    ):
        importlib.import_module(name)
    missing = []
    for name, attributes in _STAND_INS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(attributes)
            missing.append(name)
            if "." in name:
                setattr(sys.modules[name.partition(".")[0]], name.partition(".")[2], sys.modules[name])
    sys.path.insert(0, path)
    try:
        return importlib.import_module("retrack.methods"), importlib.import_module("retrack.train")
    finally:
        sys.path.remove(path)
        for name in missing:
            del sys.modules[name]
