"""What slicer.util does differently here: dialogs are recorded, views do not exist, nothing is downloaded or installed.

All other functions are those of slicer-core, which has the application's own slicer.util.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import slicer

from standins.api import names_of
from standins.recorder import RECORDER

NOT_HERE = {
    "clickAndDrag",
    "createProgressDialog",
    "displayPythonShell",
    "downloadAndExtractArchive",
    "downloadFile",
    "exit",
    "exportNode",
    "moduleSelector",
    "openAddDataDialog",
    "openSaveDataDialog",
    "pip_uninstall",
    "plot",
    "pythonShell",
    "quit",
    "restart",
    "setApplicationLogoVisible",
    "setDataProbeVisible",
    "setErrorLogVisible",
    "setMenuBarsVisible",
    "setModuleHelpSectionVisible",
    "setModulePanelTitleVisible",
    "setPythonConsoleVisible",
    "setStatusBarVisible",
    "setToolbarsVisible",
    "setViewControllersVisible",
    "sourceDir",
    "startQtDesigner",
}
"""Functions that need the application itself: calling one says so."""


def replacements(views: list[tuple[str, dict]], select_module: Any) -> dict[str, Any]:
    """Name -> function for slicer.util.

    Args:
        views: gets what was asked of the views: (function, arguments).
        select_module: called with the name of the module that is to be opened.
    """
    functions = {name: _refuse(name) for name in NOT_HERE & names_of("slicer.util")}
    for name in ("setSliceViewerLayers", "resetSliceViews", "resetThreeDViews", "forceRenderAllViews"):
        functions[name] = _record_view(name, views)
    functions |= {
        "errorDisplay": lambda text, windowTitle=None, parent=None, standardButtons=None, **kwargs: _show("error", text, kwargs),
        "warningDisplay": lambda text, windowTitle=None, parent=None, standardButtons=None, **kwargs: _show("warning", text, kwargs),
        "infoDisplay": lambda text, windowTitle=None, parent=None, standardButtons=None, **kwargs: _show("info", text, kwargs),
        "confirmYesNoDisplay": lambda text, windowTitle=None, parent=None, **kwargs: bool(RECORDER.ask("question", text)),
        "confirmOkCancelDisplay": lambda text, windowTitle=None, parent=None, **kwargs: bool(RECORDER.ask("question", text)),
        "confirmRetryCloseDisplay": lambda text, windowTitle=None, parent=None, **kwargs: bool(RECORDER.ask("question", text)),
        "delayDisplay": _delay,
        "showStatusMessage": lambda message, duration=0: RECORDER.show("status", message),
        "selectModule": lambda module: select_module(module if isinstance(module, str) else module.name),
        "pip_install": lambda requirements, **kwargs: RECORDER.fail(f"pip_install({requirements!r}) was called: the extension installs nothing by itself"),
        "tempDirectory": _temp_directory,
    }
    return functions


def _show(kind: str, text: str, options: dict) -> None:
    """Record a message, and the exception that it tells of; details widen the window, also where they are empty."""
    if "detailedText" in options and not options["detailedText"]:
        RECORDER.fail(f"'{text}' was shown with empty details: its window is 150 characters wide for nothing")
    RECORDER.show(kind, text, detailed_text=options.get("detailedText", ""), error=sys.exc_info()[1])


def _delay(message: str, autoCloseMsec: int = 1000, parent: Any = None, **kwargs: Any) -> None:
    """Record the message without waiting."""
    RECORDER.show("delay", message)
    slicer.app.processEvents()


def _temp_directory(key: str = "__SlicerTemp__", tempDir: Any = None, includeDateTime: bool = True) -> str:
    """A new folder, unique where the application makes it so with the time."""
    folder = Path(tempDir or slicer.app.temporaryPath)
    names = (f"{key}{number}" for number in itertools.count()) if includeDateTime else iter([key])
    path = next(folder / name for name in names if not includeDateTime or not (folder / name).exists())
    os.makedirs(path, exist_ok=True)
    return str(path)


def _record_view(name: str, views: list[tuple[str, dict]]) -> Any:
    """A function that only records."""
    return lambda *args, **kwargs: views.append((name, dict(enumerate(args)) | kwargs))


def _refuse(name: str) -> Any:
    """A function that says that it is not here."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"slicer.util.{name} is not in these stand-ins")

    return refuse
