"""The records of the methods: which there are, what they say, and what is refused."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import ClassVar, Literal, get_args, get_type_hints

import pytest

import fastunlearn.methods
from fastunlearn import SISS, EraseDiff, NegGrad, ReTrack, Vanilla
from fastunlearn.methods import Method, registry
from fastunlearn.methods.registry import Setting, register
from fastunlearn.testing.methods import every_method, every_variant

# Of the papers, in the order MNIST T-Shirt, CelebA-HQ, CIFAR-10, Stable Diffusion 1.4
RECIPES = ("mnist-tshirt", "celeba-hq", "cifar-10", "sd-1.4")
RATES = (5e-5, 5e-6, 2e-5, 1e-5)
PAPERS = {
    "retrack": [ReTrack(k=10, lambd=lambd) for lambd in (0.005, 0.005, 0.02, 0.5)],
    "siss": [SISS(lambd=0.5, scaling_norm=norm) for norm in (5.0, 500.0, 5.0, 750.0)],
    "erasediff": [EraseDiff(eta=eta) for eta in (1e-3, 1e-3, 1e-3, 1e-2)],
    "neggrad": [NegGrad(superfactor=1.0)] * 4,
    "vanilla": [Vanilla()] * 4,
}


def test_every_method_of_the_package_has_a_record():
    found = registry.methods()
    defined = {
        value
        for module in pkgutil.iter_modules(fastunlearn.methods.__path__)
        for value in vars(import_module(f"fastunlearn.methods.{module.name}")).values()
        if isinstance(value, type) and issubclass(value, Method) and value is not Method
    }
    assert {record.method for record in found.values()} == defined > {ReTrack, SISS}
    assert all(record.method.name == name for name, record in found.items())
    assert all(record.help.endswith(".") and record.source for record in found.values())


def test_lists_begin_with_the_methods_of_the_papers():
    assert list(registry.methods())[:5] == ["retrack", "siss", "erasediff", "neggrad", "vanilla"]


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_are_the_papers(name):
    record = registry.get(name)
    expected = [Setting(method, rate) for method, rate in zip(PAPERS[name], RATES, strict=True)]
    assert [record.recipes[recipe] for recipe in RECIPES] == expected


def test_every_hyperparameter_is_described():
    for record in registry.methods().values():
        for hyperparameter in record.hyperparameters():
            assert hyperparameter.help.endswith("."), (record.name, hyperparameter.name)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    expected = "method: expected one of retrack, siss, erasediff, neggrad, vanilla.*, got 'magic'"
    with pytest.raises(ValueError, match=expected):
        registry.get("magic")


def test_tests_run_all_methods_and_variants():
    assert every_method(k=2)[:5] == [ReTrack(k=2), SISS(), EraseDiff(), NegGrad(), Vanilla()]
    assert every_variant(k=2)[:13] == [
        ReTrack(k=2),
        ReTrack(k=2, lambd="auto"),
        ReTrack(k=2, weights="self_normalized"),
        ReTrack(k=2, weights="importance"),
        SISS(),
        SISS(variant="no_is"),
        SISS(variant="bernoulli"),
        SISS(scaling="ratio"),
        SISS(scaling="clip"),
        SISS(superfactor=1.0),
        EraseDiff(),
        NegGrad(),
        Vanilla(),
    ]
    # What makes a variant one is not changed with the rest.
    assert every_variant(lambd=0.3)[:2] == [ReTrack(lambd=0.3), ReTrack(lambd="auto")]


# --- methods that are added
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Added(Method):
    """One that is added.

    Args:
        beta: how much,
            and of what.
        count: how often.

    Raises:
        ValueError: never.
    """

    beta: float
    count: int = 3
    name: ClassVar[str] = "added"


@pytest.mark.usefixtures("methods_go_again")
class TestAdded:
    def test_it_follows_the_others_and_is_described(self):
        assert register(help="adds.", recipes={"mnist-tshirt": {"beta": 2.0, "lr": 1e-3}})(Added) is Added
        assert list(registry.methods())[-1] == "added"
        record = registry.get("added")
        described = [(each.name, each.type, each.default, each.help) for each in record.hyperparameters()]
        assert described[0] == ("beta", float, registry.MISSING, "how much, and of what.")
        assert described[1] == ("count", int, 3, "how often.")

    def test_settings_of_a_recipe_and_where_there_are_none(self):
        variants = {"often": {"count": 100}}
        register(help="adds.", recipes={"cifar-10": {"beta": 2.0, "lr": 1e-3}}, variants=variants)(Added)
        record = registry.get("added")
        assert record.example == Added(2.0)  # beta has no default
        assert record.setting("cifar-10", lr=0.5) == Setting(Added(2.0), 1e-3)
        assert record.setting("cifar-10", lr=0.5, variant="often") == Setting(Added(2.0, 100), 1e-3)
        assert record.setting("sd-1.4", lr=0.5) == Setting(Added(2.0), 0.5)
        assert every_variant()[-2:] == [Added(2.0), Added(2.0, 100)]

    def test_a_place_in_lists(self):
        register(help="adds.", recipes={"cifar-10": {"beta": 2.0, "lr": 1e-3}}, place=1.5)(Added)
        assert list(registry.methods())[:3] == ["retrack", "added", "siss"]

    def test_a_class_of_the_same_name_is_refused(self):
        @dataclass(frozen=True)
        class Other(Method):
            name: ClassVar[str] = "vanilla"

        expected = r"name: expected one that no other method has, got 'vanilla': .*vanilla\.Vanilla has it"
        with pytest.raises(ValueError, match=expected):
            register(help="the same.")(Other)
        assert registry.get("vanilla").method is Vanilla

    def test_a_class_that_is_defined_again_takes_the_place_of_itself(self):
        def cell():
            @register(help="of a notebook.")
            @dataclass(frozen=True)
            class Mine(Method):
                name: ClassVar[str] = "mine"

            return Mine

        cell()
        second = cell()
        assert registry.get("mine").method is second

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(TypeError, match="gamma"):
            register(help="adds.", recipes={"cifar-10": {"gamma": 1, "beta": 2.0, "lr": 1e-3}})(Added)
        with pytest.raises(TypeError, match=r"recipes\['cifar-10'\]\['lr'\]: expected a number, got None"):
            register(help="adds.", recipes={"cifar-10": {"beta": 2.0}})(Added)
        with pytest.raises(
            ValueError, match=r"recipes: expected the settings of a recipe, for beta of Added"
        ):
            register(help="adds.")(Added)
        with pytest.raises(TypeError, match="gamma"):
            register(
                help="adds.", recipes={"cifar-10": {"beta": 2.0, "lr": 1}}, variants={"x": {"gamma": 1}}
            )(Added)
        settings = {"cifar-10": {"beta": 2.0, "lr": 1e-3}}
        for later in ("gamma", "beta"):  # none of its hyperparameters; one without a default
            with pytest.raises(ValueError, match=f"later: expected one of count, got '{later}'"):
                register(help="adds.", recipes=settings, later=(later,))(Added)
        assert "added" not in registry.methods()

    def test_what_is_no_method_is_refused(self):
        class NotADataclass(Method):
            name = "bare"

        @dataclass(frozen=True)
        class Nameless(Method):
            pass

        for wrong in (NotADataclass, int, "retrack"):
            expected = "register: expected to stand above the @dataclass of a Method, got "
            with pytest.raises(TypeError, match=expected):
                register(help="is none.")(wrong)
        with pytest.raises(TypeError, match=r"Nameless\.name: expected the method's name, got None"):
            register(help="has no name.")(Nameless)


# --- flags
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Flagged(Method):
    """With hyperparameters of all kinds.

    Args:
        count: how often.
        lambd: a weight.
        slow: whether it takes its time.
        label: a word.
        kind: one of two.
        limit: a number, or none.
        table: no flag can give it.
        made: from nothing.
    """

    count: int
    lambd: float = 0.25
    slow: bool = False
    label: str = "a"
    kind: Literal["one", "two"] = "one"
    limit: float | None = None
    table: tuple[float, ...] = (1.0, 2.0)
    made: int = field(default_factory=lambda: 7)
    name: ClassVar[str] = "flagged"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})


class TestFlags:
    @pytest.fixture(autouse=True)
    def _added(self, methods_go_again):
        pytest.importorskip("tyro")
        register(help="has flags.", recipes={"cifar-10": {"count": 5, "lr": 1e-3}})(Flagged)

    def flags(self, *arguments):
        """What `fastunlearn unlearn` parses of `arguments`."""
        from fastunlearn.cli import _parse

        given = ["unlearn", "--model", "m", "--output", "o", "--method", "flagged", *arguments]
        return _parse(given).hyperparameter

    def test_every_kind_of_value_has_its_flag(self):
        flags = self.flags(
            *("--count", "2", "--lambda", "0.5", "--slow", "True", "--label", "b", "--kind", "two"),
            *("--limit", "1.5", "--made", "8"),
        )
        assert flags.build("flagged") == Flagged(2, 0.5, True, "b", "two", 1.5, made=8)

    def test_a_type_that_no_flag_can_have_has_none(self):
        from fastunlearn.cli.method_flags import method_flags

        names = {flag.name for flag in fields(method_flags())}
        assert "table" not in names
        assert {"count", "lambd", "slow", "label", "kind", "limit", "made"} < names

    def test_a_flag_is_refused_by_name(self):
        with pytest.raises(ValueError, match=r"--count: expected a value with --method flagged, got none"):
            self.flags("--slow", "True").build("flagged")
        own = "--k, --lambd, --weights, --within_condition"
        expected = f"--label: expected {own} with --method retrack, got --l"
        with pytest.raises(ValueError, match=expected):
            self.flags("--label", "b").build("retrack")
        with pytest.raises(SystemExit):
            self.flags("--kind", "three")

    def test_the_help_says_whose_a_flag_is(self, capsys):
        from fastunlearn.cli import main

        with pytest.raises(SystemExit):
            main(["unlearn", "--help"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "flagged: has flags." in shown
        assert "SISS: share of forget images in the mixture. Flagged: a weight." in shown
        assert "(default: 0.005 ReTrack, 0.5 SISS, 0.25 Flagged)" in shown
        assert "--count INT Flagged: how often. (default: required)" in shown
        assert "--kind one|two Flagged: one of two. (default: one)" in shown

    def test_all_commands_that_take_a_method_take_it(self):
        from fastunlearn.cli.demo import Demo
        from fastunlearn.cli.unlearn import Unlearn

        for command in (Demo, Unlearn):
            assert "flagged" in get_args(get_type_hints(command.with_methods())["method"])


class Inherits(Vanilla):
    """Adds a field, which only a dataclass of its own would have."""

    strength: float = 2.0
    name = "inherits"


@dataclass
class Changeable(Method):
    """Not frozen."""

    strength: float = 2.0
    name = "changeable"
    needs = frozenset({"retain"})


@pytest.mark.parametrize(
    ("method", "got"), [(Inherits, "none of its own"), (Changeable, "one that is not frozen")]
)
def test_a_method_is_a_frozen_dataclass_of_its_own(methods_go_again, method, got):
    with pytest.raises(
        TypeError, match=rf"^{method.__name__}: expected @dataclass\(frozen=True\) .*got {got}"
    ):
        register(help="does something.")(method)
