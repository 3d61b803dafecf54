"""The figure of a transition: how much the text steers, along the path of the sampler."""

from __future__ import annotations

import io

from ..models.transition import Transition

LINE, MEDIAN, MUTED, TEXT = "#1f5fa8", "#e25414", "#565d66", "#20242a"


def transition_figure(result: Transition) -> bytes:
    """Guidance magnitude against the timestep as PNG bytes: a panel for each prompt, a line for each seed.

    A dot marks the first local minimum of a line, and the upright line the median over the seeds of the
    prompt. Time runs as the sampler runs, from noise on the left to the image on the right.

    Raises:
        TypeError: for anything but what `find_transition` returns.
    """
    if not isinstance(result, Transition):
        raise TypeError(f"result: expected a Transition of find_transition, got {type(result).__name__}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(result)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(result: Transition):
    """The matplotlib figure of `transition_figure`."""
    from matplotlib.figure import Figure

    # Not by pyplot, which would keep the figure and look for a screen.
    prompts = len(result.prompts)
    figure = Figure(figsize=(5.4, 2.7 * prompts), dpi=200, layout="constrained")
    for prompt, panel in enumerate(figure.subplots(prompts, 1, squeeze=False)[:, 0]):
        _draw_prompt(panel, result, prompt)
    return figure


def _draw_prompt(panel, result: Transition, prompt: int) -> None:
    """The lines of one prompt in matplotlib's axes `panel`."""
    curves = zip(result.magnitudes[prompt], result.minima[prompt], strict=True)
    for magnitudes, minimum in curves:
        panel.plot(result.visited[: len(magnitudes)], magnitudes, color=LINE, linewidth=1, alpha=0.6)
        if minimum is not None:
            panel.plot(result.visited[minimum], magnitudes[minimum], "o", color=LINE, markersize=3.5)
    median = result.prompt_timesteps[prompt]
    panel.axvline(median, color=MEDIAN, linewidth=1.4)

    label = f"{_short(result.prompts[prompt])}\nmedian {median:g}"
    fallen = sum(result.fell_back[prompt])
    if fallen:
        label += f", {fallen} of {len(result.seeds)} seeds without a minimum count as {result.fallback:g}"
    # A prompt may hold dollar signs, which matplotlib would read as formulas.
    panel.set_title(label, fontsize=8.5, loc="left", color=TEXT, parse_math=False)
    panel.set_xlabel("timestep", fontsize=8.5, color=MUTED)
    panel.set_ylabel("guidance magnitude", fontsize=8.5, color=MUTED)
    panel.set_ylim(bottom=0)
    panel.invert_xaxis()
    panel.tick_params(which="both", labelsize=8, colors=MUTED, length=3)
    panel.grid(color="#e3e6ea", linewidth=0.6)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b6bcc4")


def _short(prompt: str, most: int = 60) -> str:
    """The beginning of a prompt, on one line."""
    prompt = " ".join(prompt.split())
    return prompt if len(prompt) <= most else prompt[: most - 1].rstrip() + "…"
