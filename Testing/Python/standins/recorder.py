"""What happened while the stand-ins ran: dialogs that would have been shown, answers to them, errors in slots."""

import traceback
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dialog:
    """A message that a person would have seen."""

    kind: str
    """error, warning, info, delay, question, or the name of a Qt dialog class."""
    text: str
    detailedText: str = ""


class Recorder:
    """The events of one application."""

    def __init__(self) -> None:
        self.dialogs: list[Dialog] = []
        self.answers: list[Any] = []
        """Values, or callables that get the text of the question (the dialog itself for QDialog)."""
        self.opened_urls: list[str] = []
        self.errors: list[str] = []
        """What must fail the test: exceptions in slots, questions without an answer."""
        self._shown: list[BaseException] = []

    def clear(self) -> None:
        """Forget everything; the lists stay the same objects."""
        for events in (self.dialogs, self.answers, self.opened_urls, self.errors, self._shown):
            events.clear()

    def show(self, kind: str, text: str, *, detailed_text: str = "", error: BaseException | None = None) -> None:
        """A message that needs no answer; the error that it tells of is known from then on."""
        self.dialogs.append(Dialog(kind, str(text), detailed_text or ""))
        if error is not None:
            self._shown.append(error)

    def ask(self, kind: str, text: str, *, dialog: Any = None) -> Any:
        """The next answer of the test.

        Raises:
            AssertionError: there is none; the test fails even where the panel catches this.
        """
        self.dialogs.append(Dialog(kind, str(text)))
        if not self.answers:
            self.fail(f"The test has no answer to this {kind}: {text}")
        answer = self.answers.pop(0)
        return answer(text if dialog is None else dialog) if callable(answer) else answer

    def fail(self, message: str) -> None:
        """Fail the test, now and again when the application is asked next."""
        self.errors.append(message)
        raise AssertionError(message)

    def slot_failed(self, error: BaseException) -> None:
        """An exception left a slot: PythonQt prints it and goes on, the test must not."""
        if not any(error is shown for shown in self._shown) and str(error) not in self.errors:
            self.errors.append("".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def raise_errors(self) -> None:
        """Raise what was recorded, once.

        Raises:
            AssertionError: something failed where it could not be raised.
        """
        if self.errors:
            message = "\n".join(self.errors)
            self.errors.clear()
            raise AssertionError(message)


RECORDER = Recorder()
"""The one of the application that is open: slots and Qt's static functions know no other way to it."""
