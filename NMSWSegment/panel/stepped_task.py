"""Long work on the scene in short steps: between two of them the application draws and answers.

The work is a generator that yields after each step; its value is what it returns. Headless the same generator runs in one go.
"""

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

Value = TypeVar("Value")
Steps = Generator[None, None, Value]

TURN_S = 0.04
"""A turn of the event loop takes further steps until this long has passed."""
PAUSE_MS = 5
"""Between two turns, so that clicks and drawing come first."""


def run_to_end(steps: "Steps[Value]") -> Value:
    """Do all steps at once and return the value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class SteppedTask:
    """Does the steps from the event loop, beginning with its next turn.

    Exactly one of on_done and on_error is called, unless the task is stopped.
    """

    def __init__(self, steps: Steps, *, on_done: Callable[[Any], None], on_error: Callable[[Exception], None]) -> None:
        """Args: on_done: takes the value; on_error: takes what a step raised, after which no other step follows."""
        self._steps, self._on_done, self._on_error = steps, on_done, on_error
        self._is_over = False
        self._wait_for_turn()

    def finish(self) -> None:
        """Do what is left at once."""
        while not self._is_over:
            self._do_steps()

    def stop(self) -> None:
        """Give up what is left; nothing is called."""
        self._is_over = True
        self._steps.close()

    def _wait_for_turn(self) -> None:
        """Go on after a pause."""
        import qt

        # A timer of the task's own would keep the task for ever, and with it the nodes that its steps hold: Qt keeps the slot where
        # Python's garbage collector does not look.
        qt.QTimer.singleShot(PAUSE_MS, self._take_turn)

    def _take_turn(self) -> None:
        """One turn of the event loop; nothing where the task was stopped or finished while it waited."""
        if not self._is_over:
            self._do_steps()
        if not self._is_over:
            self._wait_for_turn()

    def _do_steps(self) -> None:
        """Steps for one turn."""
        end_time = time.perf_counter() + TURN_S
        try:
            while time.perf_counter() < end_time:
                next(self._steps)
        except StopIteration as end:
            self._is_over = True
            self._on_done(end.value)
        except Exception as error:
            self._is_over = True
            self._on_error(error)
