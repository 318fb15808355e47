"""Secrets in URIs, wherever a URI has room for one."""

from __future__ import annotations

import pytest

from pipeline.redact import holds_secret, redact

SECRETS = (
    "http://me:SECRET@host:5000/path", "http://me:a'SECRET@host", 'http://me:a"b/SECRET@host',
    "http://SECRET@host", "s3://b/p?access_key=SECRET&region=eu", "s3://b/p?x=b'c=SECRET",
    "s3://b/p?endpoint_override=http%3A%2F%2Fu%3ASECRET%40host", "s3://key:SECRET@b/p?scheme=http",
    "http://host/p;token=SECRET?x=1", "http://host/p#token=SECRET", "file:///a?b=SECRET",
)  # fmt: skip


@pytest.mark.parametrize("uri", SECRETS)
def test_nothing_of_a_secret_is_left(uri: str) -> None:
    for text in (uri, f"{uri}: no such file", f"['{uri}', 'b']", f'{{"uri": "{uri}"}} and more'):
        found = redact(text)
        assert "SECRET" not in found
        assert "***" in found


@pytest.mark.parametrize("uri", [uri for uri in SECRETS if "x=b'" not in uri and "?b=" not in uri])
def test_a_secret_by_its_place_or_its_name_is_seen(uri: str) -> None:
    assert holds_secret(uri)
    assert holds_secret(f"train: {uri}  # rows")


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////tmp/a b/mlflow.db", "http://host:5000/#/experiments/1", "s3://bucket/part-?.csv",
        "s3://b/p?region=eu&scheme=http&endpoint_override=localhost:9000", "me@host: no URI",
        "mailto: a@b, 'http://host:1/x'", "no URI at all",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_secret(text)
    assert not holds_secret("s3://bucket/rows.parquet?version=2")
    assert not holds_secret("abfss://data@account.dfs.core.windows.net/rows.parquet")
    assert not holds_secret("uri: http://mlflow:5000  # ask ops@company.com")
