"""The lists of the panel that depend on this computer or on the model: models, devices, runtimes, structures."""

import os
from collections.abc import Callable

import ctk
import qt
import slicer

from NMSWSegment.files.bundle import USER_FOLDER_VARIABLE, BundleManifest, install_bundle, list_bundles, load_bundle, remove_bundle, user_bundles_folder
from NMSWSegment.panel.application import _
from NMSWSegment.panel.messages import model_summary, model_tooltip
from NMSWSegment.protocol import EXACT, SegmentOptions, UserError

BUNDLES_FOLDER_KEY = "NMSWSegment/BundlesFolder"
TYPING_MS = 800


class ModelSection:
    """Fills the lists, and takes what is chosen there into the parameter node."""

    def __init__(self, ui, *, on_chosen: Callable[[], None], on_log: Callable[[str], None], close_worker: Callable[[], None]) -> None:
        """Fill the lists as far as anything is known.

        Args:
            ui: the widgets of the panel by name.
            on_chosen: called when another model, device or runtime is chosen.
            on_log: takes one line of the log.
            close_worker: ends the worker, which keeps the model folder it was started with.
        """
        self.ui = ui
        self.parameter_node = None
        """That of the scene; None while the panel is closed."""
        self.manifest: BundleManifest | None = None
        """Of the chosen model."""
        self.is_filling = False
        """Whether a list is being filled, so that what changes was not chosen by the user."""
        self._on_chosen, self._on_log, self._close_worker = on_chosen, on_log, close_worker
        self._manifests: dict[str, BundleManifest] = {}
        self._are_devices_known = False
        self._folder_timer = qt.QTimer()
        """A path that is typed changes with every key."""
        self._folder_timer.setSingleShot(True)
        self._folder_timer.setInterval(TYPING_MS)
        self._folder_timer.connect("timeout()", self._take_bundles_folder)
        self.ui.installOpenvinoButton.enabled = False
        if setting(BUNDLES_FOLDER_KEY):
            os.environ[USER_FOLDER_VARIABLE] = setting(BUNDLES_FOLDER_KEY)
        self.ui.bundlesFolderLineEdit.filters = ctk.ctkPathLineEdit.Dirs
        self.ui.bundlesFolderLineEdit.currentPath = str(user_bundles_folder())
        self.fill_models()
        self._fill_devices({"cpu": _("CPU")})
        self._fill_runtimes({EXACT: _("PyTorch (float32)")})
        self._connect()

    def show_settings(self) -> None:
        """Show what the parameter node says; what a scene names but this computer lacks is replaced there, so that nothing runs that is not shown."""
        node, defaults = self.parameter_node, SegmentOptions()
        for combo_box, name, default, is_known in (
            (self.ui.modelComboBox, "model", defaults.bundle, True),
            (self.ui.deviceComboBox, "device", defaults.device, self._are_devices_known),
            (self.ui.runtimeComboBox, "runtime", defaults.runtime, self._are_devices_known),
        ):
            chosen = getattr(node, name)
            if combo_box.findData(chosen) < 0 and not is_known:
                combo_box.addItem(chosen, chosen)
            used = chosen if combo_box.findData(chosen) >= 0 else default
            if combo_box.currentData != used:
                combo_box.currentIndex = max(0, combo_box.findData(used))
            if used != chosen and combo_box.currentData:
                self._on_log(_("'{chosen}' is not on this computer; '{used}' takes its place.").format(chosen=chosen, used=combo_box.currentData))
                setattr(node, name, combo_box.currentData)
        omitted = {name for name, is_checked in self.structures().items() if not is_checked}
        if omitted != set(node.omittedStructures) & set(self.structures()):
            self._fill_structures()

    def show_devices(self, titles: dict[str, str]) -> None:
        """Show the devices that the worker found: device -> title."""
        self._are_devices_known = True
        self._fill_devices(titles)

    def show_runtimes(self, titles: dict[str, str]) -> None:
        """Show the runtimes that the worker found: runtime -> title; offer OpenVINO where it is not installed."""
        self._fill_runtimes(titles)
        # not hidden: a section that is folded away shows what was hidden meanwhile when it opens
        self.ui.installOpenvinoButton.enabled = "openvino" not in titles

    def device(self) -> str:
        """The device that a run would take."""
        device = self.parameter_node.device
        if device == "auto":
            device = next(
                (
                    self.ui.deviceComboBox.itemData(index)
                    for index in range(self.ui.deviceComboBox.count)
                    if self.ui.deviceComboBox.itemData(index) not in ("auto", "cpu")
                ),
                "cpu",
            )
        return device

    def device_title(self, device: str) -> str:
        """A device by its display name."""
        row = self.ui.deviceComboBox.findData(device)
        return self.ui.deviceComboBox.itemText(row) if row >= 0 else device

    def _connect(self) -> None:
        """What happens on a click."""
        self.ui.modelComboBox.connect("currentIndexChanged(int)", self._on_model_chosen)
        self.ui.deviceComboBox.connect("currentIndexChanged(int)", self._on_device_chosen)
        self.ui.runtimeComboBox.connect("currentIndexChanged(int)", self._on_runtime_chosen)
        self.ui.structuresList.connect("itemChanged(QListWidgetItem*)", self._on_structure_checked)
        self.ui.structuresSearchBox.connect("textChanged(QString)", self._on_structure_search)
        self.ui.allStructuresButton.connect("clicked()", lambda: self._check_structures(True))
        self.ui.noStructuresButton.connect("clicked()", lambda: self._check_structures(False))
        self.ui.addModelButton.connect("clicked(bool)", self._on_add_model)
        self.ui.removeModelButton.connect("clicked(bool)", self._on_remove_model)
        self.ui.bundlesFolderLineEdit.connect("currentPathChanged(QString)", lambda path: self._folder_timer.start())

    def fill_models(self, chosen: str = "") -> None:
        """Fill the list of models, and choose one, or the one that was chosen; a bundle that cannot be read is named in the log."""
        chosen = chosen or (self.parameter_node.model if self.parameter_node else SegmentOptions.bundle)
        self.is_filling = True
        self._manifests.clear()
        self.ui.modelComboBox.clear()
        for name in list_bundles():
            try:
                manifest = self._manifests[name] = load_bundle(name).manifest
            except UserError as error:
                self._on_log(str(error))
                continue
            self.ui.modelComboBox.addItem(manifest.title, name)
            self.ui.modelComboBox.setItemData(self.ui.modelComboBox.count - 1, model_tooltip(manifest), qt.Qt.ToolTipRole)
        self.is_filling = False
        places = [self.ui.modelComboBox.findData(name) for name in (chosen, SegmentOptions.bundle)]
        self.ui.modelComboBox.currentIndex = next((place for place in places if place >= 0), 0)
        self._on_model_chosen()

    def _fill_devices(self, titles: dict[str, str]) -> None:
        """Fill the list of devices; one that a scene names but this computer lacks becomes Automatic."""
        chosen = self.parameter_node.device if self.parameter_node else SegmentOptions.device
        if not self._fill(self.ui.deviceComboBox, {"auto": _("Automatic"), **titles}, chosen=chosen):
            self._on_device_chosen()

    def _fill_runtimes(self, titles: dict[str, str]) -> None:
        """Fill the list of runtimes; one that a scene names but this computer lacks becomes the first, PyTorch in float32."""
        chosen = self.parameter_node.runtime if self.parameter_node else SegmentOptions.runtime
        if not self._fill(self.ui.runtimeComboBox, {**titles, "auto": _("Fastest of these")}, chosen=chosen):
            self._on_runtime_chosen()

    def _fill(self, combo_box: "qt.QComboBox", titles: dict[str, str], *, chosen: str) -> bool:
        """Fill a list with value -> title and choose a value, or the first where it is not there; whether it is."""
        self.is_filling = True
        combo_box.clear()
        for value, title in titles.items():
            combo_box.addItem(title, value)
        combo_box.currentIndex = max(0, combo_box.findData(chosen))
        self.is_filling = False
        return combo_box.currentData == chosen

    def _fill_structures(self) -> None:
        """Fill the checklist with the structures of the model."""
        omitted = self.parameter_node.omittedStructures if self.parameter_node else []
        self.is_filling = True
        self.ui.structuresList.clear()
        for label in self.manifest.labels if self.manifest else ():
            self.ui.structuresList.addItem(label.title)
            item = self.ui.structuresList.item(self.ui.structuresList.count - 1)
            item.setData(qt.Qt.UserRole, label.name)
            item.setCheckState(qt.Qt.Unchecked if label.name in omitted else qt.Qt.Checked)
        self.is_filling = False

    def _on_model_chosen(self, index: int = 0) -> None:
        """Show the facts of the model, and take it into the parameter node."""
        if self.is_filling:
            return
        name = self.ui.modelComboBox.currentData
        self.manifest = self._manifests.get(name)
        self.ui.modelSummaryLabel.text = model_summary(self.manifest) if self.manifest else ""
        self.ui.modelComboBox.toolTip = model_tooltip(self.manifest) if self.manifest else ""
        self.ui.removeModelButton.enabled = name in list_bundles(user_bundles_folder())
        if self.parameter_node and name:
            self.parameter_node.model = name
        self._fill_structures()
        self._on_chosen()

    def _on_device_chosen(self, index: int = 0) -> None:
        """Take the device into the parameter node."""
        if not self.is_filling and self.parameter_node and self.ui.deviceComboBox.currentData:
            self.parameter_node.device = self.ui.deviceComboBox.currentData
            self._on_chosen()

    def _on_runtime_chosen(self, index: int = 0) -> None:
        """Take the runtime into the parameter node."""
        if not self.is_filling and self.parameter_node and self.ui.runtimeComboBox.currentData:
            self.parameter_node.runtime = self.ui.runtimeComboBox.currentData
            self._on_chosen()

    def _on_structure_checked(self, item=None) -> None:
        """Take the checked structures into the parameter node."""
        if not self.is_filling and self.parameter_node:
            self.parameter_node.omittedStructures = [name for name, is_checked in self.structures().items() if not is_checked]

    def _on_structure_search(self, text: str) -> None:
        """Show the structures whose names hold the text."""
        for row in range(self.ui.structuresList.count):
            item = self.ui.structuresList.item(row)
            item.setHidden(text.strip().lower() not in item.text().lower())

    def structures(self) -> dict[str, bool]:
        """Structure name -> whether it is checked, in the order of the labels."""
        items = [self.ui.structuresList.item(row) for row in range(self.ui.structuresList.count)]
        return {item.data(qt.Qt.UserRole): item.checkState() == qt.Qt.Checked for item in items}

    def _check_structures(self, is_checked: bool) -> None:
        """Check or uncheck all that the search shows."""
        self.is_filling = True
        for row in range(self.ui.structuresList.count):
            item = self.ui.structuresList.item(row)
            if not item.isHidden():
                item.setCheckState(qt.Qt.Checked if is_checked else qt.Qt.Unchecked)
        self.is_filling = False
        self._on_structure_checked()

    def _on_add_model(self, checked: bool = False) -> None:
        """Copy a bundle into the model folder."""
        folder = qt.QFileDialog.getExistingDirectory(
            slicer.util.mainWindow(), _("Models contain executable code: choose the folder of a model from a source you trust")
        )
        if folder:
            self._change_models(lambda: install_bundle(folder).manifest.name)

    def _on_remove_model(self, checked: bool = False) -> None:
        """Delete the chosen model from the model folder."""
        name = self.parameter_node.model
        if slicer.util.confirmYesNoDisplay(_("Remove the model '{name}' from this computer?").format(name=name)):
            self._change_models(lambda: remove_bundle(name))

    def close(self) -> None:
        """The panel goes away."""
        self._folder_timer.stop()

    def _take_bundles_folder(self) -> None:
        """Look for user-installed models in another folder, also next time and in the worker; a path that is no folder yet is still being typed."""
        folder = self.ui.bundlesFolderLineEdit.currentPath
        if folder == setting(BUNDLES_FOLDER_KEY) or (folder and not os.path.isdir(folder)):
            return
        qt.QSettings().setValue(BUNDLES_FOLDER_KEY, folder)
        os.environ[USER_FOLDER_VARIABLE] = folder
        self._close_worker()
        self.fill_models()

    def _change_models(self, change) -> None:
        """Add or remove a model, and choose the added one."""
        with slicer.util.tryWithErrorDisplay(_("The models could not be changed.")):
            try:
                name = change()
            except UserError as error:
                slicer.util.errorDisplay(str(error))
                return
            self.fill_models(name or "")


def setting(key: str) -> str:
    """A text that the application remembers on this computer."""
    return str(qt.QSettings().value(key) or "")
