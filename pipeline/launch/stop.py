"""Ctrl-C and SIGTERM while workers train: they save their state and end; a second one ends at once.

Preemption, `ray job stop` and Kubernetes send SIGTERM and wait a while before they kill.
"""

from __future__ import annotations

import signal
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


def attended(fit: Callable[[], Any], folder: Path) -> None:
    """Run `fit` in a thread, so that signals come here and not to Ray, which would abort it.

    Raises StoppedError when a signal came, after the workers have ended.
    """
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            fit()
        except BaseException as error:  # whatever it is, the caller is to see it
            failure.append(error)

    thread = threading.Thread(target=guarded, name="training", daemon=True)
    with _caught(folder) as signals:
        thread.start()
        while thread.is_alive() and len(signals) < 2:
            thread.join(LOOK_SECONDS)
    if signals and not files.is_done(folder):
        raise StoppedError(signals[0], _saved(folder)) from (failure[0] if failure else None)
    if failure:
        raise failure[0]


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

    def end(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

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


def _saved(folder: Path) -> int | None:
    """The step after which the workers stopped, if they did so by themselves."""
    points = [p for p in Reader(folder / files.CURVE).new() if p.get("event") == "stop"]
    return int(points[-1]["step"]) if points else None
