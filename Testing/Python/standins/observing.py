"""Observers of VTK objects that end when they should."""

from collections.abc import Callable
from typing import Any


class Observing:
    """The observations of one widget."""

    def __init__(self) -> None:
        self._tags: list[tuple[Any, int]] = []

    def start(self, vtk_object: Any, event: int, callback: Callable) -> None:
        """Call back at each event."""
        self._tags.append((vtk_object, vtk_object.AddObserver(event, callback)))

    def stop(self, vtk_object: Any = None) -> None:
        """End the observations of one object, or all."""
        for entry in [entry for entry in self._tags if vtk_object is None or entry[0] is vtk_object]:
            entry[0].RemoveObserver(entry[1])
            self._tags.remove(entry)
