"""The flags of the methods' hyperparameters, made from the records of the methods.

Only `fastunlearn unlearn` and `fastunlearn demo` read the records, which imports torch: the help of all other
commands, and the list of commands, is there at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, make_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from .options import unset

if TYPE_CHECKING:
    from ..methods import Method
    from ..methods.registry import Hyperparameter, Record

METAVARS = {int: "INT", float: "FLOAT", bool: "True|False", str: "TEXT"}
OTHER_NAMES = {"lambd": ("--lambda",)}  # Python reserves the word


@dataclass(kw_only=True)
class MethodFlags:
    """Each belongs to the methods that it names; given to another it is an error."""

    def build(self, name: str) -> Method:
        """The method called `name` with the flags that were given.

        Raises:
            ValueError: a flag of another method was given, or one that changes nothing beside the others, one
                that the method cannot do without was not, or a value is outside its range.
        """
        from ..methods import registry

        records = registry.methods()
        chosen = records[name]
        own = {hyperparameter.name: hyperparameter for hyperparameter in flagged(chosen)}
        given = {flag: value for flag, value in vars(self).items() if value is not None}
        for flag, value in given.items():
            if flag not in own:
                usable = ", ".join(f"--{other}" for other in own) or "no such flag"
                owners = " and ".join(record.name for record in records.values() if flag in names_of(record))
                got = f"got --{flag} {value}, a flag of {owners}"
                raise ValueError(f"--{flag}: expected {usable} with --method {name}, {got}")
        for flag, hyperparameter in own.items():
            if hyperparameter.default is MISSING and flag not in given:
                raise ValueError(f"--{flag}: expected a value with --method {name}, got none")
        method = chosen.method(**given)
        for flag in sorted(method.without_effect & given.keys()):
            raise ValueError(
                f"--{flag}: expected none where it changes nothing, got {given[flag]} for {method}"
            )
        return method


def method_choices() -> Any:
    """The type of `--method`: the names of all methods."""
    from ..methods import registry

    return Literal[tuple(registry.methods())]


def method_flags() -> type[MethodFlags]:
    """`MethodFlags` with a flag for every hyperparameter of every method; None where it was not given.

    A name that several methods have is one flag. A hyperparameter of a type that no flag can have (another
    than int, float, bool, str, or a choice of strings) has none, and keeps its default.
    """
    from ..methods import registry

    owners: dict[str, list[_Owned]] = {}
    for record in registry.methods().values():
        for hyperparameter in flagged(record):
            owners.setdefault(hyperparameter.name, []).append(_Owned(record, hyperparameter))
    flags = [(name, _flag(name, of), None) for name, of in owners.items()]
    made = make_dataclass(MethodFlags.__name__, flags, bases=(MethodFlags,), kw_only=True)
    made.__doc__ = MethodFlags.__doc__
    return made


def methods_that_do_not_read(*sets: str) -> str:
    """The names of those that read none of `sets`, as a sentence says them: `a and b do not need them.`"""
    from ..methods import registry

    names = [name for name, record in registry.methods().items() if not record.example.needs & set(sets)]
    if not names:
        return ""
    return f"{' and '.join(names)} {'does' if len(names) == 1 else 'do'} not need them."


def methods_in_a_line_each() -> str:
    """What each does, as the help says it."""
    from ..methods import registry

    return " ".join(f"{name}: {record.help}" for name, record in registry.methods().items())


def help_of(name: str) -> str:
    """What the hyperparameter `name` is to each method that has it."""
    from ..methods import registry

    helps = []
    for record in registry.methods().values():
        helps += [_Owned(record, each).help for each in flagged(record) if each.name == name]
    return " ".join(helps)


def flagged(record: Record) -> list[Hyperparameter]:
    """The hyperparameters of a method that the command line can give."""
    return [
        hyperparameter
        for hyperparameter in record.hyperparameters()
        if all(_can_be_given(kind) for kind in _kinds(hyperparameter.type))
    ]


def names_of(record: Record) -> list[str]:
    return [hyperparameter.name for hyperparameter in flagged(record)]


class _Owned(NamedTuple):
    record: Record
    hyperparameter: Hyperparameter

    @property
    def title(self) -> str:
        return self.record.method.__name__

    @property
    def help(self) -> str:
        return f"{self.title}: {self.hyperparameter.help}" if self.hyperparameter.help else f"{self.title}."

    @property
    def default(self) -> str:
        default = self.hyperparameter.default
        if default is MISSING:
            return "required"
        return f"{default:g}" if isinstance(default, float) else str(default)


def _flag(name: str, owned: list[_Owned]) -> Any:
    """The annotated type of one flag."""
    kinds = _without_repeats(kind for one in owned for kind in _kinds(one.hyperparameter.type))
    if len(owned) == 1:
        default = owned[0].default
    else:
        default = ", ".join(f"{one.default} {one.title}" for one in owned)
    return Annotated[
        Union[(*kinds, None)],
        unset(
            default,
            "|".join(_without_repeats(map(_metavar, kinds))),
            *OTHER_NAMES.get(name, ()),
            help=" ".join(one.help for one in owned),
        ),
    ]


def _kinds(annotation: Any) -> list[Any]:
    """The types that a value may have; None aside, which is that of a flag that was not given."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for kind in get_args(annotation) if kind is not NoneType]
    return [annotation]


def _can_be_given(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return kind in METAVARS


def _metavar(kind: Any) -> str:
    return METAVARS[kind] if kind in METAVARS else "|".join(get_args(kind))


def _without_repeats(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
