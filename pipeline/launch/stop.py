"""Ctrl-C and SIGTERM while workers train: they save their state and end; a second one ends at once.

Preemption, `ray job stop` and Kubernetes send SIGTERM and wait a while before they kill.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import StoppedError
from pipeline.train import files
from pipeline.train.curve import Reader

LOOK_SECONDS = 0.05
TRAINING = "training"
"""Name of the thread that trains, or waits for the workers that do."""

_raised: list[int] = []
"""Signals since `raised` began: what it raises may be caught by a library on its way here."""


def attended(fit: Callable[[], Any], folder: Path, waits_for_workers: bool) -> None:
    """Run `fit` in a thread, so that signals come here and not to Ray, which would abort it.

    Raises StoppedError when a signal came, after the workers have ended; where `fit` has to wait
    for them to start, and none has begun to train yet, at once.
    """
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            fit()
        except BaseException as error:  # whatever it is, the caller is to see it
            failure.append(error)

    thread = threading.Thread(target=guarded, name=TRAINING, daemon=True)
    before, is_told = _starts(folder), False
    with _caught(folder) as signals:
        if _raised:
            raise StoppedError(_raised[0])
        thread.start()
        while thread.is_alive() and len(signals) < 2:
            thread.join(LOOK_SECONDS)
            if signals and not is_told:
                if waits_for_workers and _starts(folder) == before:
                    break
                is_told = True
                end = "\r\x1b[2K" if sys.stderr.isatty() else ""
                sys.stderr.write(f"{end}note  stopping after this step; a second signal ends it\n")
    if signals and not files.is_done(folder):
        raise StoppedError(signals[0], _saved(folder)) from (failure[0] if failure else None)
    if failure:
        raise failure[0]


def is_left_behind() -> bool:
    """Whether the thread that trains was not waited for: an ordinary exit would abort in torch."""
    return any(thread.name == TRAINING for thread in threading.enumerate())


@contextmanager
def _caught(folder: Path) -> Iterator[list[int]]:
    """The numbers of signals that have come; the first asks the workers to stop."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        (folder / files.STOP).touch()

    with _handled(note):
        yield signals


@contextmanager
def raised() -> Iterator[None]:
    """Signals end what is done inside at once, as StoppedError: nothing is trained yet."""
    _raised.clear()
    try:
        with interrupting(_raised):
            yield
    except StoppedError:
        raise
    except BaseException as error:
        if _raised:
            raise StoppedError(_raised[0]) from error
        raise
    finally:
        _raised.clear()


@contextmanager
def interrupting(signals: list[int] | None = None) -> Iterator[None]:
    """Both signals raise KeyboardInterrupt, which is not caught with every Exception."""

    def end(number: int, frame: FrameType | None) -> None:
        if signals is not None:
            signals.append(number)
        raise KeyboardInterrupt

    with _handled(end):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `handler`, where signals can be handled at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _starts(folder: Path) -> int:
    """How often workers have begun to train."""
    try:
        with (folder / files.CURVE).open("rb") as file:
            return sum(b'"event": "start"' in line for line in file)
    except OSError:  # the first time
        return 0


def _saved(folder: Path) -> int | None:
    """The step after which the workers stopped, if they did so by themselves."""
    points = [p for p in Reader(folder / files.CURVE).new() if p.get("event") == "stop"]
    return int(points[-1]["step"]) if points else None
