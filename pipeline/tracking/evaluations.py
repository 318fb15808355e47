"""What an evaluation of a recorded model found: a run below the one that trained it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pipeline.rundir.records import DataFacts, Numbers
from pipeline.tracking.client import Client, recording
from pipeline.tracking.names import PARENT, with_password
from pipeline.tracking.source import source_tags
from pipeline.tracking.values import values


def record_evaluation(
    tracking_uri: str,
    model_id: str,
    name: str,
    data: DataFacts,
    metrics: Numbers,
    facts: Mapping[str, Any],
    page: str,
) -> str:
    """Record the metrics on the model, with the rows that they are of; returns the new run's id.

    `page` is the report. Raises RecordError when MLflow does not take it.
    """
    with recording("the evaluation is not recorded", tracking_uri):
        client = Client(with_password(tracking_uri))
        run_id, experiment_id = client.home_of(model_id)
        new = client.create_run(experiment_id, name, {**source_tags(), PARENT: run_id})
        client.log_data(new, data)
        found = list(values("test", metrics, int(1000 * time.time()), 0))
        client.log_model_metrics(new, model_id, found, data)
        client.log_text(new, page, "report.html")
        client.log_dict(new, facts, "evaluation.json")
        client.end_run(new, "finished")
    return new
