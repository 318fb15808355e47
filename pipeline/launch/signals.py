"""Signals while workers train: they save their state and end; a second one ends at once.

Ctrl-C, SIGTERM (preemption, `ray job stop` and Kubernetes, which wait a while before they kill) and
SIGHUP (a terminal that was closed).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.errors import StoppedError
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, events
from pipeline.rundir.records import Event

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_SECONDS = 0.05
LAST_SECONDS = 0.5
"""After a second signal, for a step that is as good as done."""
SAVED_SECONDS = 5.0
"""After the workers have saved their state, for Ray to end: it may have been told to die too."""
TRAINING = "training"
"""Name of the thread that trains, or waits for the workers that do."""

_raised: list[int] = []
"""Signals since `signals_raise` began, whose error a library may have caught on its way here."""
_heard: list[int] = []
"""Those that cut a recording off: what has ended is told as it is, but nothing more is begun."""
_depth = 0
"""How many `signals_raise` are entered, one in the other."""


class InterruptedCommand(KeyboardInterrupt):
    """Ends what is being done, as it is not caught with every Exception.

    It is none of Python's own: after one of those in a module that is imported, `python -m` ends
    as if killed by SIGINT, whatever its exit code is.
    """


def attend(fit: Callable[[], Any], run: RunDir, waits_for_workers: bool) -> None:
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

    def ask() -> None:
        with contextlib.suppress(OSError):  # on a full disk a second signal ends it
            run.stop.touch()

    thread = threading.Thread(target=guarded, name=TRAINING, daemon=True)
    happened = _Happened(run)
    before = happened.look()
    is_told, until = False, math.inf
    with collect_signals(ask) as signals:
        refuse_stopped()
        thread.start()
        while thread.is_alive() and len(signals) < 2 and time.monotonic() < until:
            thread.join(LOOK_SECONDS)
            if not signals:
                continue
            if not is_told:
                if waits_for_workers and happened.look()["start"] == before["start"]:
                    break
                is_told = True
                end = "\r\x1b[2K" if sys.stderr.isatty() else ""
                with contextlib.suppress(OSError):  # nobody may read it any more
                    sys.stderr.write(f"{end}note  stopping ...; a second signal ends it at once\n")
            if until == math.inf and happened.look()["stop"] > before["stop"]:
                until = time.monotonic() + SAVED_SECONDS
        if len(signals) > 1:
            thread.join(LAST_SECONDS)
    if signals and not run.is_finished:
        raise StoppedError(signals[0], happened.saved_at()) from (failure[0] if failure else None)
    if _is_main_thread():
        _raised.extend(signals)  # of which whoever called this may have more to do
    if failure:
        raise failure[0]


def is_left_behind() -> bool:
    """Whether the thread that trains was not waited for: an ordinary exit would abort in torch."""
    return any(thread.name == TRAINING for thread in threading.enumerate())


@contextmanager
def collect_signals(also: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """The numbers of signals that have come; they interrupt nothing, but call `also`."""
    signals: list[int] = []

    def note(signum: int) -> None:
        signals.append(signum)
        also()

    with _handle_signals(note):
        yield signals


@contextmanager
def signals_raise() -> Iterator[None]:
    """Signals end what is done inside at once, as StoppedError; `attend` has its own way.

    Some libraries drop an error that comes while they are imported, or called back: inside of
    another one, this raises it again. In other threads than the main one there are no signals.
    """
    global _depth
    if not _is_main_thread():
        yield
        return
    if not _depth:
        _raised.clear()
        _heard.clear()
    refuse_stopped()

    def end(signum: int) -> None:
        _raised.append(signum)
        raise InterruptedCommand

    hook = sys.unraisablehook
    sys.unraisablehook = _quietly(sys.unraisablehook)
    depth = _depth
    try:
        _depth = depth + 1
        with _handle_signals(end):
            yield
    except StoppedError:
        raise
    except BaseException as error:
        if _raised:
            raise StoppedError(_raised[0], "") from error
        raise
    finally:
        sys.unraisablehook = hook
        _depth = depth


def refuse_stopped() -> None:
    """Raise StoppedError for a signal since `signals_raise` began, whose own error was dropped."""
    if (signals := [*_raised, *_heard]) and _is_main_thread():
        raise StoppedError(signals[0], "")


def begin_nothing_more(signals: Sequence[int]) -> None:
    """These have come: whoever called this may have more to do."""
    if _is_main_thread():
        _heard.extend(signals)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _quietly(otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Nothing is said of a KeyboardInterrupt that came where Python drops it, as while forking."""
    return lambda seen: None if issubclass(seen.exc_type, KeyboardInterrupt) else otherwise(seen)


@contextmanager
def _handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Signals go to `handler`, where they can be handled at all; `nohup` stays what it is."""
    if not _is_main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            let_go_of_output(stat.S_ISCHR)
        handler(signum)

    before = {
        signum: signal.signal(signum, handle)
        for signum in SIGNALS
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def let_go_of_output(is_gone: Callable[[int], bool] = lambda mode: True) -> None:
    """What is said from now on goes nowhere, instead of ending in an error.

    `is_gone` says by a file's mode whether its reader is: of a closed terminal, devices are.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if is_gone(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _Happened:
    """What workers note of a run: that they begin to train, or stop with their state saved."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._reader = Reader(run.journal, only_events=True)
        self._counts: Counter[str] = Counter()
        self._last: Event | None = None

    def look(self) -> Counter[str]:
        """How often each has happened by now; what was read before is not read again."""
        for event in events(self._reader):
            self._counts[event["event"]] += 1
            self._last = event
        return self._counts.copy()

    def saved_at(self) -> str:
        """Where the same command resumes: after the last step if its state could be saved."""
        self.look()
        if self._last is not None and self._last["event"] == "stop":
            return f" after step {self._last['step']}, from where the same command resumes"
        saved = self._run.saved_steps()
        if not saved:
            return "; nothing is saved yet"
        return f"; the same command resumes from the checkpoint after step {saved[-1]}"
