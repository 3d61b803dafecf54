"""Which methods are timed: all that there are, their variants (`fastunlearn.methods.registry`), and what a
step has beside its method: inner steps, and rules on parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from fastunlearn.methods.registry import Record, Setting, methods

from .networks import Network

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Timed(NamedTuple):
    """A method, or a variant of it."""

    record: Record
    variant: str  # "": the plain one
    changes: Mapping[str, Any] = NOTHING  # further hyperparameters
    rule: str = ""  # on parameters, of `rules.RULES`; "": none

    @property
    def two_gradients(self) -> bool:
        """Whether a step keeps the forget gradient apart."""
        method = replace(self.record.example, **self.record.variants[self.variant])
        return len(method.combine.gradients) == 2

    @property
    def network(self) -> str:
        """The name of the network that a CPU times it on by default."""
        plain = not (self.variant or self.changes or self.rule)
        return self.record.timed_on if plain else "small"

    def setting(self, network: Network) -> Setting:
        """As the papers run it on `network`."""
        setting = self.record.setting(network.recipe, lr=network.lr, variant=self.variant)
        return replace(setting, method=replace(setting.method, **self.changes))


# What stands behind the name of a method, and what is changed. Inner steps are no variant of the record: a
# step that has them takes no rules, and cannot be replayed, as tests of all variants expect.
FORMS = {
    "erasediff_bome": {"inner": {"changes": {"inner_steps": 2}}},
    # VDU is NegGrad with an anchor. SalUn's mask stands beside any method.
    "neggrad": {"mask": {"rule": "mask"}, "anchor": {"rule": "anchor"}},
}


def timed() -> dict[str, Timed]:
    """All that is timed, by the name that stands in the tables: `"siss"`, `"siss no_is"`."""
    found = {}
    for name, record in methods().items():
        for variant in record.variants:
            found[f"{name} {variant}".strip()] = Timed(record, variant)
        for form, changed in FORMS.get(name, {}).items():
            found[f"{name} {form}"] = Timed(record, "", **changed)
    return found
