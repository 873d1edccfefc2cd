"""The run that goes on or went on: what the events of the worker change, and what the panel may do meanwhile."""

from collections.abc import Hashable
from enum import Enum


class RunState(Enum):
    """What goes on."""

    IDLE = "idle"
    RUNNING = "running"
    CANCELLING = "cancelling"


class Run:
    """One run after the other.

    Methods named after an event say whether it belongs to the run that goes on; what comes of another one is to be ignored.
    """

    def __init__(self) -> None:
        self.state = RunState.IDLE
        self.is_live = False
        """Whether the run only follows a change of k, so that the slider stays free."""
        self._run_id: int | None = None
        self.num_patches: int | str | None = None
        """k of the run."""
        self._result: tuple[tuple[Hashable, ...], tuple[int | str | None, ...]] | None = None  # signature; k that need no live update

    def is_button_enabled(self, *, is_blocked: bool) -> bool:
        """Whether the button may be clicked; a run can always be cancelled, once.

        Args:
            is_blocked: whether some problem makes a run impossible.
        """
        return not is_blocked if self.state is RunState.IDLE else self.state is RunState.RUNNING

    @property
    def are_settings_enabled(self) -> bool:
        """Whether volume, model, device and the like may be changed."""
        return self.state is RunState.IDLE

    @property
    def is_num_patches_enabled(self) -> bool:
        """Whether k may be changed: also while a live update runs, because a user still drags the slider."""
        return self.state is RunState.IDLE or self.is_live

    def start(self, run_id: int, *, num_patches: int | str | None, is_live: bool = False) -> None:
        """A run was sent to the worker.

        Raises:
            ValueError: another one goes on.
        """
        if self.state is not RunState.IDLE:
            raise ValueError(f"run {run_id} was started while run {self._run_id} goes on")
        self.state, self._run_id, self.num_patches, self.is_live = RunState.RUNNING, run_id, num_patches, is_live

    def request_cancel(self) -> None:
        """A user clicked Cancel, or the scene goes away."""
        if self.state is RunState.RUNNING:
            self.state = RunState.CANCELLING

    def progress(self, run_id: int) -> bool:
        """Whether to show it."""
        return self._is_current(run_id) and self.state is RunState.RUNNING

    def done(self, run_id: int, *, signature: tuple[Hashable, ...]) -> bool:
        """The result is in the segmentation; also of a run that was ready before it heard of the cancel.

        Args:
            signature: volume, model and segmentation with its content, as wants_live_update will get it.
        """
        is_ours = self._end(run_id)
        if is_ours:
            self._result = signature, (self.num_patches,)
        return is_ours

    def cancelled(self, run_id: int, *, by_user: bool) -> bool:
        """The run stopped; the previous result is kept.

        Args:
            by_user: a user does not want this k, so that no live update tries it again until k changes.
        """
        is_ours = self._end(run_id)
        if is_ours and by_user and self._result is not None:
            signature, settled = self._result
            self._result = signature, (*settled, self.num_patches)
        return is_ours

    def failed(self, run_id: int | None) -> bool:
        """The run ended with an error; no live update until a user has started another one."""
        is_ours = self._end(run_id)
        if is_ours:
            self._result = None
        return is_ours

    def worker_died(self) -> bool:
        """The process is gone, and the run with it."""
        self._result = None
        return self._end(self._run_id)

    def wants_live_update(self, signature: tuple[Hashable, ...], num_patches: int | str | None) -> bool:
        """Whether a run should start because k is no longer that of the result; to ask when k changes and when a run is over.

        Args:
            signature: as given to `done`; where it differs, the segmentation is another one or was edited, and is left alone.
            num_patches: k of now.
        """
        if self.state is not RunState.IDLE or self._result is None:
            return False
        result_signature, settled = self._result
        return signature == result_signature and num_patches not in settled

    def _is_current(self, run_id: int | None) -> bool:
        """Whether an event belongs to the run that goes on."""
        return self.state is not RunState.IDLE and run_id == self._run_id

    def _end(self, run_id: int | None) -> bool:
        """Become idle if this run goes on."""
        if not self._is_current(run_id):
            return False
        self.state, self.is_live, self._run_id = RunState.IDLE, False, None
        return True
