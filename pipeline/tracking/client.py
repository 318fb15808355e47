"""All that knows MLflow's client: runs, their metrics, params, files, data sets and models."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.errors import RecordError
from pipeline.redact import redact
from pipeline.rundir.records import DataFacts, State
from pipeline.tracking.champion import Candidate, register
from pipeline.tracking.names import mlflow_key, tracking_uri, with_password
from pipeline.tracking.note import CONTEXTS, ProofLink, with_proof
from pipeline.tracking.source import source_tags
from pipeline.tracking.values import Value

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default blocks for minutes; we retry ourselves
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
SQLITE = "sqlite:///"
LONGEST_TAG, LONGEST_PARAM = 5000, 6000
LONGEST_TEXT = 60_000
"""MLflow's limit of a data set's source and schema."""
LONGEST_DIGEST = 36
MAX_PARAMS = 100
"""Most params that MLflow takes in one request."""
LAUNCHER = "pipeline.launcher"
"""Tag of a run: id of the command that records it."""
PRIMARY_METRIC = "mlflow.experiment.primaryMetric.name"
GREATER_IS_BETTER = "mlflow.experiment.primaryMetric.greaterIsBetter"
NOTE = "mlflow.note.content"
"""Tag that the page shows as the run's description."""
PROVED = "pipeline.proved"
"""Tag of a run of `pipeline prove`: yes or no."""
SPEC_DIGEST, FINGERPRINT = "pipeline.spec_digest", "pipeline.data_fingerprint"
"""Tags that tell a job and its rows."""
ERROR = "pipeline.error"
"""Tag of a failed run: why it failed."""
STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


def dataset_name(data: DataFacts) -> str:
    """The name of a job's rows, of any split."""
    return data.name[:500]


class Client:
    """MLflow at one address; every call raises what MLflow raises."""

    def __init__(self, uri: str) -> None:
        """`uri` as it can be used, with its password."""
        prepare_environment()
        import mlflow

        if uri.startswith(SQLITE):
            make_database(Path(uri.removeprefix(SQLITE)))
        mlflow.set_tracking_uri(uri)
        self._client = mlflow.MlflowClient()

    def experiment_id(self, name: str) -> str:
        """Id of the experiment of that name, created or restored where need be."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # a server knows where artifacts go; without one they stand beside the database
            location = None
            if self._client.tracking_uri.startswith(SQLITE):
                database = Path(self._client.tracking_uri.removeprefix(SQLITE)).resolve()
                location = (database.parent / "mlflow-artifacts").as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:  # another run created it at the same moment
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        elif experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def choose_primary_metric(self, experiment_id: str, key: str, is_lower_better: bool) -> None:
        """Let the page show this metric first, unless somebody has chosen one."""
        tags = self._client.get_experiment(experiment_id).tags
        if PRIMARY_METRIC not in tags:
            is_greater = str(not is_lower_better).lower()
            self._client.set_experiment_tag(experiment_id, PRIMARY_METRIC, mlflow_key(key))
            self._client.set_experiment_tag(experiment_id, GREATER_IS_BETTER, is_greater)

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
        """A new run's id."""
        short = {key: value[:LONGEST_TAG] for key, value in tags.items()}
        run = self._client.create_run(experiment_id, run_name=name, tags=short)
        return str(run.info.run_id)

    def find_run(self, experiment_id: str, token: str) -> str | None:
        """The run with this token, if the answer to its creation, or what was noted, got lost."""
        query = f"tags.`pipeline.run` = '{token}'"
        runs = self._client.search_runs([experiment_id], query)
        return str(runs[0].info.run_id) if runs else None

    def tag(self, run_id: str, key: str) -> str:
        """A tag of the run; empty if it has none of that name."""
        return str(self._client.get_run(run_id).data.tags.get(key, ""))

    def experiment_of(self, run_id: str) -> str:
        """Id of the experiment that the run is in."""
        return str(self._client.get_run(run_id).info.experiment_id)

    def ended_at(self, run_id: str) -> int:
        """When a run ended, in milliseconds since 1970; 0 if it has not."""
        return int(self._client.get_run(run_id).info.end_time or 0)

    def launcher(self, run_id: str) -> str:
        """Id of the command that records the run."""
        return self.tag(run_id, LAUNCHER)

    def take_over(self, run_id: str, launcher: str) -> None:
        """The run is resumed by this command, which records it from now on."""
        self._client.set_tag(run_id, LAUNCHER, launcher)
        if ERROR in self._client.get_run(run_id).data.tags:  # of the time before
            self._client.delete_tag(run_id, ERROR)
        self._client.update_run(run_id, status="RUNNING")

    def uploaded(self, run_id: str) -> dict[str, int]:
        """The last step of each kind of point that MLflow has.

        Steps that another machine uploaded and that are recomputed have another time here.
        """
        steps: dict[str, int] = {}
        for key in self._client.get_run(run_id).data.metrics:
            kind = key.partition("/")[0]
            if kind not in ("train", "validation"):
                continue
            history = self._client.get_metric_history(run_id, key)
            steps[kind] = max(steps.get(kind, -1), *(metric.step for metric in history))
        return steps

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Params that the run does not have yet: another machine may have told them."""
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params
        new = [Param(k, v[:LONGEST_PARAM]) for k, v in params.items() if k not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(run_id, params=new[start : start + MAX_PARAMS])

    def log_metrics(self, run_id: str, metrics: Sequence[Value]) -> None:
        """Values of metrics, at most 1000 of them; those that are there already are dropped."""
        from mlflow.entities import Metric

        entities = [Metric(one.key, one.value, one.time, one.step) for one in metrics]
        self._client.log_batch(run_id, metrics=entities)

    def log_model_metrics(
        self, run_id: str, model_id: str, metrics: Sequence[Value], data: DataFacts
    ) -> None:
        """Values of the run's metrics that are the model's too, with the rows they are of."""
        from mlflow.entities import Metric

        entities = []
        for one in metrics:
            group = one.key.partition("/")[0]
            split = "validation" if group == "best" else group
            digest = data.digests.get(split, "")[:LONGEST_DIGEST]
            rows = {"dataset_name": dataset_name(data), "dataset_digest": digest} if digest else {}
            of_model = {"model_id": model_id, "run_id": run_id, **rows}
            entities.append(Metric(one.key, one.value, one.time, one.step, **of_model))
        if entities:
            self._client.log_batch(run_id, metrics=entities)

    def log_data(self, run_id: str, data: DataFacts) -> None:
        """The rows of each split as input of the run; all statistics in `data.json`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = {"files": data.files, "num_files": data.num_files}
        columns = [
            {
                "name": name,
                "type": f"{column.kind} ({column.type})",
                "required": not data.profile.get(name, {}).get("missing"),
            }
            for name, column in data.columns.items()
        ]
        texts = [json.dumps(source), json.dumps({"mlflow_colspec": columns})]
        short_source, schema = (text if len(text) <= LONGEST_TEXT else "{}" for text in texts)
        inputs = []
        for split, digest in data.digests.items():
            profile = {"num_rows": data.rows[split], "digest": digest, "dropped": data.dropped}
            dataset = Dataset(
                name=dataset_name(data),
                digest=digest[:LONGEST_DIGEST],
                source_type="files",
                source=short_source,
                schema=schema,
                profile=json.dumps(profile),
            )
            context = CONTEXTS[split]
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self._client.log_inputs(run_id, datasets=inputs)
        everything = {
            "name": data.name,
            "digests": data.digests,
            "source": source,
            "columns": {name: column.model_dump() for name, column in data.columns.items()},
            "profile": {
                "fingerprint": data.fingerprint,
                "rows": data.rows,
                "dropped": data.dropped,
                "columns": data.profile,
            },
        }
        self._client.log_dict(run_id, everything, "data.json")

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """A text file of the run."""
        self._client.log_text(run_id, text, name)

    def log_file(self, run_id: str, path: Path) -> None:
        """A file of the run."""
        self._client.log_artifact(run_id, str(path))

    def log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Files of the run, by their path in it."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._client.log_artifacts(run_id, folder)

    def log_dict(self, run_id: str, value: Mapping[str, Any], name: str) -> None:
        """A JSON file of the run."""
        self._client.log_dict(run_id, dict(value), name)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tags of the run, cut where they are too long."""
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value[:LONGEST_TAG])

    def end_run(self, run_id: str, state: State) -> None:
        """The run has ended."""
        self._client.set_terminated(run_id, STATUS[state])

    def find_proof(self, experiment_id: str, tags: Mapping[str, str]) -> ProofLink | None:
        """The last `pipeline prove` of the same job and rows that was recorded."""
        query = f"tags.`{PROVED}` LIKE '%' AND {_same_job(tags)}"
        runs = self._client.search_runs([experiment_id], query, max_results=1)
        if not runs:
            return None
        is_kept = runs[0].data.tags[PROVED] == "yes"
        return ProofLink(is_kept, str(runs[0].info.run_id), int(runs[0].info.start_time))

    def link_proof(self, experiment_id: str, tags: Mapping[str, str], proof: ProofLink) -> None:
        """Let the runs of the same job and rows say in their notes that it was proved."""
        for run in self._client.search_runs([experiment_id], _same_job(tags)):
            text = run.data.tags.get(NOTE, "")
            if with_proof(text, proof, experiment_id) != text:
                self.set_tags(run.info.run_id, {NOTE: with_proof(text, proof, experiment_id)})

    def create_model(self, run_id: str) -> str:
        """Id of the run's model, created now unless an earlier try did."""
        run = self._client.get_run(run_id)
        experiment_id = run.info.experiment_id
        query = f"source_run_id = '{run_id}'"
        models = self._client.search_logged_models([experiment_id], query) or [
            self._client.create_logged_model(
                experiment_id, "model", source_run_id=run_id, params=run.data.params
            )
        ]
        return str(models[0].model_id)

    def link_model(self, run_id: str, model_id: str, step: int) -> None:
        """The model is an output of the run, after `step` steps; a second link is refused."""
        from mlflow.entities import LoggedModelOutput

        if model_id not in self.model_ids(run_id):
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)])

    def describe_model(self, model_id: str, text: str) -> None:
        """The model's description on its page."""
        self._client.set_logged_model_tags(model_id, {NOTE: text[:LONGEST_TAG]})

    def register(self, run_id: str, model_id: str, text: str, candidate: Candidate) -> str:
        """Make the model a version of a registered one, and say what it is now."""
        return register(self._client, run_id, model_id, text[:LONGEST_TAG], candidate)

    def home_of(self, model_id: str) -> tuple[str, str]:
        """Ids of the run that recorded a model, and of its experiment."""
        model = self._client.get_logged_model(model_id)
        return str(model.source_run_id), str(model.experiment_id)

    def model_ids(self, run_id: str) -> list[str]:
        """Ids of the run's models."""
        outputs = self._client.get_run(run_id).outputs
        return [str(output.model_id) for output in outputs.model_outputs] if outputs else []


def _same_job(tags: Mapping[str, str]) -> str:
    """A search for runs of one spec on the same rows."""
    return " AND ".join(f"tags.`{key}` = '{tags[key]}'" for key in (SPEC_DIGEST, FINGERPRINT))


def prepare_environment() -> None:
    """Settings that MLflow reads while it is imported; a user's own setting wins."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def make_database(path: Path) -> None:
    """Let MLflow create its tables in a temporary file: half of them could not be repaired."""
    import mlflow

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        temporary = path.with_name(f".{path.name}.new")
        for left in path.parent.glob(f"{temporary.name}*"):  # by one that was killed
            left.unlink()
        mlflow.MlflowClient(f"{SQLITE}{temporary}").search_experiments(max_results=1)
        temporary.replace(path)


@contextmanager
def recording(failure: str, uri: str) -> Iterator[None]:
    """Raise RecordError, which begins with `failure`, for whatever MLflow does not take.

    What was to be recorded stands by itself, whatever the server does.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RecordError(f"{failure} in {redact(uri)}: {reason}") from error


def log_proof(
    proof: Mapping[str, Any],
    tags: Mapping[str, str],
    table: str,
    name: str,
    experiment: str,
    storage: Path,
) -> tuple[str, str]:
    """Record what `pipeline prove` found as a run of its own; returns run id and tracking URI.

    Raises RecordError when MLflow does not take it.
    """
    uri = tracking_uri(storage)
    with recording("the proof could not be recorded", uri):
        client = Client(with_password(uri))
        experiment_id = client.experiment_id(experiment)
        note = f"```text\n{table}\n```"
        described = {**tags, **source_tags(), NOTE: note}
        run_id = client.create_run(experiment_id, f"prove-{name}", described)
        client.log_text(run_id, table + "\n", "proof.txt")
        client.log_dict(run_id, proof, "proof.json")
        client.end_run(run_id, "finished")
        proof_link = ProofLink(tags[PROVED] == "yes", run_id, int(1000 * time.time()))
        client.link_proof(experiment_id, tags, proof_link)
    return run_id, uri
