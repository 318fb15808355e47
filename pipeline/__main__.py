"""The command `pipeline`, and `python -m pipeline`."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    """Ctrl-C while there is nothing to save: libraries swallow what is raised in their imports."""
    line = "\r\x1b[2K" if sys.stderr.isatty() else ""
    try:
        os.write(2, f"{line}stopped by Ctrl-C\n".encode())
        if "--json" in sys.argv:
            os.write(1, b'{"state": "stopped", "error": "stopped by Ctrl-C"}\n')
    finally:  # nobody may read it any more
        os._exit(130)


def main() -> None:
    """Run the command; those that train or predict have their own signals (`launch/signals.py`)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    atexit.register(gc.freeze)  # the kernel frees faster what Python would collect for a second
    from pipeline import cli

    cli.main()


if __name__ == "__main__":
    main()
