"""What is put into sys.modules and into slicer, and taken out again."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from standins import ctk_sections, ctk_widgets, i18n, mrml_widgets, node_combo_box, parameter_node, qt_module, sample_data, scripted_module, slicer_app
from standins.conversion import WRAPPERS
from standins.wrapping import make_wrappers

WIDGET_MODULES = (ctk_sections, ctk_widgets, mrml_widgets, node_combo_box, slicer_app)
CLASS_PREFIXES = ("ctk", "qMRML", "qSlicer")


class Changes:
    """Changes that are undone, the last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def undo_with(self, function: Callable[[], Any]) -> None:
        """Call a function when all is undone."""
        self._undo.append(function)

    def undo(self) -> None:
        """Undo all."""
        while self._undo:
            self._undo.pop()()

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        had, before = name in vars(target), vars(target).get(name)
        self.undo_with(lambda: setattr(target, name, before) if had else delattr(target, name))
        setattr(target, name, value)

    def set_item(self, target: Any, name: str, value: Any) -> None:
        """Set an entry of a dict."""
        had, before = name in target, target.get(name)
        self.undo_with(lambda: target.__setitem__(name, before) if had else target.pop(name, None))
        target[name] = value

    def forget_modules(self, name: str) -> None:
        """Take a package and its parts out of sys.modules, so that they are imported anew."""
        parts = {known: sys.modules.pop(known) for known in _parts_of(name)}

        def restore() -> None:
            for known in _parts_of(name):
                del sys.modules[known]
            sys.modules.update(parts)

        self.undo_with(restore)


def fake_modules() -> dict[str, ModuleType]:
    """Name -> module, for sys.modules; make_all_wrappers comes first."""
    return {
        "qt": qt_module.make_module("qt", "Q"),
        "ctk": qt_module.make_module("ctk", "ctk"),
        "SampleData": sample_data,
        "slicer.ScriptedLoadableModule": scripted_module,
        "slicer.i18n": i18n,
        "slicer.parameterNodeWrapper": parameter_node,
    }


def make_all_wrappers() -> None:
    """Wrapper classes of Qt and of the stand-ins, once in a process."""
    if WRAPPERS:
        return
    classes = qt_module.qt_classes()
    for module in WIDGET_MODULES:
        classes |= {name: value for name, value in vars(module).items() if name.startswith(CLASS_PREFIXES)}
    make_wrappers(classes, methods=qt_module.METHODS, static_functions=qt_module.STATIC_FUNCTIONS)


def _parts_of(name: str) -> list[str]:
    """Names of a package and of its parts that are loaded."""
    return [known for known in sys.modules if known == name or known.startswith(f"{name}.")]
