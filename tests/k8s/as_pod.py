"""Processes as a pod's: its user, no privileges, a root file system that is read-only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.kubernetes.pods import USER


def prefix(writable: list[Path]) -> list[str]:
    """What goes before a command, so that it runs as in a pod that may write to these folders.

    Empty where this process is not root, or may not make a mount namespace.
    """
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return []
    for folder in writable:
        os.chown(folder, USER, USER)
        for above in folder.parents:  # pytest's own are closed to others
            if not above.stat().st_mode & 0o001:
                above.chmod(above.stat().st_mode | 0o011)
    mounts = [_opened(), *(f"mount --bind {shlex.quote(str(one))}{{,}}" for one in writable)]
    script = " && ".join([*filter(None, mounts), "mount -o remount,bind,ro /", 'exec "$@"'])
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"]
    words = ["unshare", "--mount", "bash", "-ec", script, "bash", *user, "--bounding-set=-all"]
    done = subprocess.run([*words, sys.executable, "-c", ""], capture_output=True)
    return words if done.returncode == 0 else []


def _opened() -> str:
    """Commands that let others read this Python, if it is in a folder that is root's alone."""
    python = Path(sys.executable).resolve()
    closed = next((one for one in python.parents if not one.stat().st_mode & 0o001), None)
    if closed is None:
        return ""
    within = closed / python.relative_to(closed).parts[0]
    view = Path(tempfile.mkdtemp(prefix="view-"))
    view.chmod(0o755)
    (view / within.name).mkdir()
    return (
        f"mount --bind {shlex.quote(str(within))} {view / within.name} && "
        f"mount --rbind {view} {shlex.quote(str(closed))}"
    )
