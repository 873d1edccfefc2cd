"""qSlicerCoreIOManager: reading and writing nodes and scenes, by the storage nodes of MRML."""

import re
from pathlib import Path
from typing import Any

import slicer
from PySide6.QtCore import QObject

FILE_TYPES = {
    "vtkMRMLVolumeNode": "VolumeFile",
    "vtkMRMLSegmentationNode": "SegmentationFile",
    "vtkMRMLTableNode": "TableFile",
    "vtkMRMLMarkupsNode": "MarkupsFile",
    "vtkMRMLTransformNode": "TransformFile",
    "vtkMRMLModelNode": "ModelFile",
    "vtkMRMLTextNode": "TextFile",
}
NODE_CLASSES = {
    "SegmentationFile": "vtkMRMLSegmentationNode",
    "TableFile": "vtkMRMLTableNode",
    "TransformFile": "vtkMRMLTransformNode",
    "ModelFile": "vtkMRMLModelNode",
    "TextFile": "vtkMRMLTextNode",
}


class qSlicerCoreIOManager(QObject):
    """What slicer.util reads and writes with."""

    def fileType(self, file_name: str) -> str:
        """What a file holds, by its ending."""
        endings = {".mrml": "SceneFile", ".mrb": "SceneFile", ".seg.nrrd": "SegmentationFile", ".csv": "TableFile", ".tsv": "TableFile"}
        return next((kind for ending, kind in endings.items() if file_name.endswith(ending)), "VolumeFile")

    def forceFileNameValidCharacters(self, file_name: str) -> str:
        """Without the characters that Slicer keeps out of names of files."""
        return "".join(re.findall(r"[A-Za-z0-9 \-_.()$!~#'%^{}]", file_name))

    def fileWriterFileType(self, node: Any) -> str:
        """What a node is written as."""
        return next((kind for class_name, kind in FILE_TYPES.items() if node.IsA(class_name)), "NoFile")

    def loadNodes(self, file_type: str, properties: dict, nodes: Any = None, messages: Any = None) -> bool:
        """Load a file into the scene; the nodes go into the collection."""
        path = Path(properties["fileName"])
        if file_type == "SceneFile":
            return load_scene(path, clear=bool(properties.get("clear", False)))
        node = _load_volume(path, properties) if file_type == "VolumeFile" else _load_node(path, file_type, properties)
        if node is not None and nodes is not None:
            nodes.AddItem(node)
        return node is not None

    def saveNodes(self, file_type: str, properties: dict, messages: Any = None) -> bool:
        """Write a node, or the scene."""
        if file_type == "SceneFile":
            return save_scene(Path(properties["fileName"]))
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        storage = node.CreateDefaultStorageNode() if node.GetStorageNode() is None else node.GetStorageNode()
        if node.GetStorageNode() is None:
            storage.UnRegister(None)
            slicer.mrmlScene.AddNode(storage)
            node.SetAndObserveStorageNodeID(storage.GetID())
        storage.SetFileName(str(properties["fileName"]))
        return bool(storage.WriteData(node))


def load_scene(path: Path, *, clear: bool) -> bool:
    """Import a .mrml or .mrb file, after closing the scene if asked."""
    if path.suffix == ".mrb":
        return bool(slicer.mrmlScene.ReadFromMRB(str(path), clear))
    slicer.mrmlScene.SetURL(str(path))
    slicer.mrmlScene.SetRootDirectory(str(path.parent))
    return bool(slicer.mrmlScene.Connect() if clear else slicer.mrmlScene.Import())


def save_scene(path: Path) -> bool:
    """A .mrml file alone, or a .mrb file or a folder with the scene and all data."""
    if path.suffix == ".mrb":
        return bool(slicer.mrmlScene.WriteToMRB(str(path)))
    if path.suffix == ".mrml":
        slicer.mrmlScene.SetURL(str(path))
        slicer.mrmlScene.SetRootDirectory(str(path.parent))
        return bool(slicer.mrmlScene.Commit())
    if path.suffix:
        raise NotImplementedError(f"The stand-ins write .mrml files, .mrb files and folders, not {path.name}")
    path.mkdir(parents=True, exist_ok=True)
    return bool(slicer.app.applicationLogic().SaveSceneToSlicerDataBundleDirectory(str(path), None))


def _load_volume(path: Path, properties: dict) -> Any:
    """A volume by the logic of the Volumes module."""
    logic = slicer.modules.volumes.logic()
    options = (logic.LabelMap if properties.get("labelmap") else 0) | (logic.SingleFile if properties.get("singleFile") else 0)
    name = properties.get("name") or path.name.partition(".")[0]
    return logic.AddArchetypeVolume(str(path), name, options)


def _load_node(path: Path, file_type: str, properties: dict) -> Any:
    """Any other node by its storage node."""
    if file_type not in NODE_CLASSES:
        raise NotImplementedError(f"The stand-ins do not load a {file_type}")
    node = slicer.mrmlScene.AddNewNodeByClass(NODE_CLASSES[file_type], properties.get("name") or path.name.partition(".")[0])
    node.AddDefaultStorageNode()
    node.GetStorageNode().SetFileName(str(path))
    if node.GetStorageNode().ReadData(node):
        return node
    slicer.mrmlScene.RemoveNode(node)
    return None
