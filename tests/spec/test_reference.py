"""The reference of all keys in jobs/README.md."""

from __future__ import annotations

from pipeline.spec import reference
from tests.conftest import JOBS


def test_the_key_reference_is_what_the_command_prints() -> None:
    _, _, rest = (JOBS / "README.md").read_text().partition("<!-- keys -->\n")
    assert rest.partition("\n<!-- end of keys -->")[0] == reference.table(), (
        "replace it by the output of `pipeline schema --markdown`"
    )
