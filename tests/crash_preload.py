"""What the fork server of `crash.py` imports before it forks."""

import importlib.util

import torch

import fastunlearn.engine.unlearner
import fastunlearn.runs.pretraining
import fastunlearn.runs.training

torch.set_num_threads(1)
LOADED = [fastunlearn]

# Tests that need diffusers are skipped without it, and their children are not started.
if importlib.util.find_spec("diffusers") is not None:
    import diffusers.optimization
    import diffusers.training_utils
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # they are imported on access

    LOADED += [diffusers, DDPMPipeline, DDPMScheduler, UNet2DModel]
