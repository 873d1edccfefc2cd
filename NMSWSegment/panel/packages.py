"""Python packages that are not part of the application: PyTorch, and those of one function each. Nothing is installed without consent."""

import importlib.util
import sys

import slicer

from NMSWSegment.panel.application import details_argument
from NMSWSegment.panel.messages import (
    highdicom_question,
    openvino_question,
    package_not_installed_message,
    restart_message,
    torch_missing_message,
    torch_not_installed_message,
)

TORCH_REQUIREMENT = ">=2.2"
"""The first torch that reads the TorchScript archives of the bundles."""
HIGHDICOM_REQUIREMENT = "highdicom>=0.27"
OPENVINO_REQUIREMENT = "openvino>=2024.1"
PYDICOM_MAJOR = 3
"""Of the pydicom that highdicom needs; Slicer 5.10 comes with version 2."""


def ensure_torch() -> bool:
    """Whether PyTorch is there; where it is not, offer to install it with the PyTorch extension."""
    if importlib.util.find_spec("torch"):
        return True
    try:
        import PyTorchUtils
    except ModuleNotFoundError:
        slicer.util.errorDisplay(torch_missing_message().format(python=sys.version.split()[0]))
        return False
    details = ""
    try:
        PyTorchUtils.PyTorchUtilsLogic().installTorch(askConfirmation=True, torchVersionRequirement=TORCH_REQUIREMENT)
    except Exception as error:  # it imports torch at its end, also where the user declined or the download failed
        details = f"{type(error).__name__}: {error}"
    importlib.invalidate_caches()
    if importlib.util.find_spec("torch"):
        return True
    slicer.util.errorDisplay(torch_not_installed_message().format(python=sys.version.split()[0]), **details_argument(details))
    return False


def ensure_highdicom() -> bool:
    """Whether DICOM SEG can be written; where highdicom is not there, offer to install it. It brings a newer pydicom, which a running application cannot take up."""
    if not _ensure_package("highdicom", HIGHDICOM_REQUIREMENT, question=highdicom_question()):
        return False
    pydicom = sys.modules.get("pydicom")
    if pydicom is not None and int(pydicom.__version__.split(".")[0]) < PYDICOM_MAJOR:
        slicer.util.infoDisplay(restart_message("highdicom"))
        return False
    return True


def ensure_openvino() -> bool:
    """Whether OpenVINO is there; where it is not, offer to install it."""
    return _ensure_package("openvino", OPENVINO_REQUIREMENT, question=openvino_question())


def _ensure_package(name: str, requirement: str, *, question: str) -> bool:
    """Whether a package is there; where it is not, offer to install it."""
    if importlib.util.find_spec(name):
        return True
    details = ""
    if slicer.util.confirmYesNoDisplay(question):
        try:
            slicer.util.pip_install(requirement)
        except Exception as error:  # whatever pip stumbles upon: no internet, no permission, no version for this Python
            details = f"{type(error).__name__}: {error}"
        importlib.invalidate_caches()
        if importlib.util.find_spec(name):
            return True
    display = slicer.util.errorDisplay if details else slicer.util.infoDisplay
    display(package_not_installed_message(name, requirement), **details_argument(details))
    return False
