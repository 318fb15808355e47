"""The run above those of several folds: what they found on the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.rundir.records import Numbers
from pipeline.tracking.client import Client, recording
from pipeline.tracking.names import PARENT, with_password
from pipeline.tracking.source import source_tags
from pipeline.tracking.values import values

FOLDS = "pipeline.folds"
"""Tag of the run above: how many folds there are."""


def record_folds(
    tracking_uri: str,
    run_ids: Sequence[str],
    name: str,
    params: Mapping[str, str],
    scores: Mapping[str, Sequence[float | None]],
    summary: Numbers,
) -> str:
    """Put a run above those of the folds, with their `scores` by fold and the `summary` of them.

    The run that an earlier call put there is taken again. Returns its id. Raises RecordError when
    MLflow does not take it.
    """
    with recording("the folds are not recorded", tracking_uri):
        client = Client(with_password(tracking_uri))
        parent = client.tag(run_ids[0], PARENT)
        if not parent:
            tags = {**source_tags(), FOLDS: str(len(run_ids))}
            parent = client.create_run(client.experiment_of(run_ids[0]), name, tags)
        now = client.ended_at(run_ids[-1])  # values that are there already are not told twice
        client.log_params(parent, params)
        found = [
            value
            for fold in range(len(run_ids))
            for key, column in scores.items()
            for value in values("fold", {key: column[fold]}, now, fold + 1)
        ]
        found += [
            value
            for key, number in summary.items()
            for value in values(key.partition("/")[0], {key.partition("/")[2]: number}, now, 0)
        ]
        client.log_metrics(parent, found)
        client.log_dict(parent, {"runs": list(run_ids), "scores": dict(scores)}, "folds.json")
        for run_id in run_ids:
            client.set_tags(run_id, {PARENT: parent})
        client.end_run(parent, "finished")
    return parent
