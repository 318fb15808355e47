"""A signal ends a command even where a library drops the error that it raises."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

import pipeline
from pipeline.errors import StoppedError
from pipeline.launch.signals import signals_raise
from tests.conftest import Write

DROPS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGNUM)
    for _ in range(1000): pass
except BaseException:
    pass
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_one_that_is_dropped_before_training_begins(name: str, job: Write, tmp_path: Path) -> None:
    module = tmp_path / f"drops_{name}.py"
    module.write_text(DROPS.replace("SIGNUM", name))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as caught:
        pipeline.run(job(), imports=[str(module)])
    assert caught.value.exit_code == 128 + signal.Signals[name]
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_that_was_heard_is_forgotten_at_the_end() -> None:
    def interrupted() -> None:
        with signals_raise():
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            with signals_raise():
                pytest.fail("it is dropped")

    for _ in range(2):
        with pytest.raises(StoppedError):
            interrupted()
    with signals_raise(), signals_raise():
        pass
