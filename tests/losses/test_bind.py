"""How several losses read one target column together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.errors import ContractError
from pipeline.losses.bind import readings
from pipeline.spec import load
from tests.conftest import MINIMAL
from tests.data.tables import job_of


def term(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "prediction": f"{name}_{len(options)}", **options}


def ignored(*losses: dict[str, Any]) -> int | None:
    return readings(load(MINIMAL | {"loss": list(losses)}))["progression"].ignored


@pytest.mark.parametrize("default", ["cross_entropy", "nll"])
def test_an_ignore_index_that_is_given_goes_before_a_default(default: str) -> None:
    given = term("cross_entropy", ignore_index=-1)
    assert ignored(given) == -1
    assert ignored(given, term(default)) == -1
    assert ignored(term(default), given) == -1
    assert ignored(term(default)) == -100


@pytest.mark.parametrize("other", ["triplet_batch_hard", "multi_margin", "mse"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_loss_that_cannot_leave_items_out_does_not_share_a_column_with_one_that_does(
    other: str, order: int
) -> None:
    losses = [term("cross_entropy", ignore_index=-1), term(other)][::order]
    with pytest.raises(ContractError, match=rf"^loss {other}: .*cannot leave items out"):
        ignored(*losses)
    assert ignored(term("cross_entropy"), term(other)) is None


def test_two_values_to_ignore_in_one_column_are_refused() -> None:
    with pytest.raises(ContractError, match="ignore_index 0 and, in a, -1 both mark items"):
        ignored(
            {"name": "cross_entropy", "label": "a", "ignore_index": -1},
            {"name": "cross_entropy", "label": "b", "ignore_index": 0},
        )


def test_a_class_is_not_left_out_by_one_loss_and_read_by_another(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": np.arange(8.0), "y": [0, 1, 2, -100] * 2})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    losses = [term("cross_entropy"), term("mse")]
    with pytest.raises(ContractError, match=r"-100 out \(ignore_index\), but in target 'y'"):
        _ = job_of(tmp_path, "rows.csv", loss=losses).terms


def test_a_flag_is_no_number_to_ignore(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": np.arange(4.0), "y": [True, False] * 2})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ContractError, match="target 'y' holds true and false"):
        _ = job_of(tmp_path, "rows.csv", loss=term("cross_entropy", ignore_index=0)).terms


def test_flags_are_weighted_by_the_names_that_yaml_and_python_have(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": np.arange(4.0), "y": [True, False] * 2})
    rows.to_parquet(tmp_path / "rows.parquet")
    losses = []
    for names in (("true", "false"), ("True", "False")):
        weights = dict(zip(names, (2.0, 1.0), strict=True))
        job = job_of(tmp_path, "rows.parquet", loss=term("cross_entropy", class_weight=weights))
        prediction = torch.tensor([[0.0, 0.0]]).expand(4, 2)
        (built,) = job.terms
        losses.append(built.loss.items(prediction, torch.tensor([1, 0, 1, 0])))
    assert torch.equal(*losses)
    assert losses[0][0] == 2 * losses[0][1]


def test_whole_numbers_that_are_classes_and_amounts_are_read_in_full(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": np.arange(4.0), "y": [20_000_001, 20_000_003] * 2})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    training = {"precision": "float64"}
    losses = [term("cross_entropy"), term("mse")]
    job = job_of(tmp_path, "rows.csv", loss=losses, training=training)
    batch = job.train.gather(np.arange(4))
    (amounts,) = job.terms[1].truth(batch, torch.zeros(4, dtype=torch.float64))
    assert isinstance(amounts, torch.Tensor)
    assert amounts.tolist() == rows["y"].tolist()


def test_a_loss_without_a_target_does_not_keep_another_from_scaling_its_own(
    tmp_path: Path,
) -> None:
    rows = pd.DataFrame({"a": np.arange(8.0), "y": np.arange(8.0) * 100})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    pair = {"name": "info_nce", "prediction": ["one", "other"]}
    model = {"name": "mlp", "outputs": {"one": {"size": 2}, "other": {"size": 2}}}
    data = {"target_scale": "standard"}
    job = job_of(tmp_path, "rows.csv", loss=[term("mse"), pair], model=model, data=data)
    (field,) = (field for field in job.fields if field.is_target)
    assert field.deviation == pytest.approx(rows["y"].std(ddof=0))


@pytest.mark.parametrize("kind", ["columns", "vector"])
def test_balanced_labels_have_a_weight_each(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((60, 3)) < [0.1, 0.5, 0.8]
    if kind == "columns":
        rows = pd.DataFrame(truth.astype(int), columns=["one", "two", "three"])
        rows["two"] = np.where(truth[:, 1], "yes", "no")
        target: Any = ["one", "two", "three"]
    else:
        rows, target = pd.DataFrame({"y": list(truth.astype(float))}), "y"
    rows["a"] = rng.normal(size=60)
    rows.to_parquet(tmp_path / "rows.parquet")
    loss = {"name": "bce_with_logits", "pos_weight": "balanced"}
    job = job_of(tmp_path, "rows.parquet", loss=loss, data={"target": target, "inputs": ["a"]})
    batch = job.train.gather(np.arange(60))
    (found,) = job.objective().items({"prediction": torch.zeros(60, 3)}, batch)
    weight = torch.from_numpy((~truth).sum(0) / truth.sum(0))
    own = torch.nn.BCEWithLogitsLoss(pos_weight=weight, reduction="none")
    expected = own(torch.zeros(60, 3), torch.from_numpy(truth.astype(float)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_label_that_is_always_no_has_no_weight(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": np.arange(8.0), "y": [[0.0, 1.0], [0.0, 0.0]] * 4})
    rows.to_parquet(tmp_path / "rows.parquet")
    loss = {"name": "bce_with_logits", "pos_weight": "balanced"}
    with pytest.raises(ContractError, match=r"target 'y\[0\]' has one value in all training rows"):
        job_of(tmp_path, "rows.parquet", loss=loss, data={"inputs": ["a"]}).terms  # noqa: B018


@pytest.mark.parametrize("loss", ["cox", {"name": "hazards", "times": [60, 120]}])
def test_large_times_keep_their_order(loss: Any, tmp_path: Path) -> None:
    """Seconds since 1970 have more digits than float32."""
    rng = np.random.default_rng(0)
    found = []
    for since in (0, 1_700_000_000):
        own = loss if isinstance(loss, str) else {**loss, "times": [t + since for t in [60, 120]]}
        time = np.arange(200) + since
        rows = {"a": np.arange(200.0), "t": rng.permutation(time), "d": np.arange(200) % 3 > 0}
        rng = np.random.default_rng(0)
        pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
        data = {"target": ["t", "d"], "inputs": ["a"]}
        job = job_of(tmp_path, "rows.parquet", loss=own, data=data)
        width = () if loss == "cox" else (2,)
        outputs = {"prediction": torch.linspace(-1, 1, 200).reshape(200, *[1 for _ in width])}
        outputs["prediction"] = outputs["prediction"].expand(200, *width)
        (items,) = job.objective().items(outputs, job.train.gather(np.arange(200)))
        found.append(items.double().sum().item())
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        ({"name": "hazards", "times": [2, 1]}, ["y", "d"]),
        ({"name": "pinball", "levels": [0.9, 0.1]}, "y"),
    ],
)
def test_options_that_a_loss_refuses_are_told_with_its_name(
    loss: dict[str, Any], target: Any, tmp_path: Path
) -> None:
    pd.DataFrame({"a": [1.0, 2.0], "y": [1.0, 2.0], "d": [0, 1]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ContractError, match=f"loss {loss['name']}: .* must rise"):
        job_of(tmp_path, "r.parquet", loss=loss, data={"target": target, "inputs": ["a"]})


def test_grades_of_true_and_false_have_an_order(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0, 2.0], "y": [True, False]}).to_parquet(tmp_path / "r.parquet")
    loss = {"name": "ordinal", "class_order": [True, False]}
    term = job_of(tmp_path, "r.parquet", loss=loss).terms[0]
    assert term.loss.head is not None
    served = term.loss.link(term.loss.head(1, 2), torch.tensor([5.0]))  # type: ignore[misc]
    assert served[0, 0] > 0.9, "False is the highest"


@pytest.mark.parametrize("levels", [[0.1, 0.9], [0.1, 0.5, 0.9]])
def test_only_the_median_is_a_prediction_of_the_amount(levels: Any, tmp_path: Path) -> None:
    pd.DataFrame({"a": range(30), "y": range(30)}).to_csv(tmp_path / "rows.csv", index=False)
    made = job_of(tmp_path, "rows.csv", loss={"name": "pinball", "levels": levels})
    (term,) = made.terms
    has_median = 0.5 in levels
    assert ("mae" in term.target.usual_metrics(term)) == has_median
    served = torch.arange(len(levels), dtype=torch.float32)[None]
    decoded = term.target.decode(term, served)
    assert ("y" in decoded) == has_median
    assert decoded["y_quantile_0.9"] == len(levels) - 1
    if has_median:
        assert decoded["y"] == 1
