"""Where the files beside the code lie: bundles, terminology, sample volume."""

from pathlib import Path


def resources_folder() -> Path:
    """The Resources folder: beside the package in a checkout and in Slicer, inside it after `pip install`."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "Resources"
    return installed if installed.is_dir() else package.parent / "Resources"


SAMPLE_PATH = resources_folder() / "SampleData" / "cptac_pda_3mm.nii.gz"
SAMPLE_NAME = "NMSWTorsoCT"
"""What the sample volume is called in a scene."""
