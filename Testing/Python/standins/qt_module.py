"""The module qt: the classes of api.json upon PySide6; what would wait for a person takes the answers of the test."""

from types import ModuleType
from typing import Any

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

from standins import signals
from standins.api import class_names
from standins.conversion import WRAPPERS, unwrap, wrap
from standins.enums import EnumValue
from standins.recorder import RECORDER
from standins.ui_loader import load_ui

PYSIDE_MODULES = (QtCore, QtGui, QtWidgets, QtUiTools)


def qt_classes() -> dict[str, type]:
    """Class name -> class of PySide6, for what api.json lists."""
    found = {name: getattr(module, name) for name in class_names() for module in PYSIDE_MODULES if hasattr(module, name)}
    return {name: found[name] for name in class_names() if name in found}


def make_module(name: str, class_prefix: str) -> ModuleType:
    """A module with the wrapper classes whose names start with a prefix; it says which names it lacks."""
    module = ModuleType(name, f"Stand-in of the application's {name}.")
    for class_name, wrapper in WRAPPERS.items():
        if class_name.startswith(class_prefix):
            setattr(module, class_name, wrapper)

    def refuse(missing: str) -> Any:
        raise AttributeError(f"{name} has no '{missing}' in Slicer, or api.json of the stand-ins does not list it yet")

    module.__getattr__ = refuse
    return module


def _find_children(wrapper: Any, kind: type | str = "", name: str = "") -> tuple:
    """Children at any depth, by class (or its name) and object name."""
    class_name = kind if isinstance(kind, str) else kind.__name__
    children = map(wrap, wrapper._qt.findChildren(QtCore.QObject))
    return tuple(child for child in children if (not class_name or child.inherits(class_name)) and (not name or child.objectName == name))


def _find_child(wrapper: Any, kind: type | str = "", name: str = "") -> Any:
    """The first of these children, or None."""
    return next(iter(_find_children(wrapper, kind, name)), None)


def _connect(wrapper: Any, signal: str, slot: Any, method: str | None = None) -> bool:
    """See signals.connect."""
    return signals.connect(wrapper._qt, signal, slot, method)


def _disconnect(wrapper: Any, signal: str, slot: Any = None, method: str | None = None) -> bool:
    """See signals.disconnect."""
    return signals.disconnect(wrapper._qt, signal, slot, method)


def _exec_message_box(box: Any) -> int:
    """Click what the test answers: a standard button, or the text of a button that was added."""
    qt_box = box._qt
    buttons = qt_box.buttons()
    if len(buttons) <= 1 and qt_box.standardButtons() in (QtWidgets.QMessageBox.NoButton, QtWidgets.QMessageBox.Ok):
        RECORDER.show(_severity(qt_box.icon()), qt_box.text(), detailed_text=qt_box.detailedText())
        return EnumValue(QtWidgets.QMessageBox.Ok)
    answer = RECORDER.ask("question", qt_box.text(), dialog=None)
    chosen = [button for button in buttons if button.text().replace("&", "") == answer or qt_box.standardButton(button) == unwrap(answer)]
    if not chosen:
        RECORDER.fail(f"'{qt_box.text()}' has no button {answer!r}, only {[button.text() for button in buttons]}")
    qt_box.show()
    chosen[0].click()
    return wrap(qt_box.standardButton(chosen[0]))


def _exec_dialog(dialog: Any) -> int:
    """The test's answer: a callable gets the dialog, may fill it, and returns the result."""
    result = RECORDER.ask(dialog.className(), dialog.windowTitle, dialog=dialog)
    dialog._qt.done(int(result))
    return int(result)


def _exec_menu(menu: Any, *position: Any) -> Any:
    """Trigger the action with the text that the test answers; None closes the menu."""
    texts = [action.text() for action in menu._qt.actions()]
    answer = RECORDER.ask("QMenu", " | ".join(texts))
    chosen = [action for action in menu._qt.actions() if action.text() == answer]
    if answer is not None and not chosen:
        RECORDER.fail(f"The menu has no '{answer}', only {texts}")
    for action in chosen:
        action.trigger()
    return wrap(chosen[0]) if chosen else None


def _static_message(kind: str) -> Any:
    """QMessageBox.warning(parent, title, text, buttons): shown where there is one button, asked where there are more."""

    def message(parent: Any, title: str, text: str, buttons: Any = None, default_button: Any = None) -> Any:
        if kind == "question" or (buttons is not None and buttons != EnumValue(QtWidgets.QMessageBox.Ok)):
            return RECORDER.ask("question", text)
        RECORDER.show(kind, text)
        return EnumValue(QtWidgets.QMessageBox.Ok)

    return message


def _static_question(class_name: str) -> Any:
    """A static function with (parent, title or caption, ...) that returns what the test answers."""
    return lambda parent=None, title="", *further: RECORDER.ask(class_name, title)


def _open_url(url: Any) -> bool:
    """Record the address; nothing is opened."""
    RECORDER.opened_urls.append(url._qt.toString())
    return True


def _set_override_cursor(cursor: Any) -> None:
    """PySide6 returns a guard here, which would restore the cursor when it is dropped."""
    QtWidgets.QApplication.setOverrideCursor(unwrap(cursor))


def _severity(icon: QtWidgets.QMessageBox.Icon) -> str:
    """The kind of a message that its icon tells."""
    icons = QtWidgets.QMessageBox.Icon
    return {icons.Critical: "error", icons.Warning: "warning", icons.Question: "question"}.get(icon, "info")


METHODS = {
    "QObject.connect": _connect,
    "QObject.disconnect": _disconnect,
    "QObject.findChildren": _find_children,
    "QObject.findChild": _find_child,
    "QDialog.exec": _exec_dialog,
    "QDialog.exec_": _exec_dialog,
    "QMessageBox.exec": _exec_message_box,
    "QMessageBox.exec_": _exec_message_box,
    "QMenu.exec": _exec_menu,
    "QMenu.exec_": _exec_menu,
    "QUiLoader.load": lambda loader, file, parent=None: wrap(load_ui(bytes(file._qt.readAll()).decode("utf-8"))),
}

STATIC_FUNCTIONS = {
    "QApplication.setOverrideCursor": _set_override_cursor,
    "QMessageBox.information": _static_message("info"),
    "QMessageBox.warning": _static_message("warning"),
    "QMessageBox.critical": _static_message("error"),
    "QMessageBox.question": _static_message("question"),
    "QFileDialog.getExistingDirectory": _static_question("QFileDialog"),
    "QFileDialog.getOpenFileName": _static_question("QFileDialog"),
    "QFileDialog.getOpenFileNames": _static_question("QFileDialog"),
    "QFileDialog.getSaveFileName": _static_question("QFileDialog"),
    "QInputDialog.getText": _static_question("QInputDialog"),
    "QInputDialog.getItem": _static_question("QInputDialog"),
    "QInputDialog.getInt": _static_question("QInputDialog"),
    "QInputDialog.getDouble": _static_question("QInputDialog"),
    "QDesktopServices.openUrl": _open_url,
}
