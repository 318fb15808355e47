"""What is sent to a cluster, and what is not."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline import plugins
from pipeline.cluster import package as packages
from pipeline.cluster.package import entrypoint, pack
from pipeline.data.locate import locate_names
from pipeline.errors import DataError, UsageError
from pipeline.spec import load


def job(folder: Path, **data: Any) -> tuple[Path, Any]:
    path = folder / "jobs" / "job.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"name": "t", "model": "linear", "loss": "mse", "data": {"target": "y", **data}}
    path.write_text(json.dumps(tree))
    return path, load(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("data/a.csv", "data/b.csv", "data/.hidden.csv", "jobs/rows.csv", "secret.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("y\n1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "places"),
    [
        ({"train": "rows.csv"}, ["job/job.yaml", "job/rows.csv"]),
        ({"train": "../data"}, ["job/data/a.csv", "job/data/b.csv", "job/jobs/job.yaml"]),
        ({"train": "../data/a*.csv", "validation": "rows.csv"},
         ["job/data/a.csv", "job/jobs/job.yaml", "job/jobs/rows.csv"]),
        ({"train": "sample:diabetes"}, ["job/job.yaml"]),
        ({"train": "../../{name}/data/a.csv"},
         ["job/{name}/data/a.csv", "job/{name}/jobs/job.yaml"]),
    ],
)  # fmt: skip
def test_files_that_the_spec_names_stand_as_they_do_here(
    data: dict[str, Any], places: list[str], folder: Path, tmp_path: Path
) -> None:
    data = {key: value.format(name=folder.name) for key, value in data.items()}
    places = [place.format(name=folder.name) for place in places]
    path, spec = job(folder, **data)
    package = pack(path, spec, [])
    assert sorted(package.files) == places
    out = tmp_path / "out"
    out.mkdir()
    package.write(out, {"mlflow.user": "me"})
    sent = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert sent == {*places, "source.json"}
    sent_job = out / package.job
    assert load(sent_job).data == spec.data
    if not data["train"].startswith("sample"):
        assert locate_names("data.train", data["train"], sent_job.parent)


def test_absolute_names_and_uris_are_left_to_the_cluster(folder: Path) -> None:
    train = [str(folder / "data" / "a.csv"), "s3://bucket/b.csv?version=2"]
    package = pack(*job(folder, train=train, validation="rows.csv"), [])
    assert sorted(package.files) == ["job/job.yaml", "job/rows.csv"]
    assert package.left_out == {"data.train": f"{train[0]}, s3://bucket/b.csv?version=***"}


def test_custom_modules_go_with_what_they_import_from_their_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own_sent.py").write_text("import beside_sent\n")
    (folder / "beside_sent.py").write_text("")
    monkeypatch.chdir(folder)
    modules = plugins.load(["own_sent.py"])
    path, spec = job(folder, train="rows.csv")
    package = pack(path, spec, modules)
    assert {"own_sent.py", "beside_sent.py"} <= set(package.files)
    (folder / "with_data").mkdir()
    (folder / "with_data" / "__init__.py").write_text("")
    (folder / "with_data" / "words.txt").write_text("a")
    assert "with_data/words.txt" in pack(path, spec, plugins.load(["with_data"])).files
    before = package.sha256
    (folder / "beside_sent.py").write_text("x = 1\n")
    assert pack(path, spec, modules).sha256 != before
    words = shlex.split(entrypoint(package, ["name=a b"], ["own_sent.py"], fresh=True))
    assert words[4:] == ["job/job.yaml", "--json", "--set", "name=a b", "--import", "own_sent.py",
                         "--fresh"]  # fmt: skip


def test_too_much_is_refused_with_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "MOST_BYTES", 2**20)
    (folder / "data" / "b.csv").write_bytes(b"y\n" + b"1\n" * 2**20)
    with pytest.raises(UsageError, match=r"2 MiB of local files.*\n +2.0 MiB  .*b\.csv(.|\n)*URI"):
        pack(*job(folder, train="../data"), [])


def test_a_file_that_is_not_there_and_a_password_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: nowhere\.csv"):
        pack(*job(folder, train="nowhere.csv"), [])
    package = pack(*job(folder, train="rows.csv"), [])
    with pytest.raises(UsageError, match=r"data.train=s3://\*\*\*@x: a password"):
        entrypoint(package, ["data.train=s3://me:geheim@x"], [], fresh=False)
    assert "version=2" in entrypoint(package, ["data.train=s3://x/y?version=2"], [], fresh=False)
    path, spec = job(folder, train="rows.csv")
    path.write_text(f"{path.read_text()}\ncheckpoint: {{copy_to: 's3://me:geheim@x'}}\n")
    with pytest.raises(UsageError, match=r"^job\.yaml, line \d+: a password would be seen"):
        pack(path, spec, [])


@pytest.mark.parametrize(
    ("weights", "sent", "left_out"),
    [
        ("../trained", ["job/trained/done.json", "job/trained/weights.pt"], None),
        ("w.safetensors", ["job/w.safetensors"], None),
        ("models:/flights@champion", [], "models:/flights@champion"),
        ("trained-7", [], "trained-7"),
        ("/shared/w.safetensors", [], "/shared/w.safetensors"),
    ],
)
def test_initial_weights_go_along_where_they_are_here(
    weights: str, sent: list[str], left_out: str | None, folder: Path
) -> None:
    for name in ("trained/weights.pt", "trained/done.json", "trained/more/x", "jobs/w.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    path, spec = job(folder, train="sample:diabetes")
    spec = load(path, {"model.init_from": weights})
    package = pack(path, spec, [])
    assert sorted(set(package.files) - {package.job}) == sent
    assert package.left_out == ({"model.init_from": left_out} if left_out else {})
