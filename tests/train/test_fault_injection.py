"""A planned fault kills its worker before its step, once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys
from pathlib import Path
from pipeline.rundir import RunDir
from pipeline.train.fault_injection import plan_faults
strike = plan_faults([(0, 2), (1, 1)], RunDir(Path(sys.argv[1])), int(sys.argv[2]))
for step in range(4):
    strike(step)
    print(step, flush=True)
"""


def worker(folder: Path, rank: int) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, folder, str(rank)], capture_output=True, text=True
    )
    return done.returncode, done.stdout.split()


@pytest.mark.processes
def test_a_fault_strikes_once(tmp_path: Path) -> None:
    assert worker(tmp_path, 0) == (-signal.SIGKILL, ["0", "1"])
    assert worker(tmp_path, 0) == (0, ["0", "1", "2", "3"])
    assert worker(tmp_path, 1) == (-signal.SIGKILL, ["0"])
    assert worker(tmp_path, 2) == (0, ["0", "1", "2", "3"])
