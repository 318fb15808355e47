"""A run's files in a ConfigMap, from which its pods have them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping

from pipeline.cluster.package import SOURCE, Package
from pipeline.errors import UsageError

MOST_BYTES = 1000 * 2**10
"""Of all of them, as they stand there: a ConfigMap holds 1 MiB."""


def keys_of(package: Package) -> dict[str, str]:
    """The ConfigMap's key of each place: it has no slash, so the files are numbered."""
    return {
        f"{number}-{re.sub(r'[^-._a-zA-Z0-9]', '_', place.rpartition('/')[2])}": place
        for number, place in enumerate(sorted(package.files))
    }


def contents(package: Package, source: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """`data` of a ConfigMap, and `binaryData` for files that are no text.

    Raises UsageError for more than it holds.
    """
    text = {SOURCE: json.dumps(dict(source), sort_keys=True, indent=1)}
    binary = {}
    for key, place in keys_of(package).items():
        content = package.files[place].read_bytes()
        try:
            text[key] = content.decode()
        except UnicodeDecodeError:
            binary[key] = base64.b64encode(content).decode()
    num_bytes = sum(len(one.encode()) for one in [*text.values(), *binary.values()])
    if num_bytes > MOST_BYTES:
        largest = max(package.files.values(), key=lambda file: file.stat().st_size)
        raise UsageError(
            f"the job names {package.num_bytes / 2**20:.1f} MiB of local files, as {largest}; a "
            f"ConfigMap takes {MOST_BYTES / 2**20:.1f}: put them on the platform's volume of data "
            "(/data), into an object store or into the image, and name them in the spec by "
            "absolute path or URI"
        )
    return {"data": text, "binaryData": binary} if binary else {"data": text}
