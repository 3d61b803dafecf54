"""Cases where a CPU stands in for a GPU: replay (a tape for a graph), and steps compiled for torch's eager
backend.
"""

from __future__ import annotations

from functools import partial

import torch

from . import steps, unlearners
from .registry import add
from .unlearners import Setting

SETTINGS = {
    "bytes": Setting(),
    "floats": Setting(rows="floats"),
    "posterior": Setting(rows="posterior"),
    "micro batches of 4": Setting({"micro_batch_size": 4}),
    "average and scheduler": Setting(average=True, decaying=True),
    "bfloat16": Setting({"autocast_dtype": torch.bfloat16}),
    "sgd": Setting(optimizer="sgd_fused"),
    "two groups, no clipping": Setting({"max_grad_norm": None}, optimizer="groups"),
    "given rows": Setting({"replay": None}, given_rows=True),
    "eager": Setting(environment={"FASTUNLEARN_BACKEND": "eager"}),
}


def take_compiled(kind: str, compile: bool | str, place=None):
    torch.compiler.reset()
    setting = steps.Setting({"compile": compile, "micro_batch_size": 4})
    return steps.take_steps(steps.KINDS[kind], setting)


def take_compiled_unlearner(method: str, place=None, **options):
    torch.compiler.reset()
    return unlearners.take_steps(unlearners.METHODS[method], Setting(options | {"compile": True}), count=6)


QUICK = ("bytes", "micro batches of 4", "average and scheduler")

for method_name, method in unlearners.METHODS.items():
    for setting_name, setting in SETTINGS.items():
        options = {} if "replay" in setting.options else {"replay": True}
        run = partial(unlearners.take_steps, method, setting, count=6, **options)
        add("replay", f"{method_name}, {setting_name}", run, mode="rehearsal", quick=setting_name in QUICK)
for kind in ("retrack", "siss", "erasediff"):
    add("compiled", f"{kind} step", partial(take_compiled, kind, True), mode="rehearsal", quick=False)
for method_name in ("retrack", "siss"):
    for title, replay in (("", False), (", replayed", True)):
        run = partial(take_compiled_unlearner, method_name, replay=replay)
        add("compiled", f"Unlearner, {method_name}{title}", run, mode="rehearsal", quick=False)
