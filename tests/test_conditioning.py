"""What a network is given beside x_t and t, and what it may return: right, or refused by name."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastunlearn import Draws, erasediff_step, neggrad_step, retrack_step, siss_step, vanilla_step
from fastunlearn.step import compilation
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.checkpoints import tiny_unet
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
ROWS, LENGTH, WIDTH = 4, 3, 5


def images(seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def prompt(rows: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


class Prompted(nn.Module):
    """A network with a prompt `[R, L, D]` and options, as diffusers' have them; notes what it was given."""

    def __init__(self):
        super().__init__()
        self.network, self.seen = TinyDenoiser(), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.read = nn.Linear(WIDTH, 1)

    def forward(self, x, t, prompt=None, cross_attention_kwargs=None, mode="add", return_dict=True):
        self.seen.append((cross_attention_kwargs, mode, None if prompt is None else prompt.shape))
        prediction = self.network(x, t)
        if prompt is not None:
            scale = 1.0 if cross_attention_kwargs is None else cross_attention_kwargs["scale"]
            shift = scale * torch.tanh(self.read(prompt)).mean(dim=1).view(-1, 1, 1, 1)
            prediction = prediction + shift if mode == "add" else prediction - shift
        return Sample(prediction) if return_dict else (prediction,)


class Sample(NamedTuple):
    sample: Tensor


def _neighbors() -> Tensor:
    return images(7, ROWS * 2).view(ROWS, 2, 1, 8, 8)


STEPS = {
    "vanilla": lambda model, optimizer, kwargs, **options: vanilla_step(
        model, optimizer, SCHEDULE, images(), retain_kwargs=kwargs, **options
    ),
    "neggrad": lambda model, optimizer, kwargs, **options: neggrad_step(
        model, optimizer, SCHEDULE, images(), forget_kwargs=kwargs, **options
    ),
    "erasediff": lambda model, optimizer, kwargs, **options: erasediff_step(
        model, optimizer, SCHEDULE, images(), images(2), forget_kwargs=kwargs, retain_kwargs=kwargs, **options
    ),
    "siss": lambda model, optimizer, kwargs, **options: siss_step(
        model, optimizer, SCHEDULE, images(), images(2), forget_kwargs=kwargs, retain_kwargs=kwargs, **options
    ),
    "no_is": lambda model, optimizer, kwargs, **options: siss_step(
        model,
        optimizer,
        SCHEDULE,
        images(),
        images(2),
        variant="no_is",
        forget_kwargs=kwargs,
        retain_kwargs=kwargs,
        **options,
    ),
    "retrack": lambda model, optimizer, kwargs, **options: retrack_step(
        model,
        optimizer,
        SCHEDULE,
        images(),
        _neighbors(),
        images(2),
        lambd=0.3,
        forget_kwargs=kwargs,
        retain_kwargs=kwargs,
        **options,
    ),
}
SHARING = ("siss", "retrack")  # forget and retain rows go through the network together


def taken(model: nn.Module, name: str, kwargs, call=None, **options) -> list[Tensor]:
    """The gradient of a step; the network is `call` if it is not `model` itself."""
    model.zero_grad()
    if call is None:
        STEPS[name](model, None, kwargs, generator=torch.Generator().manual_seed(0), **options)
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    before = copy.deepcopy(model.state_dict())
    options = {"max_grad_norm": None} | options
    STEPS[name](
        call,
        torch.optim.SGD(model.parameters(), lr=1.0),
        kwargs,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    return [before[key] - value for key, value in model.state_dict().items()]


# --- what passes through ------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("name", STEPS)
def test_options_reach_the_network_as_they_are(name, micro_batch_size):
    """The same as a network that has them built in."""
    model = Prompted()
    options = {
        "cross_attention_kwargs": {"scale": 0.5, "note": None},
        "mode": "subtract",
        "return_dict": False,
    }
    found = taken(model, name, {"prompt": prompt(), **options}, micro_batch_size=micro_batch_size)
    assert {(str(cross), mode) for cross, mode, _ in model.seen} == {
        ("{'scale': 0.5, 'note': None}", "subtract")
    }

    network = Prompted()
    expected = taken(
        network,
        name,
        {"prompt": prompt()},
        lambda x, t, prompt: network(x, t, prompt, **options),
        micro_batch_size=micro_batch_size,
    )
    assert relative_l2(found, expected) <= 1e-5


@pytest.mark.parametrize(
    "value", [3, 0.5, True, None, "x", np.float32(0.5), np.int64(2), np.bool_(True), 1 + 2j], ids=repr
)
@pytest.mark.parametrize("name", SHARING)
def test_constants(name, value):
    seen, model = [], TinyDenoiser()

    def network(x, t, option):
        seen.append(option)
        return model(x, t)

    taken(model, name, {"option": value}, network)
    assert all(type(each) is type(value) and each == value for each in seen)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("name", STEPS)
def test_one_prompt_for_all_rows(name, micro_batch_size):
    one = prompt(1)
    model = Prompted()
    found = taken(model, name, {"prompt": one}, micro_batch_size=micro_batch_size)
    assert all(shape[0] > 0 for *_, shape in model.seen)
    expected = taken(Prompted(), name, {"prompt": one.repeat(ROWS, 1, 1)}, micro_batch_size=micro_batch_size)
    assert relative_l2(found, expected) == 0


def test_one_prompt_for_each_branch():
    """Of batches of different lengths, in one call."""
    model = Prompted()
    kwargs = [{"prompt": prompt(rows, seed)} for rows, seed in ((1, 1), (1, 2))]
    retrack_step(
        model,
        None,
        SCHEDULE,
        images(),
        _neighbors(),
        images(2, 6),
        forget_kwargs=kwargs[0],
        retain_kwargs=kwargs[1],
    )
    assert {shape[0] for *_, shape in model.seen} == {4, 6}
    full = [{"prompt": each["prompt"].repeat(rows, 1, 1)} for each, rows in zip(kwargs, (4, 6), strict=True)]
    other = Prompted()
    retrack_step(
        other,
        None,
        SCHEDULE,
        images(),
        _neighbors(),
        images(2, 6),
        forget_kwargs=full[0],
        retain_kwargs=full[1],
    )


@pytest.mark.parametrize("name", ["erasediff", "no_is"])
def test_branches_with_calls_of_their_own_may_differ(name):
    model = Prompted()
    forget, retain = {"mode": "add", "prompt": prompt()}, {"mode": "subtract", "prompt": prompt(1, 2)[:, :1]}
    step, options = (erasediff_step, {}) if name == "erasediff" else (siss_step, {"variant": "no_is"})
    step(model, None, SCHEDULE, images(), images(2), forget_kwargs=forget, retain_kwargs=retain, **options)
    assert {(mode, shape) for _, mode, shape in model.seen} == {
        ("add", (ROWS, LENGTH, WIDTH)),
        ("subtract", (ROWS, 1, WIDTH)),
    }


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize(
    ("forget", "retain", "error", "text"),
    [
        (
            {"mode": "add"},
            {"mode": "subtract"},
            ValueError,
            "expected the same in both, .*, got 'add' and 'subtract' for 'mode'",
        ),
        ({"mode": None}, {"mode": "add"}, ValueError, "got None and 'add' for 'mode'"),
        ({"mode": 1}, {"mode": True}, ValueError, "got 1 and True for 'mode'"),
        ({"a": {"scale": 0.5}}, {"a": {"scale": 1.0}}, ValueError, "got 0.5 and 1.0 for 'a.scale'"),
        (
            {"a": {"scale": 0.5}},
            {"a": {"size": 0.5}},
            ValueError,
            r"expected the same keys in 'a', got \['scale'\] and \['size'\]",
        ),
        (
            {"a": {"scale": 0.5}},
            {"a": None},
            TypeError,
            "the same kind in both, got dict and NoneType for 'a'",
        ),
        ({"a": prompt()}, {"a": 0.5}, TypeError, "the same kind in both, got Tensor and float for 'a'"),
        (
            {"a": prompt()},
            {"a": prompt()[:, :2]},
            ValueError,
            r"same shape but for the rows, .* got \(4, 3, 5\) and \(4, 2, 5\) for 'a'",
        ),
    ],
)
def test_branches_that_share_a_call_must_agree(name, forget, retain, error, text):
    model = Prompted()
    step, batches = (
        (siss_step, [images(), images(2)])
        if name == "siss"
        else (retrack_step, [images(), _neighbors(), images(2)])
    )
    with pytest.raises(error, match=f"forget_kwargs, retain_kwargs: .*{text}"):
        step(model, None, SCHEDULE, *batches, forget_kwargs=forget, retain_kwargs=retain)
    assert model.seen == []


@pytest.mark.parametrize("compile", [True, "regional"])
def test_options_under_compile(monkeypatch, compile):
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # graphs are traced, and run as they are
    model = Plain()
    model._repeated_blocks = ["Conv2d"]
    model.compile_repeated_blocks = lambda **options: model.enter.compile(**options)
    kwargs = {"prompt": prompt(1), "options": {"scale": 0.5, "note": None}, "mode": "add"}
    for changed in (
        {},
        {"mode": "subtract"},
        {"options": {"scale": 0.25, "note": None}},
        {"options": {"scale": 2, "note": None}},
    ):
        found = taken(model, "siss", kwargs | changed, compile=compile)
        assert relative_l2(found, taken(Plain(), "siss", kwargs | changed)) <= 1e-4


class Plain(TinyDenoiser):
    """`Prompted` without notes, which a graph could not keep."""

    def forward(self, x, t, prompt, options, mode):
        shift = options["scale"] * prompt.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return super().forward(x + shift if mode == "add" else x - shift, t)


# --- what is refused ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, prompt):
        return self.layer(prompt)


@pytest.mark.parametrize("name", STEPS)
def test_a_text_encoder_trained_along(name):
    """Its output is refused; a model that holds both is right, and trains both."""
    encoder, model = Encoder(), Prompted()
    optimizer = torch.optim.SGD([*encoder.parameters(), *model.parameters()], lr=1.0)
    text = r"_kwargs: expected .* without a graph.*detach\(\).*both into one.*, got .*Backward0 for 'prompt'"
    with pytest.raises(ValueError, match=text):
        STEPS[name](model, optimizer, {"prompt": encoder(prompt())})
    both = Both()
    taken(both, name, {"prompt": prompt()})
    assert all(parameter.grad is not None for parameter in both.encoder.parameters())
    whole = [parameter.grad for parameter in both.parameters()]
    parts = Both()
    assert relative_l2(taken(parts, name, {"prompt": prompt()}, micro_batch_size=3), whole) <= 1e-5


class Both(Prompted):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x, t, prompt):
        return super().forward(x, t, self.encoder(prompt))


def test_vanilla_with_an_encoder_is_autograds():
    both = Both()
    noise, timesteps = images(5), torch.full((ROWS,), 500)
    vanilla_step(
        both,
        None,
        SCHEDULE,
        images(),
        retain_kwargs={"prompt": prompt()},
        draws=Draws(retain_noise=noise, retain_timesteps=timesteps),
    )
    x_t = SCHEDULE.alpha[500].float() * images() + SCHEDULE.sigma[500].float() * noise
    loss = (both(x_t, timesteps, prompt()).sample - noise).square().flatten(1).sum(1).mean()
    expected = torch.autograd.grad(loss, list(both.parameters()))
    assert relative_l2([parameter.grad for parameter in both.parameters()], list(expected)) <= 1e-5


class Learned(Prompted):
    """A prompt that is a parameter, as in textual inversion."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(prompt(1))


ALONE = ("vanilla", "neggrad", "erasediff", "no_is")


@pytest.mark.parametrize(
    ("name", "micro_batch_size"), [*((name, size) for name in ALONE for size in (None, 3)), ("retrack", None)]
)
def test_a_trained_parameter_as_conditioning(name, micro_batch_size):
    inside, given = Learned(), Learned()
    expected = taken(
        inside,
        name,
        None,
        lambda x, t: inside(x, t, inside.token.expand(len(x), -1, -1)),
        micro_batch_size=micro_batch_size,
    )
    found = taken(given, name, {"prompt": given.token}, given, micro_batch_size=micro_batch_size)
    assert expected[0].abs().sum() > 0
    assert relative_l2(found, expected) <= 1e-4


@pytest.mark.parametrize(("name", "micro_batch_size"), [("siss", 1), ("retrack", 3)])
def test_a_trained_parameter_in_several_calls_that_pick_from_it(name, micro_batch_size):
    """Rows are picked from both branches' conditioning before they are split: the calls share that graph."""
    model = Learned()
    with pytest.raises(
        ValueError, match=r"model: expected an output whose graph is that of its own call.* detach"
    ):
        taken(model, name, {"prompt": model.token}, micro_batch_size=micro_batch_size)


def test_another_parameter_as_conditioning():
    token = nn.Parameter(prompt(1))
    with pytest.raises(
        ValueError,
        match=r"retain_kwargs: .* or trained parameters .*, got another that requires grad for 'prompt'",
    ):
        STEPS["vanilla"](Prompted(), None, {"prompt": token})


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        (
            {"prompt": prompt(3)},
            ValueError,
            r"tensors with the batch of 4 first, got shape \(3, 3, 5\) for 'prompt'",
        ),
        ({"a": {"b": prompt(3)}}, ValueError, "for 'a.b'"),
        ({"prompt": torch.tensor(1.0)}, ValueError, r"got shape \(\) for 'prompt'"),
        ({"prompt": [prompt()]}, TypeError, "got list for 'prompt'"),
        ({"prompt": (prompt(), prompt())}, TypeError, "got tuple for 'prompt'"),
        ({"prompt": np.zeros((4, 3))}, TypeError, "got ndarray for 'prompt'"),
        ({"prompt": {"a": len}}, TypeError, "got builtin_function_or_method for 'prompt.a'"),
        ({3: prompt()}, TypeError, "expected a dict of keyword arguments or None, got dict"),
        (
            prompt(),
            TypeError,
            r"expected a dict of keyword arguments or None, got float32 of shape \(4, 3, 5\) on cpu",
        ),
    ],
    ids=str,
)
def test_anything_else(kwargs, error, text):
    model, generator = Prompted(), torch.Generator().manual_seed(0)
    state = generator.get_state()
    with pytest.raises(error, match=f"retain_kwargs: .*{text}"):
        STEPS["vanilla"](model, None, kwargs, generator=generator)
    assert model.seen == []
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("kwargs", [prompt(), ["prompt"], {1: 2}], ids=str)
def test_no_keyword_arguments_of_a_branch_that_is_not_read(kwargs):
    with pytest.raises(TypeError, match="forget_kwargs: expected a dict of keyword arguments or None, got"):
        vanilla_step(TinyDenoiser(), None, SCHEDULE, images(), forget_kwargs=kwargs)


def test_noise_with_a_graph():
    noise = images(3).requires_grad_()
    with pytest.raises(ValueError, match=r"draws.retain_noise: expected a tensor without a graph"):
        vanilla_step(TinyDenoiser(), None, SCHEDULE, images(), draws=Draws(retain_noise=noise))


@pytest.mark.parametrize("which", ["forget", "neighbors", "retain"])
def test_images_with_a_graph(which):
    """Of a VAE trained along, say: the loss would go back to it through x_t, and not through the target."""
    given = {"forget": images(), "neighbors": _neighbors(), "retain": images(2)}
    given[which] = given[which].requires_grad_() * 1
    with pytest.raises(
        ValueError, match=rf"{which}: expected a tensor without a graph .*, got one that requires grad"
    ):
        retrack_step(TinyDenoiser(), None, SCHEDULE, **given)


# --- what a network returns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [tuple, list])
@pytest.mark.parametrize("compile", [False, True])
def test_a_tuple(monkeypatch, shape, compile):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")

    class Returns(TinyDenoiser):
        def forward(self, x, t):
            return shape([super().forward(x, t), "the rest"])

    assert (
        relative_l2(taken(Returns(), "siss", None, compile=compile), taken(TinyDenoiser(), "siss", None))
        <= 1e-5
    )


def test_diffusers_return_dict():
    pytest.importorskip("diffusers")
    model = tiny_unet()
    expected = [gradient.clone() for gradient in taken(model, "vanilla", None)]
    assert relative_l2(taken(model, "vanilla", {"return_dict": False}), expected) == 0


@pytest.mark.parametrize(
    "output", [(), [], ("sample",), (torch.zeros(4, 1, 4, 4),), {"sample": torch.zeros(4, 1, 8, 8)}], ids=str
)
def test_no_prediction(output):
    model = TinyDenoiser()
    with pytest.raises(ValueError, match=r"model: expected an output .* of shape \(4, 1, 8, 8\).*, got"):
        vanilla_step(lambda x, t: output, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images())


class Checkpointed(TinyDenoiser):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x, t):
        return self.leave(checkpoint(self.middle, self.enter(x), use_reentrant=self.reentrant))

    def middle(self, hidden):
        return torch.nn.functional.silu(hidden + self.time(torch.ones(len(hidden), 2))[:, :, None, None])


@pytest.mark.parametrize("name", ["vanilla", "siss"])
def test_reentrant_checkpoints(name):
    expected = taken(Checkpointed(False), name, None)
    assert len(expected) == 6
    model = Checkpointed(True)
    with pytest.raises(
        ValueError,
        match=r"model: expected activation checkpoints with use_reentrant=False.*, got reentrant ones",
    ):
        taken(model, name, None)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_reentrant_checkpoint_around_everything():
    model = TinyDenoiser()
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        pytest.raises(ValueError, match=r"model: expected an output that depends .*use_reentrant=True"),
    ):
        vanilla_step(
            lambda x, t: checkpoint(model, x, t, use_reentrant=True),
            torch.optim.SGD(model.parameters(), lr=0.1),
            SCHEDULE,
            images(),
        )


def test_a_cached_embedding_with_a_graph():
    """Computed once, used in every call of the step: the first call's backward pass frees it."""
    both = Both()
    embedding = both.encoder(prompt(1))
    network = lambda x, t: Prompted.forward(both, x, t, embedding.expand(len(x), -1, -1))  # noqa: E731
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="model: expected an output whose graph is that of its own call"):
        vanilla_step(network, optimizer, SCHEDULE, images(), micro_batch_size=2)
    assert all(parameter.grad is None for parameter in both.parameters())
