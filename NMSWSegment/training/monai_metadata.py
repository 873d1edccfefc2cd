"""configs/metadata.json of a bundle, in the format that MONAI's bundle tools read (MONAI Bundle Specification).

It describes the local net, which takes one patch. configs/inference.json lets `python -m monai.bundle run` segment a volume with
the engine of this program. The nets themselves stay where they are: MONAI's other tools that start a net (verify_net_in_out,
ckpt_export) look for models/ and a network definition, which these bundles do not have.
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import torch

from NMSWSegment import __version__
from NMSWSegment.files.bundle import BundleManifest

METADATA_PATH = "configs/metadata.json"
INFERENCE_PATH = "configs/inference.json"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
MODEL_VERSION = "1.0.0"


def monai_metadata(manifest: BundleManifest) -> dict:
    """The metadata of a bundle, JSON-ready; spatial shapes in array order (D, H, W)."""
    inputs = {"image": _image_format(manifest)}
    if manifest.is_cascade:
        inputs["coarse_logits"] = _logits_format(manifest, [length // factor for length, factor in zip(manifest.patch_size, manifest.coarse_factor)])
    return {
        "schema": SCHEMA,
        "version": MODEL_VERSION,
        "changelog": {MODEL_VERSION: f"exported with NMSWSegment {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"SimpleITK": version("SimpleITK")},
        "name": manifest.title,
        "task": f"Segmentation of {len(manifest.labels)} structures in {manifest.modality}",
        "description": manifest.description,
        "authors": "see MODEL_CARD.md",
        "data_source": "; ".join(manifest.attributions),
        "copyright": manifest.license,
        "intended_use": "Research. Not for clinical use.",
        "network_data_format": {"inputs": inputs, "outputs": {"pred": _logits_format(manifest, manifest.patch_size)}},
    }


def monai_inference() -> dict:
    """What `python -m monai.bundle run` does: segment `input` into `output`; the same for every bundle."""
    return {
        "imports": ["$from NMSWSegment import segment"],
        "bundle_root": ".",
        "input": "ct.nii.gz",
        "output": "labels.nii.gz",
        "k": 10,
        "device": "auto",
        "run": ["$segment(@input, model=@bundle_root, k=@k, device=@device).save(@output)"],
    }


def _image_format(manifest: BundleManifest) -> dict:
    """What the local net takes."""
    return {
        "type": "image",
        "format": "hounsfield" if manifest.modality == "CT" else "magnitude",
        "modality": manifest.modality,
        "num_channels": 1,
        "spatial_shape": list(manifest.patch_size),
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {"0": "image"},
    }


def _logits_format(manifest: BundleManifest, shape: Sequence[int]) -> dict:
    """What the local net gives, and what that of a cascade also takes: logits, the largest of which is the label."""
    return {
        "type": "image",
        "format": "labels",
        "num_channels": manifest.num_classes,
        "spatial_shape": list(shape),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(value): name for value, name in enumerate(["background", *manifest.label_names])},
    }
