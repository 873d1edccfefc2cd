"""The application: load the module as Slicer does, open its panel, click, look, close.

with Application() as app:
    module = app.load_module(path_of_NMSWSegment_py)
    widget = app.open_panel("NMSWSegment")
    widget.ui.segmentButton.click()
    app.wait_until(lambda: widget.ui.statusLabel.text == "Done")
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import shiboken6
import slicer
from PySide6.QtCore import QCoreApplication, QEventLoop, QSettings
from PySide6.QtWidgets import QApplication, QWidget
from slicer_headless import new_scene

from standins import mrml_widgets, parameter_node, sample_data, slicer_app
from standins.conversion import WRAPPERS, unwrap, wrap
from standins.installation import Changes, fake_modules, make_all_wrappers
from standins.recorder import RECORDER
from standins.slicer_util import replacements

LAUNCHER = """#!/bin/sh
# As the application's launcher: the interpreter is a child, with the same input; it lives on when this shell is killed.
exec 3<&0
"{python}" "$@" <&3 3<&- &
child=$!
exec 3<&-
wait $child
"""


class Application:
    """Fake modules, a scene and an offscreen Qt for the length of a with block.

    Args:
        connect_gui_returns_tag: see parameter_node.py; False is what the application does today.
    """

    def __init__(self, *, connect_gui_returns_tag: bool = False) -> None:
        self.dialogs = RECORDER.dialogs
        """What a person would have seen: kind, text, detailedText."""
        self.answers = RECORDER.answers
        """Put answers here before the question comes: values, or callables that get the question."""
        self.opened_urls = RECORDER.opened_urls
        self.errors = RECORDER.errors
        """Exceptions that left a slot; a test that expects them clears the list."""
        self.views: list[tuple[str, dict]] = []
        """What was asked of the slice and 3D views."""
        self.selected_modules: list[str] = []
        self._connect_gui_returns_tag = connect_gui_returns_tag
        self._changes = Changes()
        self._open_name: str | None = None
        self._is_closed = False

    def __enter__(self) -> "Application":
        RECORDER.clear()
        sample_data.SampleDataLogic.sources.clear()
        self.folder = Path(tempfile.mkdtemp(prefix="standins"))
        self._changes.undo_with(lambda: shutil.rmtree(self.folder, ignore_errors=True))
        self._start_qt()
        (self.folder / "Temp").mkdir()
        self._make_scene()
        startup_environment = dict(os.environ)
        self._changes.set_item(os.environ, "PATH", f"{self._install_launcher()}{os.pathsep}{os.environ['PATH']}")
        self.slicer_app = slicer_app.qSlicerApplication(self.scene, str(self.folder), startup_environment)
        self._install_modules()
        # observers of VTK, and what Qt calls in a widget, print their exceptions by this hook and go on
        self._changes.set(sys, "excepthook", lambda error_type, error, traceback: RECORDER.slot_failed(error))
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # what failed first is what the test should show
                raise
        finally:
            self._changes.undo()

    def load_module(self, path: Path | str) -> ModuleType:
        """Load a module file as the application does at its start.

        Returns:
            The Python module, which is sys.modules[its name]; its parts are imported anew.
        """
        path = Path(path)
        name = path.stem
        self._changes.forget_modules(name)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
            self._changes.undo_with(lambda: sys.path.remove(str(path.parent)))
        loaded = _execute(name, path)
        module = slicer_app.qSlicerScriptedLoadableModule(name, str(path))
        module.make_widget_with(lambda: self._make_representation(name, module))
        self._changes.set(slicer.modules, name.lower(), wrap(module))
        instance = getattr(loaded, name)(wrap(module))
        self._changes.set(slicer.modules, f"{name}Instance", instance)
        if hasattr(instance, "setup"):
            instance.setup()
        self.slicer_app.moduleManager().add(module)
        return loaded

    def startup_completed(self) -> None:
        """All modules are loaded."""
        self.slicer_app.startupCompleted.emit()
        self.process_events()

    def open_panel(self, name: str) -> Any:
        """Open a module's panel, and leave the one that was open; the Python widget."""
        self._leave_panel()
        representation = self.slicer_app.moduleManager().module(name).widgetRepresentation()
        representation.show()
        self._open_name = name
        representation.enter()
        self.process_events()
        return representation.self()

    def select_module(self, name: str) -> None:
        """Open a module; one that was not loaded here only takes the place of the open one."""
        self.selected_modules.append(name)
        if self.slicer_app.moduleManager().module(name) is not None:
            self.open_panel(name)
        else:
            self._leave_panel()

    def process_events(self, seconds: float = 0.0) -> None:
        """Let Qt work, for some time.

        Raises:
            AssertionError: something failed in a slot, or a question had no answer.
        """
        end = time.monotonic() + seconds
        while True:
            QCoreApplication.processEvents(QEventLoop.AllEvents, 20)
            if time.monotonic() >= end:
                break
            time.sleep(0.002)
        RECORDER.raise_errors()

    def wait_until(self, condition: Any, seconds: float = 30, *, message: str = "") -> None:
        """Let Qt work until something is so.

        Raises:
            AssertionError: it was not in time, or something failed meanwhile.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{message or 'The condition'} did not come within {seconds} s; dialogs: {self.dialogs}")
            self.process_events(0.01)

    def save_picture(self, widget: Any, path: Path | str, *, width: int = 420) -> None:
        """A picture of a panel (the Python widget, or any widget of Qt), as high as it wants to be."""
        shown: QWidget = unwrap(getattr(widget, "parent", widget) if not hasattr(type(widget), "_pyside") else widget)
        shown.show()
        QCoreApplication.processEvents()
        height = shown.heightForWidth(width) if shown.hasHeightForWidth() else -1
        shown.resize(width, max(height, shown.sizeHint().height()))
        self.process_events(0.05)
        if not shown.grab().save(str(path)):
            raise OSError(f"The picture could not be written to {path}")

    def close_scene(self) -> None:
        """File > Close Scene: singleton nodes stay, without their content."""
        self.scene.Clear(False)
        self.process_events()

    def save_scene(self, folder: Path | str) -> Path:
        """Write the scene and all data into a folder; the .mrml file."""
        folder = Path(folder)
        if not slicer.util.saveScene(str(folder)):
            raise OSError(f"The scene could not be saved in {folder}")
        return next(folder.glob("*.mrml"))

    def load_scene(self, path: Path | str) -> None:
        """Close the scene and load a .mrml file."""
        slicer.util.loadScene(str(path), {"clear": True})
        self.process_events()

    def install_fake_module(self, name: str, module: Any) -> None:
        """Let "import name" find an object, for the rest of the block; None makes it fail."""
        self._changes.set_item(sys.modules, name, module)

    def close(self) -> None:
        """What happens when a person quits; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self.slicer_app.aboutToQuit.emit()
            self._leave_panel()
            for name in self.slicer_app.moduleManager().modulesNames():
                self.slicer_app.moduleManager().moduleAboutToBeUnloaded.emit(name)
        self.process_events()

    def _leave_panel(self) -> None:
        """Close the panel that is open."""
        if self._open_name is not None:
            representation = self.slicer_app.moduleManager().module(self._open_name).widgetRepresentation()
            representation.exit()
            representation.hide()
            self._open_name = None

    def _make_representation(self, name: str, module: Any) -> Any:
        """The parent of a panel, with the panel in it."""
        representation = mrml_widgets.qSlicerScriptedLoadableModuleWidget()
        self._changes.undo_with(lambda: shiboken6.delete(representation))
        representation.setObjectName(f"{name}ModuleWidget")

        def make_widget() -> Any:
            widget = getattr(sys.modules[name], f"{name}Widget")(wrap(representation))
            self._changes.set(slicer.modules, f"{name}Widget", widget)
            return widget

        representation.hold(wrap(module), make_widget)
        representation.setup()
        representation.setMRMLScene(self.scene)
        return representation

    def _make_scene(self) -> None:
        """An empty scene with the logics; a scene file with its data needs a cache folder to be read."""
        self.scene = new_scene()
        cache, transfers = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        cache.SetRemoteCacheDirectory(str(self.folder / "Temp"))
        transfers.SetCacheManager(cache)
        self.scene.SetCacheManager(cache)
        self.scene.SetDataIOManager(transfers)

    def _start_qt(self) -> None:
        """One Qt for all tests of the process; settings in a file of this block."""
        self._qt = QApplication.instance() or QApplication(["Slicer"])
        QCoreApplication.setOrganizationName("standins")
        QCoreApplication.setApplicationName("Slicer")
        QSettings.setDefaultFormat(QSettings.IniFormat)
        QSettings.setPath(QSettings.IniFormat, QSettings.UserScope, str(self.folder / "Settings"))
        QSettings.setPath(QSettings.IniFormat, QSettings.SystemScope, str(self.folder / "SystemSettings"))

    def _install_launcher(self) -> Path:
        """A PythonSlicer that starts this interpreter."""
        folder = self.folder / "bin"
        folder.mkdir()
        launcher = folder / "PythonSlicer"
        launcher.write_text(LAUNCHER.format(python=sys.executable), encoding="utf-8")
        launcher.chmod(0o755)
        return folder

    def _install_modules(self) -> None:
        """Put qt, ctk, SampleData and the parts of slicer where import finds them."""
        make_all_wrappers()
        for name, module in fake_modules().items():
            self._changes.set_item(sys.modules, name, module)
            if name.startswith("slicer."):
                self._changes.set(slicer, name.partition(".")[2], module)
        for name, wrapper in WRAPPERS.items():
            if name.startswith(("qMRML", "qSlicer")):
                self._changes.set(slicer, name, wrapper)
        self._changes.set(parameter_node.ParameterNodeWrapper, "CONNECT_GUI_RETURNS_TAG", self._connect_gui_returns_tag)
        logics = self.scene.headless_logics[1]
        modules = SimpleNamespace(**{name.lower(): SimpleNamespace(logic=lambda logic=logic: logic, name=name) for name, logic in logics.items()})
        for name, value in {"app": wrap(self.slicer_app), "mrmlScene": self.scene, "modules": modules, "selfTests": {}}.items():
            self._changes.set(slicer, name, value)
        for name, function in replacements(self.views, self.select_module).items():
            self._changes.set(slicer.util, name, function)


def _execute(name: str, path: Path) -> ModuleType:
    """Run a file as the module of a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
