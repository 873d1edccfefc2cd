"""Local logits of patches that were run before, so that a larger k runs only what is new."""

from collections.abc import Collection

from torch import Tensor


class PatchCache:
    """Candidate -> local logits (C, P, P, P), at most `max_bytes` of them; what was not used for the longest time goes first."""

    def __init__(self, *, max_bytes: int) -> None:
        """Args: max_bytes: 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._logits: dict[int, Tensor] = {}  # oldest use first

    def __contains__(self, index: int) -> bool:
        return index in self._logits

    def get(self, index: int) -> Tensor | None:
        """The logits of a candidate, which count as used now; None where they are not known."""
        logits = self._logits.pop(index, None)
        if logits is not None:
            self._logits[index] = logits
        return logits

    def put(self, index: int, logits: Tensor, *, wanted: Collection[int]) -> None:
        """Keep the logits of a candidate if they fit beside those that are wanted.

        Args:
            wanted: candidates of the present run. They are never dropped for one another: a run that does not fit as a whole
                would drop each of them just before the next run asks for it.
        """
        unwanted = [other for other in self._logits if other not in wanted]
        while unwanted and self.num_bytes + logits.nbytes > self.max_bytes:
            self.num_bytes -= self._logits.pop(unwanted.pop(0)).nbytes
        if self.num_bytes + logits.nbytes <= self.max_bytes:
            # A view of a batch would keep the whole batch in memory.
            self._logits[index] = logits if logits.untyped_storage().nbytes() == logits.nbytes else logits.clone()
            self.num_bytes += logits.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._logits.clear()
        self.num_bytes = 0
