"""Ctrl-C and SIGTERM taken as a wish to end, which the program follows where it can do so without loss."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Interrupted(KeyboardInterrupt):
    """A run ended by a signal, after everything that it needs to go on was saved."""

    def __init__(self, step: int, checkpoint: Path, received: signal.Signals):
        super().__init__(
            f"stopped by {received.name} after step {step}; {checkpoint} holds all that the run needs to go on: "
            "the same command with --resume, or train(..., resume=True)"
        )
        self.signal = received


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """Gives a list that the first Ctrl-C or SIGTERM is put into, instead of ending the program; a second one ends it as ever.

    Python handles signals in its main thread only: elsewhere the list stays empty. So it does for a signal that is ignored, as
    Ctrl-C is in the background of a shell.
    """
    received, earlier = [], {}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def receive(number: int, _) -> None:
        restore()
        received.append(signal.Signals(number))
        print(f"\n{received[0].name}: the step ends and is saved first; once more to end at once", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        earlier = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in earlier:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
