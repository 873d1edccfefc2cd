"""The sections of CTK that fold away, as classes of PySide6 with the same properties and signals."""

from PySide6.QtCore import Property, QEvent, QObject, QSize, Qt, Signal
from PySide6.QtWidgets import QAbstractButton, QGroupBox, QStyle, QStyleOptionButton, QStylePainter, QWidget


class Collapsing:
    """Hides the children of a widget while it is collapsed, also those that are shown meanwhile."""

    def __init__(self, widget: QWidget) -> None:
        self._widget = widget
        self._hidden_by_code: set[QWidget] = set()
        self.is_collapsed = False

    def set(self, is_collapsed: bool) -> bool:
        """Hide or show; whether something changed."""
        if is_collapsed == self.is_collapsed:
            return False
        children = self._widget.findChildren(QWidget, options=Qt.FindDirectChildrenOnly)
        if is_collapsed:
            self._hidden_by_code = {child for child in children if child.isHidden()}
        self.is_collapsed = is_collapsed
        for child in children:
            child.setHidden(is_collapsed or child in self._hidden_by_code)
        self._widget.updateGeometry()
        return True

    def filter(self, child: QObject, event: QEvent) -> None:
        """A child that is shown while collapsed is shown at the end of it."""
        if self.is_collapsed and event.type() == QEvent.ShowToParent:
            self._hidden_by_code.discard(child)
            child.hide()


class ctkCollapsibleButton(QAbstractButton):
    """A section with a title that folds away; checked means open."""

    contentsCollapsed = Signal(bool)

    def __init__(self, *arguments) -> None:
        texts = [argument for argument in arguments if isinstance(argument, str)]
        super().__init__(next((argument for argument in arguments if isinstance(argument, QWidget)), None))
        self._collapsing = Collapsing(self)
        self.setText("".join(texts))
        self.setCheckable(True)
        self.setChecked(True)
        self.setContentsMargins(0, self._button_size().height(), 0, 0)
        self.toggled.connect(lambda is_open: self._collapse(not is_open))

    def childEvent(self, event: QEvent) -> None:
        if event.added() and isinstance(event.child(), QWidget):
            event.child().installEventFilter(self)
        super().childEvent(event)

    def eventFilter(self, child: QObject, event: QEvent) -> bool:
        self._collapsing.filter(child, event)
        return super().eventFilter(child, event)

    def sizeHint(self) -> QSize:
        if self._collapsing.is_collapsed or not self.layout():
            return self._button_size()
        return self.layout().totalSizeHint().expandedTo(self._button_size())

    def minimumSizeHint(self) -> QSize:
        if self._collapsing.is_collapsed or not self.layout():
            return self._button_size()
        return self.layout().totalMinimumSize().expandedTo(self._button_size())

    def hitButton(self, position) -> bool:
        """Only the title is the button."""
        return position.y() < self._button_size().height()

    def paintEvent(self, event: QEvent) -> None:
        option = QStyleOptionButton()
        option.initFrom(self)
        option.rect.setHeight(self._button_size().height())
        painter = QStylePainter(self)
        painter.drawControl(QStyle.CE_PushButtonBevel, option)
        arrow = QStyleOptionButton(option)
        arrow.rect = option.rect.adjusted(6, 6, 0, -6)
        arrow.rect.setWidth(arrow.rect.height())
        painter.drawPrimitive(QStyle.PE_IndicatorArrowRight if self._collapsing.is_collapsed else QStyle.PE_IndicatorArrowDown, arrow)
        painter.drawText(option.rect.adjusted(arrow.rect.right() + 6, 0, 0, 0), Qt.AlignLeft | Qt.AlignVCenter, self.text())

    def _button_size(self) -> QSize:
        metrics = self.fontMetrics()
        return QSize(metrics.horizontalAdvance(self.text()) + 40, metrics.height() + 10)

    def _collapse(self, is_collapsed: bool) -> None:
        if self._collapsing.set(is_collapsed):
            self.contentsCollapsed.emit(is_collapsed)

    collapsed = Property(bool, lambda self: self._collapsing.is_collapsed, lambda self, is_collapsed: self.setChecked(not is_collapsed))


class ctkCollapsibleGroupBox(QGroupBox):
    """A group box that folds away when it is unchecked."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._collapsing = Collapsing(self)
        self.setCheckable(True)
        self.toggled.connect(lambda is_open: self._collapsing.set(not is_open))

    collapsed = Property(bool, lambda self: self._collapsing.is_collapsed, lambda self, is_collapsed: self.setChecked(not is_collapsed))
