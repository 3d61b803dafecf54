"""Rules on parameters, which belong to the step and not to an objective: masks, anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ParameterRule:
    """What a step does to gradients and weights beside its objective; a subclass overrides some of it.

    Every method gets the trained parameters in the optimizer's order, works in place, on the device, and
    waits for nothing: under replay it runs once, when the step is captured.
    """

    @property
    def idle(self) -> bool:
        """Whether it changes nothing as it is: such a step has the bits of one without the rule."""
        return False

    def check(self, parameters: Sequence[nn.Parameter]) -> None:
        """Before any work: refuses trained parameters that the rule was not made for.

        Raises:
            ValueError: naming what is missing.
        """

    def restrict(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Changes one of the step's gradients (there are two where a method keeps them apart).

        It acts before any norm or inner product of it is taken. After the projection, a mask would break
        `<g, g_forget> >= eta ||g_forget||^2`, and after the rescaling the norm that was asked for. Where
        another rule has added to the combined gradient, or the caller (`keep_grad`), it acts once more on
        the sum, before clipping: twice has to be as once.
        """

    def add(self, parameters: Sequence[nn.Parameter], loss_scale: Tensor | float) -> Tensor | None:
        """Adds to `.grad`, once a step: after the mean over processes and unscaling, before clipping.

        Args:
            loss_scale: what the gradients in `.grad` are still multiplied by (not 1 only where a step with a
                grad_scaler leaves its gradients to the caller).

        Returns:
            0-d, what is to be added to the reported loss; None: nothing.
        """
        return None

    def after_update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Changes the weights after the optimizer's update, which decay and momentum move without gradient.

        It is called after a skipped step, too, of which the host does not know: where nothing was moved, it
        should move nothing. A step with `optimizer=None` makes no update, and refuses a rule that has this.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; `{}`: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""


def overrides(rule: ParameterRule, name: str) -> bool:
    """Whether `rule` has a method `name` of its own."""
    return getattr(type(rule), name) is not getattr(ParameterRule, name)
