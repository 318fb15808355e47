"""What a spec names in the registries: losses, model, optimizer, schedule, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.registry import Registry, losses, models, nearest, optimizers, schedules
from pipeline.spec.section import Name, Positive, Section

Patterns = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""Names with `*` for any text, or those of modules; one or several."""


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


class InitFrom(Section):
    """Trained weights that the model starts from, in place of random ones."""

    weights: str
    """The folder of a finished run, an MLflow model that a run recorded (`models:/NAME@champion`),
    or a `.safetensors` file, whose names are those of the model's parameters."""
    match: Patterns | None = None
    """Patterns of the parameters to take, as `encoder.*`; the others start from the seed. Unless
    given, every parameter and buffer must be there, and no other."""
    sha256: str | None = None
    """Hash of what is taken; filled in when the job is loaded, and checked if given."""

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"weights": value} if isinstance(value, str) else value


class Lora(Section):
    """Low-rank adaptation: large weights stay as they are, and small factors are trained."""

    match: Annotated[Patterns, Field(min_length=1)]
    """Patterns of the linear layers to adapt, as `encoder.*`. Their own weights are frozen; other
    parameters are trained unless `freeze` names them."""
    rank: Positive = 8
    """Rows of the one factor, columns of the other."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product of the factors is scaled by `alpha / rank`."""


class Model(Choice):
    """The model to train."""

    registry = models

    outputs: dict[str, Output] = Field(default={})
    """Named outputs, where size or activation should differ from what the loss implies."""
    init_from: InitFrom | None = None
    """Trained weights to start from: a run's folder, an MLflow model or a `.safetensors` file; or a
    mapping with `weights` and the patterns to `match`."""
    freeze: Patterns = ()
    """Patterns of parameters that are not trained, as `encoder` or `*.bias`. A layer that is
    frozen whole keeps its running statistics too."""
    lora: Lora | None = None
    """Low-rank adaptation of linear layers, as `{match: encoder.*, rank: 8}`. The trained model has
    the products added to its weights."""


class Group(Section):
    """Parameters with options of the optimizer of their own."""

    match: Annotated[Patterns, Field(min_length=1)]
    """Patterns of the parameters, or `biases_and_norms` for all with fewer than two dimensions. A
    parameter is in the first group that names it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The optimizer's options that differ, written beside `match`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        rest = {key: value[key] for key in value if key != "match"}
        return {key: value[key] for key in value if key == "match"} | {"options": rest}

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        options: dict[str, Any] = dumped.pop("options")
        return dumped | options


class Optimizer(Choice):
    """The rule that moves the weights."""

    registry = optimizers

    groups: list[Group] = Field(default=[])
    """Parameters with options of their own, as `{match: encoder, lr: 1e-5}` or
    `{match: biases_and_norms, weight_decay: 0}`."""

    @field_validator("groups")
    @classmethod
    def _options_of_groups(cls, groups: list[Group], info: ValidationInfo) -> list[Group]:
        if "options" not in info.data or "name" not in info.data:  # reported already
            return groups
        name, options = info.data["name"], info.data["options"]
        return [_checked(group, index, name, options) for index, group in enumerate(groups)]


def _checked(group: Group, index: int, name: str, options: dict[str, Any]) -> Group:
    """The group with its options as those of the optimizer are read."""
    model = optimizers[name].options
    try:
        read = model.model_validate({**options, **group.options}).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        text = first["msg"].replace("Input should", "must")
        if first["type"] == "extra_forbidden":
            text = f"not an option of {name} ({', '.join(model.model_fields)})"
        key = ".".join(map(str, ("optimizer.groups", index, *first["loc"])))
        raise PydanticCustomError("fits", "{text}", {"text": f"{key}: {text}"}) from None
    return group.model_copy(update={"options": {key: read[key] for key in group.options}})


class Schedule(Choice):
    """The learning rate over the steps, as a factor of the optimizer's `lr`."""

    registry = schedules

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to its full value."""
    by: Literal["step", "epoch"] = "step"
    """`epoch`: the rate is the same throughout an epoch, and steps in the schedule's options and in
    `warmup_steps` are epochs."""

    @property
    def is_plateau(self) -> bool:
        """Whether it lowers the rate by what validation rows say, not by the step alone."""
        return self.name == "reduce_on_plateau"
