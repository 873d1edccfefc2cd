"""slicer.app, the module manager, and what a module is in them."""

import os
import platform
from typing import Any, ClassVar

from PySide6.QtCore import Property, QCoreApplication, QObject, QProcessEnvironment, QSettings, Signal
from PySide6.QtGui import QIcon
from PySide6.QtWidgets import QApplication

from standins.io_manager import qSlicerCoreIOManager
from standins.mrml_widgets import qSlicerScriptedLoadableModuleWidget


def _stored(kind: Any, name: str) -> Property:
    """A property that is kept in a dict."""
    return Property(kind, lambda self: self._values[name], lambda self, value: self._values.update({name: value}))


class qSlicerScriptedLoadableModule(QObject):
    """A Python module as the application sees it; the parent of the module's class."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__()
        self._values = {
            "title": "",
            "categories": [],
            "contributors": [],
            "dependencies": [],
            "associatedNodeTypes": [],
            "helpText": "",
            "acknowledgementText": "",
            "icon": QIcon(),
            "hidden": False,
            "index": -1,
            "path": path,
            "name": name,
        }
        self._make_widget = None
        self._representation = None

    def make_widget_with(self, make_widget: Any) -> None:
        """Say how a panel is made; not a function of the application."""
        self._make_widget = make_widget

    def widgetRepresentation(self) -> qSlicerScriptedLoadableModuleWidget:
        """The panel's parent; the panel is built at the first call."""
        if self._representation is None:
            self._representation = self.createNewWidgetRepresentation()
        return self._representation

    def createNewWidgetRepresentation(self) -> qSlicerScriptedLoadableModuleWidget:
        """One more panel."""
        return self._make_widget()

    title = _stored(str, "title")
    categories = _stored("QStringList", "categories")
    contributors = _stored("QStringList", "contributors")
    dependencies = _stored("QStringList", "dependencies")
    associatedNodeTypes = _stored("QStringList", "associatedNodeTypes")
    helpText = _stored(str, "helpText")
    acknowledgementText = _stored(str, "acknowledgementText")
    icon = _stored(QIcon, "icon")
    hidden = _stored(bool, "hidden")
    index = _stored(int, "index")
    path = _stored(str, "path")
    name = _stored(str, "name")


class qSlicerModuleFactoryManager(QObject):
    """Which modules there are."""

    def __init__(self, modules: dict[str, Any]) -> None:
        super().__init__()
        self._modules = modules

    def loadedModuleNames(self) -> list[str]:
        """Names of the modules that were loaded."""
        return list(self._modules)

    def isLoaded(self, name: str) -> bool:
        """Whether a module was loaded."""
        return name in self._modules


class qSlicerModuleManager(QObject):
    """Finds modules by name."""

    moduleLoaded = Signal(str)
    moduleAboutToBeUnloaded = Signal(str)

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[str, qSlicerScriptedLoadableModule] = {}
        self._factory_manager = qSlicerModuleFactoryManager(self._modules)

    def add(self, module: qSlicerScriptedLoadableModule) -> None:
        """Take a module; not a function of the application."""
        self._modules[module.name] = module
        self.moduleLoaded.emit(module.name)

    def module(self, name: str) -> qSlicerScriptedLoadableModule | None:
        """A module, or None."""
        return self._modules.get(name)

    def modulesNames(self) -> list[str]:
        """Names of all modules."""
        return list(self._modules)

    def factoryManager(self) -> qSlicerModuleFactoryManager:
        """The object that knows which are loaded."""
        return self._factory_manager


class qSlicerApplication(QObject):
    """slicer.app, without a main window: there is no layout manager."""

    startupCompleted = Signal()
    aboutToQuit = Signal()
    mrmlSceneChanged = Signal(object)
    APPLICATION_SPELLING: ClassVar = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChanged(PyObject)"}

    def __init__(self, scene: Any, folder: str, startup_environment: dict[str, str]) -> None:
        super().__init__()
        self._scene = scene
        self._module_manager = qSlicerModuleManager()
        self._io_manager = qSlicerCoreIOManager()
        self._startup_environment = startup_environment
        self._values = {
            "temporaryPath": os.path.join(folder, "Temp"),
            "slicerHome": folder,
            "majorVersion": 5,
            "minorVersion": 13,
            "revision": "0",
            "applicationName": "Slicer",
            "mainApplicationName": "Slicer",
            "applicationVersion": "5.13.0-stand-in",
            "slicerUserSettingsFilePath": QSettings().fileName(),
            "extensionsInstallPath": os.path.join(folder, "Extensions"),
            "launcherExecutableFilePath": os.path.join(folder, "Slicer"),
            "platform": f"{platform.system().lower()}-amd64",
            "os": platform.system().lower(),
            "arch": "amd64",
            "documentationBaseUrl": "https://slicer.readthedocs.io/en/latest/",
            "renderPaused": False,
        }

    def mrmlScene(self) -> Any:
        """The scene."""
        return self._scene

    def applicationLogic(self) -> Any:
        """The logic with all module logics."""
        return self._scene.headless_logics[0]

    def moduleManager(self) -> qSlicerModuleManager:
        """The modules."""
        return self._module_manager

    def coreIOManager(self) -> qSlicerCoreIOManager:
        """Reading and writing."""
        return self._io_manager

    ioManager = coreIOManager

    def layoutManager(self) -> None:
        """None, as without a main window."""

    def testingEnabled(self) -> bool:
        """False: in testing mode the application shows no dialogs."""
        return False

    def userSettings(self) -> QSettings:
        """Settings in a temporary file."""
        return QSettings()

    settings = revisionUserSettings = userSettings

    def processEvents(self) -> None:
        """Let Qt work."""
        QCoreApplication.processEvents()

    def setOverrideCursor(self, cursor: Any) -> None:
        """Another cursor for the whole application."""
        QApplication.setOverrideCursor(cursor)

    def restoreOverrideCursor(self) -> None:
        """The cursor from before."""
        QApplication.restoreOverrideCursor()

    def topLevelWidgets(self) -> list[Any]:
        """All windows."""
        return QApplication.topLevelWidgets()

    def palette(self) -> Any:
        """The colors."""
        return QApplication.palette()

    def style(self) -> Any:
        """The style."""
        return QApplication.style()

    def font(self) -> Any:
        """The font."""
        return QApplication.font()

    def clipboard(self) -> Any:
        """The clipboard."""
        return QApplication.clipboard()

    def pauseRender(self) -> int:
        """There is nothing to render."""
        return 1

    def resumeRender(self) -> int:
        """There is nothing to render."""
        return 0

    def startupEnvironment(self) -> QProcessEnvironment:
        """The environment from before the application changed it."""
        environment = QProcessEnvironment()
        for name, value in self._startup_environment.items():
            environment.insert(name, value)
        return environment

    def moduleLogic(self, name: str) -> Any:
        """The C++ logic of a module."""
        return self.applicationLogic().GetModuleLogic(name)

    def translate(self, context: str, text: str) -> str:
        """The text itself."""
        return text

    def moduleDocumentationUrl(self, name: str) -> str:
        """Where a module is described."""
        return f"{self._values['documentationBaseUrl']}user_guide/modules/{name.lower()}.html"

    temporaryPath = _stored(str, "temporaryPath")
    slicerHome = _stored(str, "slicerHome")
    majorVersion = _stored(int, "majorVersion")
    minorVersion = _stored(int, "minorVersion")
    revision = _stored(str, "revision")
    applicationName = _stored(str, "applicationName")
    mainApplicationName = _stored(str, "mainApplicationName")
    applicationVersion = _stored(str, "applicationVersion")
    slicerUserSettingsFilePath = _stored(str, "slicerUserSettingsFilePath")
    extensionsInstallPath = _stored(str, "extensionsInstallPath")
    launcherExecutableFilePath = _stored(str, "launcherExecutableFilePath")
    platform = _stored(str, "platform")
    os = _stored(str, "os")
    arch = _stored(str, "arch")
    documentationBaseUrl = _stored(str, "documentationBaseUrl")
    renderPaused = _stored(bool, "renderPaused")
