"""Named components: losses, models, optimizers, schedules, metrics.

An entry is an ordinary function or class. Its keyword-only, annotated parameters are the options
a job spec may give; its docstring's first line is what `pipeline list` prints.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, create_model

from pipeline.errors import UsageError

E = TypeVar("E", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered component: its name, where it is written, and how it is built."""

    name: str
    kind: str
    build: Callable[..., Any]
    per: Literal["row", "element", "batch"] | None = None
    """What a loss gives one number for, if its author says so."""
    like: str | None = None
    """The loss whose prediction, target and served form it shares, if its author says so."""

    @property
    def place(self) -> str:
        """File and line of the entry, for messages."""
        try:
            return f"{inspect.getsourcefile(self.build)}:{inspect.getsourcelines(self.build)[1]}"
        except (OSError, TypeError):
            return f"module {self.build.__module__}"

    @property
    def origin(self) -> tuple[str, str]:
        """Module and name: the same origin again is a reload or a re-run notebook cell."""
        return self.build.__module__, self.build.__qualname__

    @property
    def doc(self) -> str:
        """First line of the entry's own docstring."""
        return (self.build.__doc__ or "").strip().partition("\n")[0]

    @property
    def options(self) -> type[BaseModel]:
        """The options as a pydantic model: keyword-only parameters, unknown names refused."""
        return _options_model(self.build)


@cache
def _options_model(build: Callable[..., Any]) -> type[BaseModel]:
    scope = vars(sys.modules[build.__module__])

    def annotation(parameter: inspect.Parameter) -> Any:
        kind = parameter.annotation
        try:
            while isinstance(kind, str):  # what typing.get_type_hints does, one by one
                kind = eval(kind, scope)
        except Exception as error:  # an annotation can be any expression
            raise UsageError(
                f"option {parameter.name} of {build.__qualname__} in {build.__module__}: its "
                f"annotation {kind!r} cannot be read: {error}"
            ) from None
        return Any if kind is parameter.empty else kind

    fields: dict[str, Any] = {
        p.name: (annotation(p), ... if p.default is p.empty else p.default)
        for p in inspect.signature(build).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    config = ConfigDict(
        extra="forbid", frozen=True, strict=False, arbitrary_types_allowed=True, allow_inf_nan=False
    )
    return create_model(f"{build.__name__} options", __config__=config, **fields)


class Registry(Generic[E]):
    """Names to entries of one kind; a name can be given once."""

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        name: str,
        *,
        per: Literal["row", "element", "batch"] | None = None,
        like: str | None = None,
    ) -> Callable[[E], E]:
        """Put the decorated function or class under `name`.

        Both options are for losses. `per="batch"` declares one that needs all rows of the global
        batch at once; `like="cross_entropy"` one that reads what that loss reads: it gets the same
        outputs and targets, metrics, labels and probabilities.
        """

        def put(build: E) -> E:
            entry = Entry(name, self.kind, build, per, like)
            known = self._entries.get(name)
            if known and known.origin != entry.origin:
                raise UsageError(
                    f"{self.kind} {name!r} is registered twice: {known.place} and {entry.place}"
                )
            self._entries[name] = entry
            return build

        return put

    @property
    def entries(self) -> dict[str, Entry]:
        """All entries by name; the built-in ones are imported the first time somebody looks."""
        importlib.import_module(self.home)
        return self._entries

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            near = nearest(name, self.entries) or "; one of your own needs --import FILE"
            raise UsageError(f"no {self.kind} {name!r}{near}")
        return self._entries[name]


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    names = [str(k) for k in known]
    lower = str(name).lower()
    plain = lower.removesuffix("loss").rstrip("_"), lower.removeprefix("val_")  # MSELoss, val_loss
    close = [one for one in plain if one in names]
    close = close or difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def lazy(module: str) -> Any:
    """The module, imported when first used: `--help` and spec errors need no torch."""
    return sys.modules.get(module) or _Lazy(module)


losses: Registry[Callable[..., Any]] = Registry("loss", "pipeline.losses")
models: Registry[Callable[..., Any]] = Registry("model", "pipeline.models")
optimizers: Registry[Callable[..., Any]] = Registry("optimizer", "pipeline.optimizers")
schedules: Registry[Callable[..., Any]] = Registry("schedule", "pipeline.schedules")
metrics: Registry[Callable[..., Any]] = Registry("metric", "pipeline.metrics")

REGISTRIES: dict[str, Registry[Any]] = {
    "losses": losses,
    "models": models,
    "optimizers": optimizers,
    "schedules": schedules,
    "metrics": metrics,
}
