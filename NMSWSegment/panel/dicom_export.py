"""A result as DICOM SEG: the slices come from the application's DICOM database, the segments from the segmentation node, edited or not."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import slicer
import vtk

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.dicom_segmentation import Algorithm, export_dicom_seg
from NMSWSegment.files.labels import codes_of_terminology
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.application import _
from NMSWSegment.panel.messages import not_from_dicom_message
from NMSWSegment.panel.nodes import LABELMAP_REPRESENTATION, ijk_to_node_matrix
from NMSWSegment.panel.result import is_as_made
from NMSWSegment.protocol import UserError

INSTANCES_ATTRIBUTE = "DICOM.instanceUIDs"
"""Of a volume node that was loaded from DICOM: SOP Instance UIDs, separated by spaces."""


def is_result(segmentation_node: "slicer.vtkMRMLSegmentationNode | None") -> bool:
    """Whether a run made the segmentation, in this session or another one."""
    return segmentation_node is not None and bool(segmentation_node.GetAttribute("NMSW.Bundle"))


def export_obstacle(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> str:
    """Why there can be no DICOM SEG of a result, in a sentence; empty where there can."""
    volume_node = _volume_node(segmentation_node)
    if volume_node is None:
        return _("The volume that was segmented is no longer in the scene, and a DICOM SEG refers to its images. Load the series and segment it again.")
    return "" if volume_node.GetAttribute(INSTANCES_ATTRIBUTE) else not_from_dicom_message(volume_node.GetName())


def write_dicom_seg(segmentation_node: "slicer.vtkMRMLSegmentationNode", output: str | Path) -> Path:
    """Write a result as DICOM SEG.

    Args:
        segmentation_node: a result.
        output: file that ends in .dcm.

    Raises:
        UserError: there is an export_obstacle, the DICOM database lacks the series, segments overlap, or as files.dicom_segmentation.export_dicom_seg.
    """
    if obstacle := export_obstacle(segmentation_node):
        raise UserError(obstacle)
    volume_node = _volume_node(segmentation_node)
    paths = _source_files(volume_node)
    labels = _labels(segmentation_node)
    labelmap = _labelmap(segmentation_node, volume_node)
    return export_dicom_seg(labelmap, paths, output, labels=labels, algorithm=_algorithm(segmentation_node))


def add_to_database(path: Path) -> None:
    """Copy a DICOM file into the application's DICOM database.

    Raises:
        UserError: the database did not take it.
    """
    from DICOMLib import DICOMUtils

    folder = Path(tempfile.mkdtemp(dir=slicer.app.temporaryPath))  # the import takes a whole folder
    try:
        shutil.copy(path, folder)
        if not DICOMUtils.importDicom(str(folder), slicer.dicomDatabase, True):
            raise UserError(
                _("The DICOM database did not take the segmentation. The file '{path}' is complete: import it in the DICOM module.").format(path=path)
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _volume_node(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> "slicer.vtkMRMLScalarVolumeNode | None":
    """The volume that was segmented."""
    return segmentation_node.GetNodeReference(slicer.vtkMRMLSegmentationNode.GetReferenceImageGeometryReferenceRole())


def _source_files(volume_node: "slicer.vtkMRMLScalarVolumeNode") -> list[Path]:
    """The files of the series that a volume was loaded from.

    Raises:
        UserError: the DICOM database does not know all of them, or they are gone.
    """
    uids = volume_node.GetAttribute(INSTANCES_ATTRIBUTE).split()
    database = getattr(slicer, "dicomDatabase", None)
    found = [database.fileForInstance(uid) for uid in uids] if database is not None else []
    paths = list(dict.fromkeys(Path(path) for path in found if path and Path(path).is_file()))  # a multi-frame file may be named once a frame
    if not paths or not all(found):
        raise UserError(
            _(
                "The DICOM database has {found} of the {total} images that '{name}' was loaded from. Import the series again in the DICOM module, then export."
            ).format(found=len(paths), total=len(uids), name=volume_node.GetName())
        )
    return paths


def _labels(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> list[Label]:
    """Labels 1, 2, ... of the segments as they are now: names, colors and codes."""
    segmentation = segmentation_node.GetSegmentation()
    labels = []
    for value, segment_id in enumerate(segmentation.GetSegmentIDs(), start=1):
        segment = segmentation.GetSegment(segment_id)
        entry = vtk.reference("")
        segment.GetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), entry)
        category, type_code, modifier = codes_of_terminology(str(entry))
        color = tuple(round(255 * channel) for channel in segment.GetColor())
        label = Label(value=value, name=segment_id, color=color, category=category, type=type_code, modifier=modifier)
        labels.append(label if label.title == segment.GetName() else dataclasses.replace(label, name=segment.GetName()))
    return labels


def _labelmap(segmentation_node: "slicer.vtkMRMLSegmentationNode", volume_node: "slicer.vtkMRMLScalarVolumeNode") -> Volume:
    """The values of `_labels` on the voxels of the volume, in its own coordinates: a transform in the scene does not move the patient.

    Raises:
        UserError: segments overlap, which one labelmap cannot hold.
    """
    segmentation = segmentation_node.GetSegmentation()
    if segmentation.GetNumberOfLayers(LABELMAP_REPRESENTATION) > 1:
        aside = slicer.vtkSegmentation()
        aside.DeepCopy(segmentation)
        aside.CollapseBinaryLabelmaps(False)  # layers without an overlap become one
        if aside.GetNumberOfLayers(LABELMAP_REPRESENTATION) > 1:
            raise UserError(
                _(
                    "Some segments overlap, which a DICOM SEG of this module cannot hold. Separate them in the Segment Editor (Logical operators > Subtract), or "
                    "export with the Data module."
                )
            )
    segment_ids = vtk.vtkStringArray()
    for segment_id in segmentation.GetSegmentIDs():
        segment_ids.InsertNextValue(segment_id)
    labelmap_node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "NMSW export")
    try:
        if not slicer.modules.segmentations.logic().ExportSegmentsToLabelmapNode(segmentation_node, segment_ids, labelmap_node, volume_node):
            raise UserError(_("The segmentation is empty. Segment the volume again."))
        return Volume(array=slicer.util.arrayFromVolume(labelmap_node).copy(), ijk_to_ras=ijk_to_node_matrix(volume_node))
    finally:
        if labelmap_node.GetDisplayNode() is not None:
            slicer.mrmlScene.RemoveNode(labelmap_node.GetDisplayNode().GetColorNode())  # the color table of this labelmap
        slicer.mrmlScene.RemoveNode(labelmap_node)


def _algorithm(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> Algorithm:
    """How the result was made, from the node's attributes, which a saved scene keeps."""
    made = {name: segmentation_node.GetAttribute(f"NMSW.{name}") for name in ("Bundle", "BundleSHA256", "NumPatches", "Policy", "PatchesRun", "Version")}
    return Algorithm.of_bundle(
        made["Bundle"], sha256=made["BundleSHA256"], k=made["NumPatches"], policy=made["Policy"], patches=int(made["PatchesRun"]), version=made["Version"],
        is_edited=not is_as_made(segmentation_node),
    )  # fmt: skip
