"""The button "Export DICOM SEG...": a result of a DICOM series, written, read back and added to the database; and why there is none."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
pytest.importorskip("highdicom", reason="the extra dicom is not installed")
pytest.importorskip("PySide6.QtWidgets", reason="PySide6 cannot be loaded, so that there is nothing to click", exc_type=ImportError)
from dicom_folders import STUDY_UID, write_ct_series  # noqa: E402
from slicer_headless import add_transform, add_volume, no_vtk_errors, slicer  # noqa: E402
from test_panel_flow import TILT, app, own_folder, result_of, segment, widget  # noqa: E402, F401

from NMSWSegment.files.phantoms import phantom, upright_ijk_to_ras  # noqa: E402
from NMSWSegment.files.volume import read_volume  # noqa: E402
from NMSWSegment.panel.nodes import ijk_to_node_matrix  # noqa: E402
from NMSWSegment.protocol import SegmentOptions  # noqa: E402

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)

SHAPE = (54, 36, 52)


class Database:
    """What the panel asks of the application's DICOM database."""

    def __init__(self, folder: Path) -> None:
        self.files = {pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID: str(path) for path in folder.iterdir()}

    def fileForInstance(self, uid: str) -> str:
        """The file of an image, empty where it is not known."""
        return self.files.get(uid, "")


@pytest.fixture
def a_series(app, tmp_path, monkeypatch):  # noqa: F811
    """A phantom as a volume node loaded from DICOM, under a transform, with its files in the database."""
    upright = upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    ijk_to_ras = upright @ np.diag([-1.0, -1.0, 1.0, 1.0])  # as scanners write: columns run to the left, rows to the back
    ijk_to_ras[:3, 3] = upright[:3, 3] + upright[:3, :3] @ (SHAPE[2] - 1, SHAPE[1] - 1, 0)
    volume, _ = phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    write_ct_series(volume, tmp_path / "ct")
    volume = read_volume(tmp_path / "ct")
    node = add_volume(app.scene, volume.array, ijk_to_ras=volume.ijk_to_ras, name="Thorax")
    node.SetAndObserveTransformNodeID(add_transform(app.scene, TILT).GetID())
    database = Database(tmp_path / "ct")
    node.SetAttribute("DICOM.instanceUIDs", " ".join(database.files))
    monkeypatch.setattr(slicer, "dicomDatabase", database, raising=False)
    return node


@pytest.fixture
def panel(app, a_series):  # noqa: F811
    """The panel with a result of the series, made in this process."""
    panel = app.open_panel("NMSWSegment")
    node = panel.logic.getParameterNode()
    node.inputVolume, node.outputSegmentation = a_series, app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
    panel.logic.process(a_series, node.outputSegmentation, SegmentOptions(bundle="tiny", num_patches=2, device="cpu", threads=1))
    panel.enter()
    return panel


@pytest.fixture
def exported(app, panel, a_series, tmp_path):  # noqa: F811
    """A function that changes the result, clicks the button and gives (dataset, segment number on every voxel of the volume)."""

    def export(change=lambda node: None):
        change(result_of(panel))
        app.answers.extend([str(tmp_path / "result"), False])
        panel.ui.exportDicomButton.click()
        app.process_events()
        return pydicom.dcmread(tmp_path / "result.dcm"), voxels(tmp_path / "result.dcm", a_series)

    return export


def voxels(path: Path, volume_node) -> np.ndarray:
    """Segment numbers (K, J, I) on the voxels of the volume node, found by the position of every frame."""
    dataset = pydicom.dcmread(path)
    array = np.zeros(slicer.util.arrayFromVolume(volume_node).shape, np.uint8)
    ras_to_ijk = np.linalg.inv(ijk_to_node_matrix(volume_node))
    for frame, plane in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array):
        x, y, z = (float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient)
        i, j, k = np.rint((ras_to_ijk @ (-x, -y, z, 1))[:3]).astype(int)
        assert (i, j) == (0, 0)
        array[k][plane > 0] = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return array


def test_export_button_appears_with_a_result_and_names_why_it_is_gray(app, widget):  # noqa: F811
    assert not widget.ui.exportDicomButton.visible
    segment(app, widget)
    assert widget.ui.exportDicomButton.visible
    assert not widget.ui.exportDicomButton.enabled
    assert widget.ui.exportDicomButton.toolTip.startswith("The volume 'Phantom' was not loaded from DICOM")
    app.scene.RemoveNode(widget.logic.getParameterNode().inputVolume)
    widget.enter()
    assert "no longer in the scene" in widget.ui.exportDicomButton.toolTip


def test_result_that_goes_while_the_section_is_folded_does_not_bring_its_button_and_table_back(app, widget):  # noqa: F811
    segment(app, widget)
    assert widget.ui.exportDicomButton.visible and widget.ui.volumesTable.visible
    widget.ui.displaySection.collapsed = True
    widget.logic.getParameterNode().outputSegmentation = None
    widget.enter()
    widget.ui.displaySection.collapsed = False
    app.process_events()
    assert not widget.ui.exportDicomButton.visible and not widget.ui.volumesTable.visible


def test_export_writes_every_segment_where_it_is_with_patient_codes_and_model(app, exported, a_series):  # noqa: F811
    dataset, numbers = exported()

    assert (dataset.Modality, dataset.PatientID, dataset.StudyInstanceUID) == ("SEG", "P-17", STUDY_UID)
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == ["liver", "spleen", "vertebrae"]
    assert [item.SegmentedPropertyTypeCodeSequence[0].CodeValue for item in dataset.SegmentSequence] == ["10200004", "78961009", "51282000"]
    assert {item.SegmentAlgorithmType for item in dataset.SegmentSequence} == {"AUTOMATIC"}
    identification = dataset.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert identification.AlgorithmName == "NMSWSegment tiny"
    assert "k=2,policy=greedy,patches=2" in identification.AlgorithmParameters
    segmentation = next(node for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"))
    for number, name in enumerate(("liver", "spleen", "vertebrae"), start=1):
        expected = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, name, a_series) > 0
        assert expected.sum() > 20
        np.testing.assert_array_equal(numbers == number, expected)
    assert app.dialogs[-1].text.startswith("The segmentation was written to ")
    assert app.scene.GetFirstNodeByName("NMSW export") is None


def test_edited_result_is_exported_as_edited_and_under_the_name_that_the_user_gave(exported):
    def edit(node):
        node.GetSegmentation().GetSegment("spleen").SetName("my spleen")

    dataset, _ = exported(edit)
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == ["liver", "my spleen", "vertebrae"]
    assert {item.SegmentAlgorithmType for item in dataset.SegmentSequence} == {"SEMIAUTOMATIC"}


def test_export_goes_into_the_database_where_the_user_wants_it(app, panel, tmp_path):  # noqa: F811
    imported = []

    def import_dicom(folder, database, copy):
        imported.append(([path.name for path in Path(folder).iterdir()], database is slicer.dicomDatabase, copy))
        return True

    app.install_fake_module("DICOMLib", SimpleNamespace(DICOMUtils=SimpleNamespace(importDicom=import_dicom)))
    app.answers.extend([str(tmp_path / "other.dcm"), True])
    panel.ui.exportDicomButton.click()
    assert imported == [(["other.dcm"], True, True)]
    assert list(Path(slicer.app.temporaryPath).glob("*/other.dcm")) == []

    app.install_fake_module("DICOMLib", SimpleNamespace(DICOMUtils=SimpleNamespace(importDicom=lambda *arguments: False)))
    app.answers.extend([str(tmp_path / "third.dcm"), True])
    panel.ui.exportDicomButton.click()
    assert "import it in the DICOM module" in app.dialogs[-1].text


def test_series_that_left_the_database_is_told(app, panel, tmp_path):  # noqa: F811
    slicer.dicomDatabase.files.popitem()
    app.answers.append(str(tmp_path / "other.dcm"))
    panel.ui.exportDicomButton.click()
    assert app.dialogs[-1].kind == "error"
    assert f"has {SHAPE[0] - 1} of the {SHAPE[0]} images" in app.dialogs[-1].text
    assert not (tmp_path / "other.dcm").exists()


def test_overlapping_segments_are_told(app, panel, tmp_path):  # noqa: F811
    segmentation = result_of(panel)
    copy = slicer.vtkSegment()
    copy.DeepCopy(segmentation.GetSegmentation().GetSegment("liver"))
    copy.SetName("liver again")
    segmentation.GetSegmentation().AddSegment(copy, "again")
    assert segmentation.GetSegmentation().GetNumberOfLayers() == 2
    app.answers.append(str(tmp_path / "other.dcm"))
    panel.ui.exportDicomButton.click()
    assert "Some segments overlap" in app.dialogs[-1].text


@pytest.mark.parametrize("answer", [False, True])
def test_highdicom_is_installed_only_with_consent(app, panel, tmp_path, monkeypatch, answer):  # noqa: F811
    find_spec, installed = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highdicom" and not installed else find_spec(name))
    monkeypatch.setattr(slicer.util, "pip_install", installed.append)
    app.answers.extend([answer, str(tmp_path / "other.dcm"), False] if answer else [False])

    panel.ui.exportDicomButton.click()

    assert installed == (["highdicom>=0.27"] if answer else [])
    assert (tmp_path / "other.dcm").exists() == answer
    if not answer:
        assert app.dialogs[-1].kind == "info"
        assert app.dialogs[-1].text.startswith("The Python package highdicom was not installed")


def test_installation_that_fails_is_explained_and_a_newer_pydicom_asks_for_a_restart(app, panel, tmp_path, monkeypatch):  # noqa: F811

    def fail(requirement):
        raise RuntimeError("no internet")

    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "highdicom" else find_spec(name))
        patch.setattr(slicer.util, "pip_install", fail)
        app.answers.append(True)
        panel.ui.exportDicomButton.click()
    assert (app.dialogs[-1].kind, app.dialogs[-1].detailedText) == ("error", "RuntimeError: no internet")
    assert "--no-index" in app.dialogs[-1].text

    monkeypatch.setitem(sys.modules, "pydicom", SimpleNamespace(__version__="2.4.4"))
    panel.ui.exportDicomButton.click()
    assert app.dialogs[-1].text == "highdicom is installed. Restart the application to use it."
