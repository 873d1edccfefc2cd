"""The widgets of CTK that a panel uses, as classes of PySide6 with the same properties and signals."""

import enum

from PySide6.QtCore import Property, QFlag, Qt, Signal
from PySide6.QtGui import QStandardItem
from PySide6.QtWidgets import QCheckBox, QComboBox, QDoubleSpinBox, QHBoxLayout, QLineEdit, QMessageBox, QSlider, QToolButton, QWidget

from standins.recorder import RECORDER


class ctkSliderWidget(QWidget):
    """A slider and a spin box of the same value."""

    valueChanged = Signal(float)
    valueIsChanging = Signal(float)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._slider = QSlider(Qt.Horizontal)
        self._spin_box = QDoubleSpinBox()
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._slider, 1)
        layout.addWidget(self._spin_box)
        self._tracking = True
        self._page_step = 10.0
        self._update_slider()
        self._spin_box.valueChanged.connect(self._on_value)
        self._slider.valueChanged.connect(lambda step: self._spin_box.setValue(self._spin_box.minimum() + step * self._spin_box.singleStep()))
        self._slider.sliderReleased.connect(lambda: None if self._tracking else self.valueChanged.emit(self._spin_box.value()))

    def setValue(self, value: float) -> None:
        """Move both; the range clamps."""
        self._spin_box.setValue(value)

    def setDecimals(self, decimals: int) -> None:
        """How many decimals the value is rounded to."""
        self._spin_box.setDecimals(decimals)
        self._update_slider()

    def setSpinBoxVisible(self, visible: bool) -> None:
        """Show or hide the number."""
        self._spin_box.setVisible(visible)

    def reset(self) -> None:
        """The value 0."""
        self.setValue(0.0)

    def _on_value(self, value: float) -> None:
        """The spin box holds the value; while a person drags without tracking, the change is announced at the end."""
        self._update_slider()
        if not self._tracking:
            self.valueIsChanging.emit(value)
        if self._tracking or not self._slider.isSliderDown():
            self.valueChanged.emit(value)

    def _update_slider(self) -> None:
        """Put the slider where the spin box is."""
        spin_box = self._spin_box
        blocked = self._slider.blockSignals(True)
        step = spin_box.singleStep()
        self._slider.setRange(0, round((spin_box.maximum() - spin_box.minimum()) / step))
        self._slider.setPageStep(max(1, round(self._page_step / step)))
        self._slider.setValue(round((spin_box.value() - spin_box.minimum()) / step))
        self._slider.blockSignals(blocked)

    def _set_minimum(self, minimum: float) -> None:
        self._spin_box.setMinimum(minimum)
        self._update_slider()

    def _set_maximum(self, maximum: float) -> None:
        self._spin_box.setMaximum(maximum)
        self._update_slider()

    def _set_single_step(self, step: float) -> None:
        self._spin_box.setSingleStep(step)
        self._update_slider()

    def _set_page_step(self, step: float) -> None:
        self._page_step = step
        self._update_slider()

    def _set_tracking(self, tracking: bool) -> None:
        self._tracking = tracking

    value = Property(float, lambda self: self._spin_box.value(), setValue)
    minimum = Property(float, lambda self: self._spin_box.minimum(), _set_minimum)
    maximum = Property(float, lambda self: self._spin_box.maximum(), _set_maximum)
    singleStep = Property(float, lambda self: self._spin_box.singleStep(), _set_single_step)
    pageStep = Property(float, lambda self: self._page_step, _set_page_step)
    decimals = Property(int, lambda self: self._spin_box.decimals(), setDecimals)
    prefix = Property(str, lambda self: self._spin_box.prefix(), lambda self, text: self._spin_box.setPrefix(text))
    suffix = Property(str, lambda self: self._spin_box.suffix(), lambda self, text: self._spin_box.setSuffix(text))
    tracking = Property(bool, lambda self: self._tracking, _set_tracking)
    spinBoxVisible = Property(bool, lambda self: self._spin_box.isVisibleTo(self), setSpinBoxVisible)


class ctkDoubleSpinBox(QDoubleSpinBox):
    """A spin box; the decimals options of CTK are not here."""


class ctkSearchBox(QLineEdit):
    """A line of text to search with."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._show_search_icon = False
        self.setPlaceholderText("Search...")
        self.setClearButtonEnabled(True)

    def _set_show_search_icon(self, show: bool) -> None:
        self._show_search_icon = show

    showSearchIcon = Property(bool, lambda self: self._show_search_icon, _set_show_search_icon)


class ctkPathLineEdit(QWidget):
    """A path that a person types, or picks with the button: then the test is asked."""

    class Filter(enum.Flag):
        """What may be picked; the numbers are those of QDir."""

        Dirs = 0x1
        Files = 0x2
        Drives = 0x4
        NoSymLinks = 0x8
        Readable = 0x10
        Writable = 0x20
        Executable = 0x40
        Hidden = 0x100
        System = 0x200
        AllDirs = 0x400
        NoDot = 0x2000
        NoDotDot = 0x4000
        NoDotAndDotDot = 0x6000

    QFlag(Filter)  # known to Designer's forms
    Dirs, Files, Drives, AllDirs = Filter.Dirs, Filter.Files, Filter.Drives, Filter.AllDirs
    NoDot, NoDotDot, NoDotAndDotDot = Filter.NoDot, Filter.NoDotDot, Filter.NoDotAndDotDot
    Readable, Writable, Executable, Hidden = Filter.Readable, Filter.Writable, Filter.Executable, Filter.Hidden

    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._filters = self.AllDirs | self.Files | self.Drives | self.NoDotAndDotDot
        self._line = QComboBox()
        self._line.setEditable(True)
        self._button = QToolButton()
        self._button.setText("...")
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._line, 1)
        layout.addWidget(self._button)
        self._line.editTextChanged.connect(self.currentPathChanged)
        self._button.clicked.connect(self.browse)
        self._name_filters: list[str] = []
        self._setting_key = ""

    def browse(self) -> None:
        """Take the path that the test answers."""
        path = RECORDER.ask("ctkPathLineEdit", "Select a file to save or open")
        if path:
            self.setCurrentPath(str(path))

    def setCurrentPath(self, path: str) -> None:
        """Show a path."""
        self._line.setEditText(path)

    def comboBox(self) -> QComboBox:
        """The line."""
        return self._line

    def addCurrentPathToHistory(self) -> None:
        """Offer the path again."""
        if self._line.findText(self._line.currentText()) < 0:
            self._line.addItem(self._line.currentText())

    def _set_name_filters(self, filters: list[str]) -> None:
        self._name_filters = filters

    def _set_setting_key(self, key: str) -> None:
        self._setting_key = key

    def _set_filters(self, filters: Filter) -> None:
        self._filters = self.Filter(filters)

    filters = Property(Filter, lambda self: self._filters, _set_filters)
    currentPath = Property(str, lambda self: self._line.currentText(), setCurrentPath)
    nameFilters = Property("QStringList", lambda self: self._name_filters, _set_name_filters)
    settingKey = Property(str, lambda self: self._setting_key, _set_setting_key)
    showBrowseButton = Property(bool, lambda self: not self._button.isHidden(), lambda self, show: self._button.setVisible(show))


class ctkCheckBox(QCheckBox):
    """A check box that may have icons; they are not here."""


class ctkComboBox(QComboBox):
    """A combo box with a text for "nothing chosen"."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._default_text = ""

    def _set_default_text(self, text: str) -> None:
        self._default_text = text
        self.setPlaceholderText(text)

    def setCurrentUserDataAsString(self, data: str) -> None:
        """Choose the entry with this data."""
        self.setCurrentIndex(self.findData(data))

    defaultText = Property(str, lambda self: self._default_text, _set_default_text)
    currentUserDataAsString = Property(str, lambda self: str(self.currentData() or ""), setCurrentUserDataAsString)


class ctkExpandButton(QToolButton):
    """A small arrow that folds something."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setCheckable(True)
        self.setAutoRaise(True)
        self.setArrowType(Qt.RightArrow)
        self._mirror = False

    def _set_mirror(self, mirror: bool) -> None:
        self._mirror = mirror

    mirrorOnExpand = Property(bool, lambda self: self._mirror, _set_mirror)


class ctkCheckableComboBox(QComboBox):
    """A combo box whose entries have check boxes."""

    checkedIndexesChanged = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.model().rowsInserted.connect(lambda parent, first, last: [self._make_checkable(row) for row in range(first, last + 1)])
        self.model().itemChanged.connect(self._on_item)

    def checkedIndexes(self) -> list:
        """Model indexes of the checked entries."""
        return [self.model().index(row, 0) for row in range(self.count()) if self.model().item(row).checkState() == Qt.Checked]

    def checkState(self, index) -> Qt.CheckState:
        """Whether an entry is checked."""
        return self.model().itemFromIndex(index).checkState()

    def setCheckState(self, index, state: Qt.CheckState) -> None:
        """Check an entry, or not."""
        self.model().itemFromIndex(index).setCheckState(state)

    def checkableModel(self):
        """The model."""
        return self.model()

    def _make_checkable(self, row: int) -> None:
        item = self.model().item(row)
        item.setCheckable(True)
        item.setData(Qt.Unchecked, Qt.CheckStateRole)

    def _on_item(self, item: QStandardItem) -> None:
        self.checkedIndexesChanged.emit()

    allChecked = Property(bool, lambda self: len(self.checkedIndexes()) == self.count())
    noneChecked = Property(bool, lambda self: not self.checkedIndexes())


class ctkMessageBox(QMessageBox):
    """A message box that may say "Don't show this message again"."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._settings_key = ""

    def _set_settings_key(self, key: str) -> None:
        self._settings_key = key

    dontShowAgainSettingsKey = Property(str, lambda self: self._settings_key, _set_settings_key)
