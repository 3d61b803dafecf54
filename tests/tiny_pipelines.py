"""Tiny pipelines from text to image: diffusers' own where transformers is installed, and a stand-in.

The networks and schedulers are diffusers' in either case, with random weights, in float64.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

WIDTH = 16  # of the embedding of a token
PIXELS = 8  # of a side of the latents
KINDS = ("stand-in SD", "stand-in SD3", "Stable Diffusion", "SD3")


def unet(cls=diffusers.UNet2DConditionModel):
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    sizes = {"sample_size": PIXELS, "cross_attention_dim": WIDTH, "attention_head_dim": 4}
    return cls(in_channels=4, out_channels=4, **sizes, **blocks, **widths)


def transformer(cls=diffusers.SD3Transformer2DModel):
    # SD3 joins the embeddings of its two CLIP encoders.
    texts = {"joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH}
    sizes = {"sample_size": PIXELS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    return cls(**sizes, **heads, **texts, pos_embed_max_size=PIXELS)


def scheduler(kind: str):
    if "SD3" in kind:
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**levels, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def pipeline(kind: str, folder: Path, *, planted=None):
    """A pipeline of one of the KINDS.

    Args:
        folder: where the files of its tokenizer are written.
        planted: the class to put before that of the network.
    """
    flow = "SD3" in kind
    make, cls = (
        (transformer, diffusers.SD3Transformer2DModel) if flow else (unet, diffusers.UNet2DConditionModel)
    )
    torch.manual_seed(0)
    network = make(cls if planted is None else type("Planted", (planted, cls), {})).eval()
    if kind.startswith("stand-in"):
        made = StandIn(network, scheduler(kind), "transformer" if flow else "unet")
    else:
        pytest.importorskip("transformers")
        made = _diffusers_pipeline(flow, network, scheduler(kind), folder)
    for part in vars(made).values():
        if isinstance(part, nn.Module):
            part.double()
    if hasattr(made, "set_progress_bar_config"):
        made.set_progress_bar_config(disable=True)
    return made


class StandIn:
    """What a pipeline of text to image does, without transformers: a letter is a token."""

    def __init__(self, network: nn.Module, scheduler, name: str):
        self.scheduler, self.text_encoder = scheduler, nn.Embedding(256, 2 * WIDTH)
        setattr(self, name, network)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        letters = [[ord(letter) for letter in text.ljust(12)[:12]] for text in texts]
        embedding = self.text_encoder(torch.tensor(letters))
        if hasattr(self, "unet"):
            return {"encoder_hidden_states": embedding[..., :WIDTH]}
        return {"encoder_hidden_states": embedding, "pooled_projections": embedding.mean(1)}

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        negative_prompt: list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end=None,
    ) -> Tensor:
        network = self.unet if hasattr(self, "unet") else self.transformer
        texts = self.encode([*(negative_prompt or [""] * len(prompt)), *prompt])
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (1, 4, PIXELS, PIXELS)
        latents = torch.cat([torch.randn(shape, generator=one, dtype=torch.float64) for one in generator])
        for step, timestep in enumerate(self.scheduler.timesteps):
            if self._interrupt:
                continue
            rows = {"timestep": timestep.expand(2 * len(prompt)), **texts}
            null, text = network(torch.cat([latents] * 2), return_dict=False, **rows)[0].chunk(2)
            latents = self.scheduler.step(
                null + guidance_scale * (text - null), timestep, latents
            ).prev_sample
            callback_on_step_end(self, step, timestep, {"latents": latents})
        return latents


def _diffusers_pipeline(flow: bool, network: nn.Module, scheduler, folder: Path):
    import transformers

    sizes = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    vae = diffusers.AutoencoderKL(**sizes, **blocks, shift_factor=0.0)
    tokenizer = _tokenizer(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts = {"scheduler": scheduler, "vae": vae.eval(), "tokenizer": tokenizer}
    if not flow:
        encoder = transformers.CLIPTextModel(config).eval()
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(unet=network, text_encoder=encoder, **parts, **unused)
    encoders = [transformers.CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        **parts,
    )


def _tokenizer(folder: Path):
    """CLIP's tokenizer with letters as its only tokens."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
