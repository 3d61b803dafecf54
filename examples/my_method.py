"""A forget objective of your own, in one file; docs/adding_a_method.md explains it line by line.

python examples/my_method.py unlearn --method blank --model DIR --forget DIR --retain DIR --output DIR
"""

from dataclasses import dataclass

import torch

from fastunlearn import functional as F
from fastunlearn.cli import main
from fastunlearn.methods import FORGET, RETAIN, Method, Pass, Term, register


@register(help="makes the network see a plain grey picture in every noised forget image.")
@dataclass(frozen=True)
class Blank(Method):
    """`lambd E min(1, 1 / rho_t^2) ||eps_theta(a_t) - (a_t - alpha_t grey) / sigma_t||^2`, beside vanilla.

    Args:
        grey: the picture's value, in [-1, 1].
        lambd: weight of the forget term in [0, 1].
    """

    grey: float = 0.0
    lambd: float = 0.1
    name = "blank"
    needs = frozenset({"forget", "retain"})

    def draws(self):
        return FORGET | RETAIN

    def compose(self, batch, draws, schedule):
        a, x, t = batch.forget, batch.retain, draws.forget_timesteps
        blank = torch.full((len(a), 1, *a.shape[1:]), self.grey, dtype=a.dtype, device=a.device)
        forget = F.redirect(a, blank, draws.forget_noise, t, schedule)
        retain = F.noised(x, draws.retain_noise, draws.retain_timesteps, schedule)
        # rho_t reaches 100: without weights the smallest timesteps would drown all others.
        rho = schedule.coefficients(t)[:, 4]
        unlearn = Term("forget", forget.target, 1 / rho.square().clamp(min=1), scale=self.lambd)
        keep = Term("retain", retain.target, scale=1 - self.lambd)
        return [
            Pass(forget.x_t, t, (unlearn,), batch.forget_kwargs),
            Pass(retain.x_t, draws.retain_timesteps, (keep,), batch.retain_kwargs),
        ]


if __name__ == "__main__":
    raise SystemExit(main())
