"""What the commands print: each function gives lines, and `cli` prints them."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.kubernetes.workers import worker_pods
from pipeline.launch.resources import room
from pipeline.redact import redact
from pipeline.tracking import page

if TYPE_CHECKING:
    from pipeline.checks.batch import Notice
    from pipeline.cluster.client import Submission
    from pipeline.cluster.plan import Plan
    from pipeline.data.cache import Entry
    from pipeline.data.columns import Field
    from pipeline.kubernetes.client import RunState
    from pipeline.kubernetes.doctor import Finding
    from pipeline.kubernetes.submit import Plan as RunPlan
    from pipeline.launch.evaluate import Evaluated
    from pipeline.launch.folds import Folds
    from pipeline.launch.result import Result
    from pipeline.report.compare import Comparison
    from pipeline.rundir.summary import Summary
    from pipeline.train.job import Job
    from pipeline.verify.prove import Outcome, Proof

MAX_SHOWN = 8
"""Input columns that are listed by name."""
MAX_CLASSES = 10
MAX_CELL = 40
"""Characters of a value in a comparison."""
PROOF_HEADER = f"          {'curve':10}{'weights':10}{'difference':13}"


def result_lines(result: Result) -> list[str]:
    """A finished run: the values of its model, and where it is."""
    loss = "no items" if result.loss is None else f"{result.loss:.6g}"
    lines = [f"done  {result.steps} steps, training loss of the last {loss}"]
    if result.ended_early:
        lines.append(f"      ended early: {result.ended_early}")
    if best := result.best:
        score = f"{best['metric']} {best['value']:.6g}"
        lines.append(f"best  step {best['step']} by validation {score}: its weights are the model")
    lines += _scores("validation", result.metrics, result.baselines)
    lines += _decisions(result.decision)
    lines += _scores("test", result.test, result.test_baselines)
    if result.first_difference is not None:
        lines.append(
            f"note  step {result.first_difference} gave other numbers when it was recomputed "
            "after a failure: `pipeline prove` names the component"
        )
    lines.append(f"saved {result.storage}")
    if result.model_uri:
        registered = f", {result.registered}" if result.registered else ""
        lines.append(f"model {result.model_uri}{registered}")
    lines.append(f"mlflow run {result.run_id} in {result.tracking_uri}")
    if result.tracking_uri.startswith("http"):
        address = page.address(result.tracking_uri, result.experiment_id, result.run_id)
        lines.append(f"see   {address}")
    else:
        lines.append(f"see   {_pipeline()} ui {result.storage}")
    return lines


def folds_lines(found: Folds) -> list[str]:
    """What several folds found: each score by fold, its mean and its deviation."""
    num = len(found.results)
    width = max(map(len, found.scores))
    heads = "".join(f"{f'fold {fold}':>12}" for fold in range(1, num + 1))
    lines = [f"done  {num} folds of {found.name}"]
    lines.append(f"      {'':{width}}{'mean':>12}{'std':>12}{heads}")
    for name, values in found.scores.items():
        row = [found.means[name], found.deviations[name], *values]
        cells = "".join("        none" if cell is None else f"{cell:>12.5g}" for cell in row)
        lines.append(f"      {name:{width}}{cells}")
    if found.run_id:
        lines.append(f"mlflow run {found.run_id} in {found.tracking_uri}")
    return lines


def _decisions(decision: Mapping[str, float | None]) -> list[str]:
    """A line for each threshold, with the metric that it was chosen for."""
    lines = []
    for key, value in decision.items():
        kind, _, column = key.partition("/")
        if kind == "threshold" and value is not None:
            name = next(k for k in decision if k.partition("/")[2] == column and k != key)
            score = f"validation {name.partition('/')[0]} {decision[name]:.6g}"
            lines.append(f"best  threshold {value:.6g} for {column}: {score}; above, at 0.5")
        elif kind == "threshold":
            lines.append(
                f"note  {column} keeps its threshold: its validation rows are all yes or all no"
            )
    return lines


def evaluation_lines(found: Evaluated) -> list[str]:
    """What an evaluation found, and where it is recorded."""
    dropped = f", {found.num_dropped:,} dropped for missing values" if found.num_dropped else ""
    lines = [f"done  {found.num_rows:,} rows evaluated{dropped}"]
    lines += _scores("test", found.metrics, found.baselines)
    lines += [f"note  {note}" for note in found.notes]
    if found.run_id:
        lines.append(f"mlflow run {found.run_id} in {found.tracking_uri}")
    return lines


def _scores(
    split: str, metrics: Mapping[str, float | None], baselines: Mapping[str, float | None]
) -> list[str]:
    """A line for each value, beside what a constant prediction has."""
    lines = []
    for name, value in metrics.items():
        shown = "no value" if value is None else format(value, ".6g")
        constant = baselines.get(name)
        beside = "" if constant is None else f" (a constant prediction: {constant:.6g})"
        lines.append(f"      {split} {name} {shown}{beside}")
    return lines


def _pipeline() -> str:
    """This command as it can be typed here: with its folder where that is not on PATH."""
    beside = Path(sys.executable).with_name("pipeline")
    if shutil.which("pipeline") or not beside.exists():
        return "pipeline"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def check_lines(job: Job, notices: Sequence[Notice]) -> list[str]:
    """A checked job: rows, columns, model, and what its user should know."""
    inputs = [f"{field.name} ({field.kind})" for field in job.fields if field.is_input]
    targets = [_target(field) for field in job.fields if field.is_target]
    dropped = job.facts.dropped
    drops = f", {dropped:,} dropped for missing values" if dropped else ""
    more = ", ..." if len(inputs) > MAX_SHOWN else ""
    test = f", {job.num_test_rows:,} test" if job.test else ""
    return [
        f"ok    {job.spec.name}",
        f"rows  {job.num_rows:,} training, {job.num_validation_rows:,} validation{test}{drops}",
        f"in    {', '.join(inputs[:MAX_SHOWN])}{more}",
        f"out   {', '.join(targets) or '(no target)'}",
        f"model {_model(job)}",
        *(f"note  {notice}" for notice in notices),
    ]


def _model(job: Job) -> str:
    """The model's size, and what it gives to the losses."""
    import torch

    bound = job.objective()
    num_trained = sum(p.numel() for p in bound.parameters() if p.requires_grad)
    num_frozen = sum(p.numel() for p in bound.parameters() if not p.requires_grad)
    size = f"{num_trained:,} parameters"
    chosen = job.spec.model
    if num_frozen:
        frozen = dict.fromkeys([*chosen.freeze, *(chosen.lora.match if chosen.lora else ())])
        named = f" ({', '.join(frozen)})" if frozen else ""
        size += f" trained, {num_frozen:,} frozen{named}"
    if chosen.init_from:
        size += f", from {chosen.init_from.weights}"
    with torch.no_grad():
        shapes = {name: list(output.shape[1:]) for name, output in bound.predict(job.trial).items()}
    outputs = [f"{name} [{', '.join(map(str, ['N', *shape]))}]" for name, shape in shapes.items()]
    return f"{chosen.name}, {size}, gives {', '.join(outputs)}"


def _target(field: Field) -> str:
    """A target column with its classes and how many training rows each has."""
    if not field.counts or not field.vocabulary:
        return f"{field.name} ({field.kind})"
    both = list(zip(field.vocabulary, field.counts, strict=True))
    classes = ", ".join(f"{value} {count:,}" for value, count in both[:MAX_CLASSES])
    more = ", ..." if len(both) > MAX_CLASSES else ""
    positive = f"; {both[-1][0]} is positive" if len(both) == 2 else ""
    return f"{field.name} ({classes}{more}{positive})"


def cache_lines(entries: Sequence[Entry], folder: Path) -> list[str]:
    """What the cache holds, and how large it is."""
    lines = []
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        more = f" and {len(entry.files) - 1} more" if len(entry.files) > 1 else ""
        name = f"{entry.files[0]}{more}" if entry.files else "(damaged, or of another version)"
        size = size_text(entry.size)
        rows = f"{entry.num_rows:>13,} rows"
        lines.append(f"{entry.name[:8]}  {size:>9}  {used}  {rows}  {name}")
    total = size_text(sum(entry.size for entry in entries))
    return [*lines, f"{len(entries)} in {folder}, {total}"]


def size_text(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def proof_row(outcome: Outcome) -> str:
    """One line of the table, under `curve`, `weights` and `difference`."""
    difference = "" if outcome.difference is None else f"{outcome.difference:.1e}"
    difference = "0" if outcome.difference == 0 else difference
    is_broken = outcome.verdict == "broken" and outcome.first_step is not None
    step = f" from step {outcome.first_step}" if is_broken else ""
    text = f": {outcome.text}" if outcome.text else ""
    return (
        f"{outcome.promise:10}{outcome.curve_sha256[:8]:10}{outcome.weights_sha256[:8]:10}"
        f"{difference:13}{outcome.verdict + step}  {outcome.title}{text}"
    )


def proof_conclusion(proof: Proof) -> list[str]:
    """What the table comes to."""
    compared = [o for o in proof.outcomes if o.verdict not in ("not promised", "reference")]
    held = [o for o in compared if o.verdict == "held"]
    ways = (
        f"{len(held)} of {len(compared)} other ways to run the first {proof.steps} of "
        f"{proof.all_steps} steps of {proof.name} are the same"
    )
    blamed = "a component breaks the promise" if proof.suspects else ""
    lines = [f"held: {ways}" if proof.is_kept else f"broken: {blamed and f'{blamed}; '}{ways}"]
    if not any(o.promise == "bits" for o in compared):
        lines.append(
            "note  bits were not compared: that takes more than one worker (--workers 1,2)"
        )
    lines += [f"suspect  {suspect}" for suspect in proof.suspects]
    return [*lines, "on    " + ", ".join(f"{key} {value}" for key, value in proof.bits.items())]


def runs_lines(runs: Sequence[Summary]) -> list[str]:
    """A table of runs: state, steps, the metric that tells most beside its baseline, times."""
    head = ["run", "state", "steps", "metric", "value", "constant", "took", "age"]
    return _table([head, *(_run_row(one) for one in runs)])


def _run_row(one: Summary) -> list[str]:
    name = one.record.primary_metric.partition("/")[2]
    if name not in one.metrics:  # without validation rows
        name = f"test/{name}"
    value, constant = one.metrics.get(name), one.baselines.get(name)
    steps = f"{one.steps:,}/{one.record.num_steps:,}"
    shown = "" if value is None else name
    numbers = ["" if number is None else f"{number:.4g}" for number in (value, constant)]
    times = [_duration(one.seconds), _duration(one.age)]
    return [one.run.name, one.state, steps, shown, *numbers, *times]


def plan_lines(plan: Plan) -> list[str]:
    """What submitting a job would do, before it is done."""
    spec, workers, last = plan.spec, plan.spec.workers, plan.last
    files = [f"{p} ({size_text(f.stat().st_size)})" for p, f in plan.package.files.items()]
    more = f" and {len(files) - MAX_SHOWN} more" if len(files) > MAX_SHOWN else ""
    least, most = workers.least, workers.most
    number = str(most) if least == most else f"{least} to {most}"
    actions = {"start": f"starts {plan.id}"}
    if last is not None:
        state = last.status.lower()
        actions["resume"] = f"resumes {last.id}, which has {state}, as {plan.id}"
        actions["attach"] = f"attaches to {last.id}, which is {state}"
        actions["tell"] = f"shows the result of {last.id}"
    where = plan.variables.get("MLFLOW_TRACKING_URI", "as the cluster is set up")
    nodes = f"{len(plan.nodes)} node{'s' if len(plan.nodes) != 1 else ''}"
    rivals = [f"{one.id}, of the same name, is {one.status.lower()}" for one in plan.rivals]
    return [
        f"job      {spec.name}: {spec.model.name}, {' + '.join(term.name for term in spec.loss)}",
        f"cluster  {plan.cluster.address}, Ray {plan.cluster.version}, {nodes}",
        f"workers  {number}; there is room for {room(workers, plan.nodes, is_now=True)} now",
        f"sends    {', '.join(files[:MAX_SHOWN])}{more}",
        f"mlflow   experiment {plan.metadata['experiment']}, {where}",
        f"storage  {plan.storage}",
        *(f"note     {note}" for note in [*plan.notes, *rivals]),
        f"this     {actions[plan.action]}",
    ]


def submission_lines(found: Sequence[Submission], said: Mapping[str, str]) -> list[str]:
    """A table of what was submitted to a cluster, the newest first; `said` by some, by their id."""
    rows = [["submission", "job", "status", "took", "age", "says"]]
    for one in found:
        took = _duration((one.ended or time.time()) - one.started) if one.started else ""
        age = _duration(time.time() - one.started) if one.started else ""
        is_well = one.status in ("RUNNING", "SUCCEEDED")
        says = said.get(one.id) or ("" if is_well else one.message.partition("\n")[0])
        rows.append([one.id, one.job, one.status.lower(), took, age, says])
    return _table(rows)


def run_plan_lines(plan: RunPlan) -> list[str]:
    """What submitting a run to Kubernetes would do, before it is done."""
    run, last = plan.run, plan.last
    spec, limits = run.spec, run.limits
    group = worker_pods(spec.workers, run.platform)
    pods = str(group.most) if not group.is_elastic else f"{group.least} to {group.most}"
    more = f" to {spec.workers.most}" if group.is_elastic else ""
    each = f"{group.gpus} GPUs, " if group.gpus else ""
    actions = {"start": f"starts {run.name}"}
    if last is not None:
        state = last.state.lower()
        actions["resume"] = f"resumes {run.name}, which is {state}"
        actions["attach"] = f"attaches to {run.name}, which is {state}"
        actions["tell"] = f"shows the result of {run.name}"
    rivals = [f"{one.name}, of the same job, is {one.state.lower()}" for one in plan.rivals]
    return [
        f"job      {spec.name}: {spec.model.name}, {' + '.join(term.name for term in spec.loss)}",
        f"cluster  {plan.cluster.address}, namespace {plan.cluster.namespace}",
        f"workers  {spec.workers.least}{more}, in {pods} pods, each of {each}{group.cpus} CPUs and "
        f"{group.memory}; {run.image}",
        f"mlflow   {run.platform.mlflow_uri}",
        f"storage  {redact(run.storage)}",
        f"limits   {_duration(limits.active_seconds)} an attempt, {limits.retries} retries",
        *(f"note     {note}" for note in [*plan.notes, *rivals]),
        f"this     {actions[plan.action]}",
    ]


def run_lines(found: Sequence[RunState]) -> list[str]:
    """A table of the runs in a namespace, the newest first."""
    rows = [["run", "job", "state", "failed", "took", "age", "says"]]
    for one in found:
        took = _duration((one.ended or time.time()) - one.started) if one.started else ""
        age = _duration(time.time() - one.started) if one.started else ""
        says = "" if one.succeeded else " ".join([one.reason, one.message.partition("\n")[0]])
        state = "leaving" if one.is_leaving else one.state.lower()
        rows.append([one.name, one.job, state, str(one.failures), took, age, says.strip()])
    return _table(rows)


def finding_lines(one: Finding) -> list[str]:
    """What a cluster has or lacks, and how to mend it."""
    word = "ok" if one.is_well else "missing" if one.is_needed else "note"
    lines = [f"{word:9}{one.what}"]
    return lines if one.is_well or not one.fix else [*lines, f"{'':9}{one.fix}"]


def comparison_lines(comparison: Comparison) -> list[str]:
    """Runs side by side: a column each."""
    names = [one.run.name for one in comparison.runs]
    states = [f"{one.state}, {one.steps:,} steps" for one in comparison.runs]
    rows = [["", *names], ["state", *states]]
    rows += [[key, *map(_short, values)] for key, values in comparison.changes.items()]
    for name, values in comparison.metrics.items():
        rows.append([name, *("-" if value is None else f"{value:.6g}" for value in values)])
    lines = _table(rows)
    for name, difference, same_rows in zip(
        names[1:], comparison.differences, comparison.same_rows, strict=True
    ):
        if difference is not None and difference.is_longer:
            text = f"has the same curve as {names[0]} before step {difference.first_step:,}"
            text += ", where one of them ends"
        elif difference is not None:
            size = f", by up to {difference.largest:.1e} of the loss" if difference.largest else ""
            text = f"differs from {names[0]} from step {difference.first_step:,} on{size}"
        elif comparison.has_curve:
            text = f"has the same curve as {names[0]}"
        else:
            text = f"has no curve, as {names[0]}"
        lines.append(f"{name} {text}{'' if same_rows else ' (on other rows)'}")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def _duration(seconds: float) -> str:
    """A time as people say it: its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
