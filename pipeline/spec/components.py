"""What a spec names in the registries: losses, model, optimizer, schedule, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.registry import Registry, losses, models, nearest, optimizers, schedules
from pipeline.spec.data import Name, Positive, Section


class Choice(Section):
    """A registered component by name, with its options beside the name."""

    registry: ClassVar[Registry[Any]]

    name: str
    """Registered name; `pipeline list` prints them."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The component's own options, written beside `name`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError("choice", "expected a name or a mapping with `name`")
        own = {key: value[key] for key in cls.model_fields if key in value and key != "options"}
        return own | {"options": {key: value[key] for key in value if key not in own}}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = cls.registry.entries
        if name not in known:
            near = nearest(name, known)
            others = "" if near else f"known: {', '.join(sorted(known))}; "
            raise PydanticCustomError(
                "unknown_name",
                "no {kind} {found}{help}",
                {
                    "kind": cls.registry.kind,
                    "found": repr(name),
                    "help": f"{near} ({others}custom ones need --import)",
                },
            )
        return name

    @field_validator("options")
    @classmethod
    def _allowed(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is None:  # an unknown name has been reported already
            return options
        model = cls.registry[name].options
        reserved = sorted((set(cls.model_fields) - {"options"}) & set(model.model_fields))
        if reserved:
            text = "{kind} {name}: its option {reserved} is a key of the spec itself; rename it"
            facts = {"kind": cls.registry.kind, "name": name, "reserved": ", ".join(reserved)}
            raise PydanticCustomError("reserved", text, facts)
        dumped: dict[str, Any] = model.model_validate(options).model_dump(mode="json")
        return dumped

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        options: dict[str, Any] = dumped.pop("options")
        return dumped | options

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        base = handler.resolve_ref_schema(handler(core_schema))
        own = {k: v for k, v in base["properties"].items() if k not in ("name", "options")}
        forms: list[dict[str, Any]] = [{"enum": sorted(cls.registry.entries)}]
        for name, entry in sorted(cls.registry.entries.items()):
            # through the handler, so that what an option's type refers to is defined at the root
            options = handler.resolve_ref_schema(handler(entry.options.__pydantic_core_schema__))
            forms.append(
                {
                    "type": "object",
                    "description": entry.doc,
                    "properties": {"name": {"const": name}, **own, **options["properties"]},
                    "required": ["name", *options.get("required", [])],
                    "additionalProperties": False,
                }
            )
        return {"description": base.get("description", ""), "anyOf": forms}


class Term(Choice):
    """A loss, alone or as one term of a weighted sum."""

    registry = losses

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of this term in the sum."""
    label: Name | None = None
    """Name of this term's curve; the name of the loss unless two terms share it."""
    prediction: str | list[str] | None = None
    """Model output (or outputs, in the loss's order) that the loss reads."""
    target: str | list[str] | None = None
    """Target column (or columns) that the loss reads; the only target unless given."""


class Output(Section):
    """One named output of the model."""

    size: Positive | None = None
    """Numbers per row (or position); from the loss and its target unless given."""
    activation: (
        Literal[
            "identity", "sigmoid", "softmax", "log_softmax", "softplus", "exp", "normalize", "tanh"
        ]
        | None
    ) = None
    """Last operation; what the loss reads unless given (none for losses that take logits)."""


class Model(Choice):
    """The model to train."""

    registry = models

    outputs: dict[str, Output] = Field(default={})
    """Named outputs, where size or activation should differ from what the loss implies."""


class Optimizer(Choice):
    """The rule that moves the weights."""

    registry = optimizers


class Schedule(Choice):
    """The learning rate over the steps, as a factor of the optimizer's `lr`."""

    registry = schedules

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to its full value."""
