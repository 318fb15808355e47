"""The outcome of `pipeline prove` in MLflow: a run of its own, found by the job's digest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.errors import RecordError
from pipeline.track.deliver import ENVIRONMENT, experiment_id
from pipeline.track.delivery import tracking_uri


def log_proof(proof: dict[str, Any], table: str, experiment: str, storage: Path) -> tuple[str, str]:
    """Record a proof's summary and table; returns run id and tracking URI.

    Raises RecordError when MLflow does not take it.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow

    uri = tracking_uri(storage)
    tags = {
        "pipeline.proved": "yes" if proof["state"] == "held" else "no",
        "pipeline.spec_digest": proof["spec_digest"],
        "pipeline.data_fingerprint": proof["data_fingerprint"],
    }
    if proof["suspects"]:
        tags["pipeline.suspects"] = "; ".join(proof["suspects"])[:5000]
    try:
        client = mlflow.MlflowClient(uri)
        number = experiment_id(client, experiment)
        run = client.create_run(number, run_name=f"prove-{proof['name']}", tags=tags)
        run_id = str(run.info.run_id)
        client.log_text(run_id, table + "\n", "proof.txt")
        client.log_dict(run_id, proof, "proof.json")
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # whatever the server does: the proof itself stands
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RecordError(f"the proof could not be recorded in {uri}: {reason}") from error
    return run_id, uri
