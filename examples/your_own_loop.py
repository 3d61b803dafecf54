"""Drop-in: unlearning inside a training loop that you already have, on the model and data of the demo.

Runs on a CPU in about a minute.

    python examples/your_own_loop.py
"""

import torch
from diffusers import DDPMPipeline

from fastunlearn import NoiseSchedule, assets, nearest_neighbors, retrack_step
from fastunlearn.recipes.mnist_tshirt import load_demo

pipeline = DDPMPipeline.from_pretrained(assets.path("mnist-tshirt-small"))
model, schedule = pipeline.unet, NoiseSchedule.from_diffusers(pipeline.scheduler)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=True)

forget, retain = load_demo()  # your own: ImageStore(images [N, C, H, W], uint8 or float in [-1, 1])
index, _ = nearest_neighbors(forget, retain, k=10)  # [N, 10]

for step in range(50):
    forget_rows, retain_rows = torch.randint(len(forget), (32,)), torch.randint(len(retain), (32,))
    a, x = forget.rows(forget_rows), retain.rows(retain_rows)  # [32, 1, 28, 28] in [-1, 1]
    neighbors = retain.rows(index[forget_rows].flatten()).view(32, 10, *a.shape[1:])  # [32, 10, 1, 28, 28]
    out = retrack_step(model, optimizer, schedule, a, neighbors, x, lambd=0.005)
    if step % 10 == 9:
        losses = f"{out.loss:.1f} (forget {out.forget_loss:.1f}, retain {out.retain_loss:.1f})"
        print(f"step {step + 1}: loss {losses}, gradient norm {out.grad_norm:.1f}")
