"""What the fork server of `crash.py` imports before it forks."""

import diffusers.optimization
import diffusers.training_utils
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import fastunlearn.pretraining
import fastunlearn.training
import fastunlearn.unlearner

torch.set_num_threads(1)
LOADED = (diffusers.optimization, diffusers.training_utils, DDPMPipeline, DDPMScheduler, UNet2DModel, fastunlearn)  # diffusers imports on access
