"""Which methods are timed: all that there are, and their variants (`fastunlearn.methods.registry`)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fastunlearn.methods.registry import Record, Setting, methods

from .networks import Network


class Timed(NamedTuple):
    """A method, or a variant of it."""

    record: Record
    variant: str  # "": the plain one

    @property
    def two_gradients(self) -> bool:
        """Whether a step keeps the forget gradient apart."""
        method = replace(self.record.example, **self.record.variants[self.variant])
        return len(method.combine.gradients) == 2

    @property
    def network(self) -> str:
        """The name of the network that a CPU times it on by default."""
        return "small" if self.variant else self.record.timed_on

    def setting(self, network: Network) -> Setting:
        """As the papers run it on `network`."""
        return self.record.setting(network.recipe, lr=network.lr, variant=self.variant)


def timed() -> dict[str, Timed]:
    """All that is timed, by the name that stands in the tables: `"siss"`, `"siss no_is"`."""
    return {
        f"{name} {variant}".strip(): Timed(record, variant)
        for name, record in methods().items()
        for variant in record.variants
    }
