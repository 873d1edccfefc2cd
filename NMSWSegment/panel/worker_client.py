"""The inference process beside the application: started when it is needed, kept warm, spoken to in JSON lines.

The other end is engine/worker.py, which also says what the lines mean. Everything that arrives becomes one event, a dict with the
key "event"; an end of the process that nobody asked for is the event "died".
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import qt
import slicer

from NMSWSegment.files.output_file import new_folder
from NMSWSegment.panel.application import _
from NMSWSegment.protocol import UserError

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
CANCEL_MS = 700
"""A worker that has not answered a cancel by then, because one patch of a large net takes longer, is stopped."""
STOP_MS = 1000
FOLDER_PREFIX = "NMSWSegment-"
LOG_LINES = 40
"""Last lines of the worker's standard error that the user sees when it dies."""


class Worker:
    """One worker process at a time.

    All callbacks come from Qt's event loop, never from inside `send` or `stop`.
    """

    def __init__(self, *, on_event: Callable[[dict], None], on_log: Callable[[str], None]) -> None:
        """Args: on_event: takes every event; on_log: takes every line of the worker's standard error."""
        self._on_event = on_event
        self._on_log = on_log
        self._process: qt.QProcess | None = None
        self._pid: int | None = None
        self._output = b""
        self._log = b""
        self._last_lines: list[str] = []
        self._running_id: int | None = None
        self.folder: Path | None = None
        """Temporary folder of this worker; gone when it is. Requests make theirs inside."""
        self.holds: str | None = None
        """Key of the volume that the worker has in memory."""

    @property
    def is_alive(self) -> bool:
        """Whether there is a process to speak to."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The worker's own process, not the launcher's; None before it has reported."""
        return self._pid

    def start(self) -> None:
        """Start the process unless it is there.

        Raises:
            UserError: there is no Python to start, or nowhere to put temporary files.
        """
        if self.is_alive:
            return
        python = _python()
        self.folder = _temporary_folder()
        self._pid, self.holds, self._output, self._log, self._last_lines = None, None, b"", b"", []
        process = self._process = qt.QProcess()
        process.setWorkingDirectory(str(PACKAGE_PARENT))  # so that -m finds this very package
        process.connect("readyReadStandardOutput()", self._read_output)
        process.connect("readyReadStandardError()", self._read_log)
        process.connect("finished(int,QProcess::ExitStatus)", self._on_finished)
        process.connect("errorOccurred(QProcess::ProcessError)", self._on_error)
        process.start(python, ["-m", "NMSWSegment", "worker", "--folder", str(self.folder)])

    def send(self, request: dict) -> None:
        """Send one request; starts the process if it is not there."""
        self.start()
        if request["request"] == "segment":
            self._running_id = request["id"]
        self._process.write((json.dumps(request) + "\n").encode("utf-8"))

    def cancel(self) -> None:
        """Ask the run to stop; whatever the worker does, the event "cancelled" comes within a second."""
        if not self.is_alive or self._running_id is None:
            return
        run_id = self._running_id
        self.send({"request": "cancel"})
        qt.QTimer.singleShot(CANCEL_MS, lambda: self._stop_if_still_running(run_id))

    def stop(self) -> None:
        """End the process and remove its folder; no event follows."""
        process, self._process = self._process, None
        if process is not None:
            _disconnect(process, self)
            process.closeWriteChannel()  # end of input: the worker leaves at once, wherever it is
            if not process.waitForFinished(STOP_MS):
                _kill(self._pid)
                process.kill()
                process.waitForFinished(STOP_MS)
            process.deleteLater()
        self._forget_process()

    def _forget_process(self) -> None:
        """The state without a process."""
        self._process, self._pid, self._running_id, self.holds = None, None, None, None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _stop_if_still_running(self, run_id: int) -> None:
        """The second half of `cancel`."""
        if self._running_id == run_id:
            self.stop()
            self._on_event({"event": "cancelled", "id": run_id})

    def _read_output(self) -> None:
        """Turn complete lines into events."""
        process = self._process
        self._output += _bytes(process.readAllStandardOutput())
        *lines, self._output = self._output.split(b"\n")
        for line in filter(None, map(bytes.strip, lines)):
            self._receive(json.loads(line.decode("utf-8")))
            if self._process is not process:  # an event can end the process; what it still said is of no use
                return

    def _receive(self, event: dict) -> None:
        """Note what the worker is doing, then pass the event on."""
        kind = event["event"]
        if kind == "ready":
            self._pid = event["pid"]
        if kind == "done":
            self.holds = event["holds"]
        if kind in ("done", "cancelled", "error") and event.get("id") == self._running_id:
            self._running_id = None
        self._on_event(event)

    def _read_log(self) -> None:
        """Pass complete lines of standard error on."""
        self._log += _bytes(self._process.readAllStandardError())
        *lines, self._log = self._log.split(b"\n")
        for line in lines:
            text = line.decode("utf-8", errors="replace").rstrip()
            self._last_lines = [*self._last_lines, text][-LOG_LINES:]
            self._on_log(text)

    def _on_error(self, error: "qt.QProcess.ProcessError") -> None:
        """A process that never started sends no finished()."""
        if self._process is not None and error == qt.QProcess.FailedToStart:
            self._die(_("the process did not start ({error})").format(error=self._process.errorString()))

    def _on_finished(self, exit_code: int, exit_status: "qt.QProcess.ExitStatus") -> None:
        """The process ended although nobody asked it to."""
        if self._process is not None:
            self._read_output()
            self._read_log()
            self._die(_("exit code {code}").format(code=exit_code))

    def _die(self, reason: str) -> None:
        """Report an end that nobody asked for."""
        process, run_id = self._process, self._running_id
        _disconnect(process, self)
        _kill(self._pid)  # a launcher that was killed leaves its child behind
        process.deleteLater()
        self._forget_process()
        self._on_event({"event": "died", "id": run_id, "message": reason, "details": "\n".join(self._last_lines)})


def _disconnect(process: "qt.QProcess", worker: Worker) -> None:
    """Let no signal of an old process reach the worker."""
    process.disconnect("readyReadStandardOutput()", worker._read_output)
    process.disconnect("readyReadStandardError()", worker._read_log)
    process.disconnect("finished(int,QProcess::ExitStatus)", worker._on_finished)
    process.disconnect("errorOccurred(QProcess::ProcessError)", worker._on_error)


def _python() -> str:
    """Slicer's Python without the application.

    Raises:
        UserError: it is not there.
    """
    found = shutil.which("PythonSlicer")
    if found is None:
        raise UserError(_("Slicer's Python (PythonSlicer) was not found, so that the segmentation cannot run. Install Slicer again."))
    return found


def _parent_folder() -> str:
    """The application's temporary folder."""
    return slicer.app.temporaryPath


def _temporary_folder() -> Path:
    """A new folder in the application's temporary folder.

    Raises:
        UserError: nothing can be written there.
    """
    parent = _parent_folder()
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        return new_folder(parent, prefix=FOLDER_PREFIX)
    except OSError as error:
        raise UserError(
            _(
                "The temporary folder '{folder}' cannot be written ({reason}). Choose another one in Edit > Application Settings > Modules > "
                "Temporary directory."
            ).format(folder=parent, reason=error.strerror)
        ) from error


def _kill(pid: int | None) -> None:
    """End the worker itself, for its launcher does not pass a kill on."""
    if pid is None:
        return
    try:
        os.kill(pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
    except OSError:  # it is gone already
        pass


def _bytes(array: "qt.QByteArray") -> bytes:
    """The bytes of a QByteArray, whose data() is bytes or, in some versions of PythonQt, text."""
    data = array.data()
    return data if isinstance(data, bytes) else data.encode("utf-8", errors="surrogateescape")
