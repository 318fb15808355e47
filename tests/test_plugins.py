"""Own components: registered by name, imported by the operator, never by a spec."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline import plugins, registry
from pipeline.errors import ContractError, UsageError
from tests.conftest import Command, Write


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    before = {name: dict(r.entries) for name, r in registry.REGISTRIES.items()}
    yield
    for name, r in registry.REGISTRIES.items():
        r._entries.clear()
        r._entries.update(before[name])


def module(folder: Path, name: str, code: str) -> str:
    path = folder / f"{name}.py"
    path.write_text("import torch\nfrom torch import nn\nimport pipeline\n" + textwrap.dedent(code))
    return str(path)


def test_a_function_of_prediction_and_target_is_a_loss(job: Write, tmp_path: Path) -> None:
    own = module(tmp_path, "own_function", """
        @pipeline.losses.register("biased")
        def biased(prediction, target, *, factor: float = 2.0):
            '''Costs more below.'''
            error = target - prediction
            return torch.where(error > 0, factor * error, -error)
    """)  # fmt: skip
    result = pipeline.run(job({"loss": {"name": "biased", "factor": 3}}), imports=[own])
    assert result.steps == 6


def test_a_module_with_reduction_is_a_loss_of_elements(job: Write, tmp_path: Path) -> None:
    own = module(tmp_path, "own_module", """
        @pipeline.losses.register("scaled")
        class Scaled(nn.Module):
            '''Squared error with a scale that is learned.'''
            def __init__(self, *, start: float = 1.0, reduction: str = "mean"):
                super().__init__()
                self.scale, self.reduction = nn.Parameter(torch.tensor(start)), reduction
            def forward(self, prediction, target):
                items = (prediction - target) ** 2 / self.scale + self.scale.log()
                return items if self.reduction == "none" else items.mean()
    """)  # fmt: skip
    changes = {"loss": {"name": "scaled", "start": 2.0}, "optimizer.lr": 1e-5}
    result = pipeline.run(job(changes), imports=[own])
    from pipeline.train.weights import load_weights

    weights = load_weights(Path(result.storage) / "weights.pt")
    assert float(weights["heads.0.scale"]) != 2.0, "the loss's own parameter is trained"


def test_a_custom_model_gets_columns_and_options(job: Write, tmp_path: Path) -> None:
    own = module(tmp_path, "own_model", """
        from pipeline.models.parts import Features

        @pipeline.models.register("twice")
        class Twice(nn.Module):
            '''Two layers.'''
            def __init__(self, inputs, outputs, *, width: int = 4):
                super().__init__()
                self.features = Features(inputs)
                self.layers = nn.Sequential(
                    nn.Linear(self.features.width, width), nn.Tanh(), nn.Linear(width, 1))
            def forward(self, batch):
                return self.layers(self.features(batch)).squeeze(1)
    """)  # fmt: skip
    result = pipeline.run(job({"model": {"name": "twice", "width": 3}}), imports=[own])
    assert result.model.predict({"a": [1.5], "b": [2]}).shape == (1, 1)


CODE = """
    @pipeline.losses.register("{name}")
    def {name}(prediction, target):
        '''A loss.'''
        {body}
"""


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("averaged", "return ((prediction - target) ** 2).mean()", "leave out .mean()"),
        ("coupled", "return (prediction - target) ** 2 / (prediction ** 2).mean()", "couples"),
        ("crashing", "return prediction.no_such_method()", "cannot be computed"),
        ("endless", "return (prediction - target) / 0", "not finite"),
    ],
)
def test_a_loss_that_cannot_be_exact_is_refused_with_the_fix(
    name: str, body: str, expected: str, job: Write, tmp_path: Path, command: Command
) -> None:
    own = module(tmp_path, f"own_{name}", CODE.format(name=name, body=body))
    code, _, err = command("check", job({"loss": name}), "--import", own)
    assert code == 2
    assert name in err
    assert expected in err


MODEL = """
    @pipeline.models.register("{name}")
    class Own(nn.Module):
        '''A model.'''
        def __init__(self, inputs, outputs):
            super().__init__()
            self.layer = nn.Linear(2, {width})
        def forward(self, batch):
            x = self.layer(torch.stack([batch["a"], batch["b"]], 1))
            return {value}
"""
YES_NO = {"data.target": "flag"}
COLOR = {"data.target": "color"}


@pytest.mark.parametrize(
    ("width", "value", "changes", "expected"),
    [
        (1, "x", {"loss": "mse"}, "squeeze"),
        (1, "x", {"loss": "poisson_nll"}, "squeeze"),
        (3, "x.softmax(1)", {"loss": "cross_entropy", **COLOR}, "softmax"),
        (3, "x", {"loss": "nll", **COLOR}, "log_softmax"),
        (1, "x.squeeze(1) * 9 + 5", {"loss": "bce", **YES_NO}, "bce_with_logits"),
        (1, "x", {"loss": "cross_entropy", **COLOR}, "bce_with_logits"),
        (2, "x", {"loss": "cross_entropy", **COLOR}, "class numbers 0 to 2"),
        (1, "x.mean()", {"loss": "mse"}, "rows as the first dimension"),
        (1, "{'other': x.squeeze(1)}", {"loss": "mse"}, "no output 'prediction'"),
        (1, "{'mean': x[:, 0], 'variance': -x[:, 0] ** 2}", {"loss": "gaussian_nll"}, "softplus"),
        (1, "x.squeeze(1)[:, None, None]", {"loss": "soft_margin", **YES_NO}, "equal"),
    ],
)
def test_a_model_that_does_not_fit_its_loss_is_refused_with_the_fix(
    width: int, value: str, changes: dict[str, object], expected: str, job: Write, tmp_path: Path,
    command: Command, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    name = f"own{abs(hash(request.node.name))}"
    own = module(tmp_path, name, MODEL.format(name=name, width=width, value=value))
    code, out, err = command("check", job({"model": name, **changes}), "--import", own)
    assert code == 2, out
    assert expected in err


def test_check_warns_of_a_batch_norm_and_an_idle_parameter(
    job: Write, tmp_path: Path, command: Command
) -> None:
    own = module(tmp_path, "own_norm", """
        @pipeline.models.register("normed")
        class Normed(nn.Module):
            '''A model.'''
            def __init__(self, inputs, outputs):
                super().__init__()
                self.norm, self.layer = nn.BatchNorm1d(2), nn.Linear(2, 1)
                self.idle = nn.Parameter(torch.zeros(1))
            def forward(self, batch):
                x = torch.stack([batch["a"], batch["b"]], 1)
                return self.layer(self.norm(x)).squeeze(1)
    """)  # fmt: skip
    code, out, _ = command(
        "check", job({"model": "normed", "training.batch_size": 6}), "--import", own
    )
    assert code == 0
    assert "BatchNorm" in out
    assert "microbatch_size" in out
    assert "idle" in out


def test_a_name_registered_twice_names_both_places(tmp_path: Path) -> None:
    own = module(tmp_path, "own_twice", CODE.format(name="mse", body="return prediction - target"))
    with pytest.raises(UsageError, match=r"'mse'.*regression\.py.*own_twice\.py"):
        pipeline.check({}, imports=[own])


def test_an_option_that_is_a_key_of_the_spec_is_refused(
    job: Write, tmp_path: Path, command: Command
) -> None:
    own = module(tmp_path, "own_reserved", """
        @pipeline.losses.register("reserved")
        def reserved(prediction, target, *, weight: float = 1.0):
            '''A loss.'''
            return weight * (prediction - target)
    """)  # fmt: skip
    code, _, err = command("check", job({"loss": "reserved"}), "--import", own)
    assert code == 2
    assert "weight" in err
    assert "rename" in err


def test_an_import_path_in_a_spec_is_no_name(job: Write, command: Command) -> None:
    code, _, err = command("check", job({"loss": "os.system"}))
    assert code == 2
    assert "no loss 'os.system'" in err


def test_list_prints_custom_entries_with_their_options(tmp_path: Path, command: Command) -> None:
    own = module(tmp_path, "own_listed", """
        @pipeline.losses.register("listed")
        def listed(prediction, target, *, factor: float = 2.5):
            '''What this loss is for.'''
            return prediction - target
    """)  # fmt: skip
    code, out, _ = command("list", "losses", "--import", own)
    assert code == 0
    assert "listed  What this loss is for." in out
    assert "factor: 2.5" in out


def test_what_a_loss_returns_must_be_a_loss(tmp_path: Path, job: Write) -> None:
    own = module(tmp_path, "own_factory", """
        @pipeline.losses.register("factory")
        def factory(*, factor: float = 1.0):
            '''Returns nonsense.'''
            return 3
    """)  # fmt: skip
    with pytest.raises(ContractError, match="returned int"):
        pipeline.check(job({"loss": "factory"}), imports=[own])


def test_a_custom_module_is_what_it_imports_and_not_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "t_helper.py").write_text("import itertools, json, sys\nFACTOR = 2.0\n")
    (tmp_path / "t_bystander.py").write_text("ONE = 1\n")
    own = module(tmp_path, "t_with_helper", """
        def later():
            from t_helper import FACTOR
            return FACTOR
    """)  # fmt: skip
    modules = plugins.load([own])
    before = plugins.sources_sha256(modules)
    importlib.import_module("t_bystander")  # as the script that calls `pipeline.run` may
    (tmp_path / "t_bystander.py").write_text("ONE = 2\n")
    assert plugins.sources_sha256(modules) == before
    plugins.carry(modules, tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert names == ["t_helper.py", "t_with_helper.py"]
    assert plugins.changed(modules, tmp_path / "copy") == []
    (tmp_path / "t_helper.py").write_text("FACTOR = 3.0\n")
    assert plugins.sources_sha256(modules) != before
    assert plugins.changed(modules, tmp_path / "copy") == ["t_helper.py"]


def test_a_loss_like_an_unknown_one_is_an_error_with_its_line(
    job: Write, tmp_path: Path, command: Command
) -> None:
    own = module(tmp_path, "own_like", """
        @pipeline.losses.register("alike", like="mze")
        def alike(prediction, target):
            return (prediction - target) ** 2
    """)  # fmt: skip
    code, _, err = command("check", job({"loss": "alike"}), "--import", own)
    assert code == 2
    assert re.search(r"loss alike \(.*own_like.py:\d+\): like='mze' is not a loss.*'mse'", err)


ODD = {
    "exchanged": ("def {name}(target, prediction):", "return (prediction - target).clamp(min=0)",
                  "its arguments are (target, prediction)"),
    "returns nothing": ("def {name}(prediction, target):", "(prediction - target) ** 2",
                        "gives nothing, not a tensor"),
    "numpy": ("def {name}(prediction, target):", "return (prediction - target).detach().numpy()",
              "gives ndarray, not a tensor"),
    "into the prediction": ("def {name}(prediction, target):",
                            "return prediction.sub_(target) ** 2",
                            "writes into 'prediction'"),
    "into the target": ("def {name}(prediction, target):",
                        "target.mul_(0.5); return (target - prediction) ** 2", "writes into 'y'"),
    "a bug": ("def {name}(prediction, target):", "return missing", "fix: correct the loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_an_odd_loss_is_named_with_what_is_odd(
    case: str, job: Write, tmp_path: Path, command: Command
) -> None:
    head, body, expected = ODD[case]
    name = f"odd_{case.replace(' ', '_')}"
    own = module(tmp_path, f"own_{name}", f"""
        @pipeline.losses.register("{name}")
        {head.format(name=name)}
            {body}
    """)  # fmt: skip
    code, _, err = command("check", job({"loss": name}), "--import", own)
    assert code == 2, err
    assert f"loss {name}" in err
    assert expected in err


def test_a_positional_parameter_is_reported_with_how_to_make_it_an_option(
    job: Write, tmp_path: Path, command: Command
) -> None:
    own = module(tmp_path, "own_positional", """
        @pipeline.losses.register("positional")
        def positional(prediction, target, level=0.5):
            return level * (prediction - target) ** 2
    """)  # fmt: skip
    changes = {"loss": {"name": "positional", "level": 0.3}}
    code, _, err = command("check", job(changes), "--import", own)
    assert code == 2
    assert "loss.level: unknown key" in err
    assert "takes it by position: options stand after `*,`" in err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("None", "its forward gives nothing: return a tensor"),
        ("(x, x)", "its forward gives tuple: return a tensor"),
        ("batch['a'].mul_(2) * x.squeeze(1)", "writes into the column 'a' of its batch"),
        ("torch.zeros(len(x), 16) + x", "from outputs of [[8, 16]] and targets of [[8]]"),
        ("batch['rooms']", "KeyError: 'rooms'"),
        ("batch['rooms']", "`batch` holds a, b"),
    ],
)
def test_the_mismatch_of_a_custom_model_is_shown(
    value: str, expected: str, job: Write, tmp_path: Path, command: Command,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    name = f"own{abs(hash(request.node.name))}"
    code = MODEL.format(name=name, width=1, value=value)
    body = CODE.format(name=f"{name}_loss", body="return (prediction - target) ** 2")
    own = module(tmp_path, name, code + body)
    _, _, err = command("check", job({"model": name, "loss": f"{name}_loss"}), "--import", own)
    assert expected in err


def test_an_installed_package_offers_its_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    module(tmp_path, "offered_losses", CODE.format(name="offered", body="return prediction"))
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pipeline.plugins]\nlosses = offered_losses\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = command("list", "losses")
    assert code == 0
    assert "offered  A loss." in out
