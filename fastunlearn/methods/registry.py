"""The methods that there are: a record of each, written above its class by `@register`.

The command line, the demo, the benchmarks, the tests and the docs read the records and keep no lists of their
own, so that a new method is one new file in this folder (docs/adding_a_method.md).
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple, TypeVar, get_type_hints

from ..host import check
from ..objective.protocol import Method

MethodClass = TypeVar("MethodClass", bound=type[Method])


@dataclass(frozen=True)
class Setting:
    """A method as an experiment runs it."""

    method: Method
    lr: float  # of AdamW


class Hyperparameter(NamedTuple):
    """A field of a method's dataclass."""

    name: str
    type: Any  # the annotation, resolved
    default: Any  # `dataclasses.MISSING` where there is none
    help: str  # from the section `Args:` of the class' docstring, in one line; "" where it says nothing


@dataclass(frozen=True)
class Record:
    """What the rest of the package knows of a method."""

    name: str  # on the command line
    method: type[Method]
    help: str  # what it does, in a line
    source: str  # paper, section, equation
    recipes: Mapping[str, Setting]  # what the papers, or the demo, run on each recipe
    variants: Mapping[
        str, Mapping[str, Any]
    ]  # hyperparameters by what stands behind the name; "": the plain one
    timed_on: str  # the network of bench/steps/networks.py that a CPU times it on by default
    place: float  # in lists
    later: tuple[str, ...] = ()  # hyperparameters that older checkpoints do not name

    @property
    def example(self) -> Method:
        """The method with its defaults, or, where it has none, with the settings of its first recipe."""
        return _example(self.method, self.recipes.values())

    def setting(self, recipe: str, *, lr: float, variant: str = "") -> Setting:
        """How `recipe` runs a variant; where the record does not say it, its `example` with the rate `lr`."""
        setting = self.recipes.get(recipe, Setting(self.example, lr))
        return replace(setting, method=replace(setting.method, **self.variants[variant]))

    def hyperparameters(self) -> list[Hyperparameter]:
        """In the order of the class."""
        types, helps = get_type_hints(self.method), described_arguments(self.method)
        return [
            Hyperparameter(field.name, types[field.name], _default(field), helps.get(field.name, ""))
            for field in fields(self.method)
        ]


_records: dict[str, Record] = {}


def register(
    *,
    help: str,
    source: str = "",
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    timed_on: str = "small",
    place: float = math.inf,
    later: Sequence[str] = (),
) -> Callable[[MethodClass], MethodClass]:
    """Stands above `@dataclass(frozen=True)` of a method, and makes it known under its `name`.

    Args:
        help: what the method does, in a line that ends with a full stop.
        source: paper, section, equation.
        recipes: for each experiment (`"mnist-tshirt"`, `"celeba-hq"`, `"cifar-10"`, `"sd-1.4"`, and the
            demo's `"mnist-tshirt-small"`) its hyperparameters, and `"lr"`, AdamW's learning rate.
        variants: hyperparameters of further forms of the method that benchmarks and tests run as well, by
            what stands behind its name there: `{"no_is": {"variant": "no_is"}}`.
        timed_on: the network of bench/ that a CPU times the method on by default.
        place: in lists, small numbers first; those without one follow in the order of their names.
        later: hyperparameters that the method once had not. Their defaults are what it did then, so that a
            checkpoint without them goes on with these; one without any other is refused.

    Raises:
        TypeError, ValueError: the class is no method with a name, a setting does not fit it, or another class
            has its name. A class that is defined anew (a cell of a notebook that is run again) takes the
            place of its former self.
    """

    def registered(method: MethodClass) -> MethodClass:
        name = _name_of(method)
        settings = {
            recipe: _setting(method, recipe, hyperparameters)
            for recipe, hyperparameters in (recipes or {}).items()
        }
        _check_later(method, later)
        variants_by_name = {"": {}, **(variants or {})}
        record = Record(name, method, help, source, settings, variants_by_name, timed_on, place, tuple(later))
        for hyperparameters in record.variants.values():
            replace(record.example, **hyperparameters)  # refused here and not where it is first run
        other = _records.get(name)
        if other is not None and _qualified_name(other.method) != _qualified_name(method):
            taken = f"{_qualified_name(other.method)} has it"
            raise ValueError(f"name: expected one that no other method has, got {name!r}: {taken}")
        _records[name] = record
        return method

    return registered


def methods() -> dict[str, Record]:
    """All methods by their names, in the order of lists: of every file in this folder, and of every file of a
    user that was imported before.
    """
    package = import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{__package__}.{module.name}")
    return dict(sorted(_records.items(), key=lambda item: (item[1].place, item[0])))


def get(name: str) -> Record:
    """The record of the method called `name`.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    known = methods()
    return known[check.one_of("method", name, tuple(known))]


def described_arguments(documented: type) -> dict[str, str]:
    """What the section `Args:` of a docstring says of each argument, in one line each."""
    helps: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(documented.__doc__ or "").partition("Args:\n")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            break  # the next section
        if indent == 4:
            name, _, text = line.strip().partition(": ")
            helps[name] = text
        elif name is not None and line.strip():
            helps[name] = f"{helps[name]} {line.strip()}"
    return helps


def _name_of(method: type[Method]) -> str:
    if not (isinstance(method, type) and issubclass(method, Method) and is_dataclass(method)):
        raise TypeError(
            f"register: expected to stand above the @dataclass of a Method, got {check.describe(method)}"
        )
    # A subclass inherits the fields, and would lose those that it adds; what is not frozen may change under a
    # captured step.
    own = vars(method).get("__dataclass_params__")
    if own is None or not own.frozen:
        got = "none of its own" if own is None else "one that is not frozen"
        raise TypeError(f"{method.__name__}: expected @dataclass(frozen=True) below register, got {got}")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{method.__name__}.name: expected the method's name, got {check.describe(name)}")
    return name


def _setting(method: type[Method], recipe: str, settings: Mapping[str, Any]) -> Setting:
    hyperparameters = dict(settings)
    lr = check.number(f"recipes[{recipe!r}]['lr']", hyperparameters.pop("lr", None), low=0, low_open=True)
    return Setting(method(**hyperparameters), lr)


def _check_later(method: type[Method], later: Sequence[str]) -> None:
    with_default = [field.name for field in fields(method) if _default(field) is not MISSING]
    for name in later:
        check.one_of("later", name, tuple(with_default))


def _example(method: type[Method], settings: Iterable[Setting]) -> Method:
    required = [field.name for field in fields(method) if _default(field) is MISSING]
    if not required:
        return method()
    for setting in settings:
        return setting.method
    expected = (
        f"expected the settings of a recipe, for {', '.join(required)} of {method.__name__} has no default"
    )
    raise ValueError(f"recipes: {expected}, got none")


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _qualified_name(method: type[Method]) -> str:
    return f"{method.__module__}.{method.__qualname__}"
