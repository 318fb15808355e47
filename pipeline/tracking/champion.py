"""The model in MLflow's registry: the candidate, and the champion if it is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases of registered models."""
DESCRIPTION = (
    f"`{CANDIDATE}` is the newest version; `{CHAMPION}` the best by its primary metric on the same "
    "validation rows. Each version has its own card."
)
JUDGED = "pipeline.judged."
"""Start of the tags of a version that say how good it is."""


@dataclass(frozen=True)
class Candidate:
    """A model that may become the champion of a registered model."""

    name: str
    """The registered model's."""
    metric: str
    """By which it is judged, of the validation rows."""
    value: float | None
    is_lower_better: bool
    rows: str
    """Digest of these rows."""

    @property
    def tags(self) -> dict[str, str]:
        """What a later model is compared with."""
        value = "" if self.value is None else repr(self.value)
        return {f"{JUDGED}metric": self.metric, f"{JUDGED}value": value, f"{JUDGED}rows": self.rows}

    def why_not(self, champion: Mapping[str, str], name: str) -> str:
        """Why it is not known to be better than the champion `name` with these tags; or nothing."""
        metric, value, rows = (champion.get(key, "") for key in self.tags)
        if self.value is None:
            return f"it has no {self.metric}"
        if not value or metric != self.metric:
            return f"{name} was not judged by {self.metric}"
        if rows != self.rows or not rows:
            return f"{name} was judged on other validation rows"
        sign = -1.0 if self.is_lower_better else 1.0
        if not sign * self.value > sign * float(value):
            return f"{self.metric} {self.value:.6g}, and {name} has {float(value):.6g}"
        return ""


def register(client: Any, run_id: str, model_id: str, text: str, candidate: Candidate) -> str:
    """Make the model a version of a registered one with `text` as its description.

    It gets the alias `candidate`, unless a later run has it; and `champion` too if there is none,
    or if it is better than the present one on the same validation rows. A second call changes
    nothing. Returns what it is now, in words.
    """
    name = candidate.name
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=DESCRIPTION)
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((one for one in versions if one.run_id == run_id), None)  # a run has one model
    if version is None:
        source = f"models:/{model_id}"
        version = client.create_model_version(
            name, source, run_id, tags=candidate.tags, description=text, model_id=model_id
        )
    aliases = []
    if all(int(one.version) <= int(version.version) for one in versions):  # no later run's
        aliases.append(CANDIDATE)
    champion = client.get_registered_model(name).aliases.get(CHAMPION)  # its version, if any
    reason = ""
    if champion is not None and str(champion) != str(version.version):
        tags = client.get_model_version(name, str(champion)).tags
        reason = candidate.why_not(tags, f"version {champion}")
    if not reason:
        aliases.append(CHAMPION)
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version.version)
    text = f"{name} version {version.version}: {' and '.join(aliases) or 'an earlier candidate'}"
    return f"{text}; not {CHAMPION}: {reason}" if reason else text
