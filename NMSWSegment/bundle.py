"""A bundle: a folder with a manifest and two TorchScript nets, checked before it is trusted.

The manifest says everything that inference needs to know: labels, spacing, intensity, patches, hashes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from NMSWSegment.protocol import UserError, reject_unknown_keys, unknown_name
from NMSWSegment.resources import resources_folder

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
BUNDLES_FOLDER = resources_folder() / "Bundles"


@dataclass(frozen=True)
class Code:
    """A coded concept of DICOM."""

    scheme: str
    """Coding scheme designator; SCT is SNOMED CT."""
    value: str
    """Code value."""
    meaning: str
    """Code meaning in English."""


@dataclass(frozen=True)
class Label:
    """One class of a bundle; background is label 0 and is not listed."""

    value: int
    """Integer in the labelmap, 1..C-1."""
    name: str
    """Stable name, used as segment id: kidney_right."""
    color: tuple[int, int, int]
    """Red, green, blue in 0..255."""
    category: Code
    """Segmented property category, e.g. anatomical structure."""
    type: Code
    """Segmented property type, e.g. kidney."""
    modifier: Code | None = None
    """Segmented property type modifier, e.g. right."""

    @property
    def title(self) -> str:
        """Name for a person: 'right kidney' for kidney_right."""
        words = self.name.split("_")
        if words[-1] in ("left", "right"):
            words = [words[-1], *words[:-1]]
        return " ".join(words)

    @property
    def terminology(self) -> str:
        """Slicer's terminology entry string (category, type, modifier; no anatomic region)."""
        codes = [f"{code.scheme}^{code.value}^{code.meaning}" if code else "^^" for code in (self.category, self.type, self.modifier)]
        context = "Segmentation category and type - DICOM master list"
        return "~".join([context, *codes, "Anatomic codes - DICOM master list", "^^", "^^"])


@dataclass(frozen=True)
class BundleManifest:
    """All that is known about a bundle; triples are in array order KJI."""

    name: str
    title: str
    description: str
    backbone: str
    modality: str
    spacing_mm: tuple[float, float, float]
    """Model spacing."""
    intensity_points: tuple[tuple[float, float], ...]
    """Piecewise-linear map from the volume's intensity (HU for CT) to [0, 1], clamped outside; two points are a window."""
    patch_size: tuple[int, int, int]
    overlap: float
    coarse_factor: tuple[int, int, int]
    """r: full-resolution voxels per coarse voxel."""
    coarse_multiple: int
    """The coarse net takes sizes that are multiples of this."""
    labels: tuple[Label, ...]
    class_weights: tuple[float, ...]
    """c of Eq. 6, one per class with background first; the mixing weight is sigmoid(clamp(c, -1, 10))."""
    sha256: dict[str, str]
    """SHA-256 of every file beside the manifest that inference reads, by file name."""
    architecture: dict
    """How the nets were built, enough to build them again and load the archived weights."""
    training: dict = field(default_factory=dict)
    """What the weights were trained on and how; for people."""
    scores: dict = field(default_factory=dict)
    """Held-out scores; for people."""
    licence: str = "Apache-2.0"
    attributions: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        """C, with background."""
        return len(self.labels) + 1

    @property
    def label_names(self) -> list[str]:
        """Names in label order."""
        return [label.name for label in self.labels]

    def to_json(self) -> str:
        """The manifest file's text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict) -> "BundleManifest":
        """A manifest from its JSON object.

        Raises:
            UserError: a key is unknown or missing, or the format is newer than this program.
        """
        found_version = values.get("format_version", FORMAT_VERSION)
        if found_version != FORMAT_VERSION:
            raise UserError(f"The bundle has format {found_version}, this program reads format {FORMAT_VERSION}. Update NMSWSegment or export the bundle again.")
        reject_unknown_keys(cls, values, where="the bundle manifest")
        values = dict(values)
        try:
            values["labels"] = tuple(_label_from_dict(label) for label in values["labels"])
            for key in ("spacing_mm", "patch_size", "coarse_factor", "class_weights"):
                values[key] = tuple(values[key])
            values["intensity_points"] = tuple((float(x), float(y)) for x, y in values["intensity_points"])
            values["attributions"] = tuple(values.get("attributions", ()))
            manifest = cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The bundle manifest is incomplete or malformed ({error}). Export the bundle again.") from error
        if len(manifest.class_weights) != manifest.num_classes:
            raise UserError(f"The bundle manifest has {len(manifest.class_weights)} class weights for {manifest.num_classes} classes. Export the bundle again.")
        return manifest


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk."""

    folder: Path
    manifest: BundleManifest
    sha256: str
    """SHA-256 of the manifest file, which itself holds the hashes of the nets: names the bundle in reports."""

    @property
    def coarse_path(self) -> Path:
        """TorchScript archive of the coarse net."""
        return self.folder / "coarse.pt"

    @property
    def local_path(self) -> Path:
        """TorchScript archive of the local net."""
        return self.folder / "local.pt"


def list_bundles(folder: Path = BUNDLES_FOLDER) -> list[str]:
    """Names of the installed bundles, sorted."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{MANIFEST_NAME}"))


def load_bundle(name_or_folder: str | Path) -> Bundle:
    """Find a bundle by name or folder, read its manifest and check the hashes of its files.

    Raises:
        UserError: there is no such bundle, or a file is missing or was changed.
    """
    folder = BUNDLES_FOLDER / str(name_or_folder)
    if not (folder / MANIFEST_NAME).is_file():
        folder = Path(name_or_folder)
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        if folder.is_dir():
            raise UserError(f"The folder '{folder}' is not a bundle: it has no {MANIFEST_NAME}. Give the folder that 'nmsw export' wrote.")
        raise UserError(unknown_name("bundle", str(name_or_folder), list_bundles(BUNDLES_FOLDER)) + " A folder that 'nmsw export' wrote works too.")
    return _checked_bundle(folder.resolve(), manifest_path.read_bytes())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked_bundle(folder: Path, manifest_bytes: bytes) -> Bundle:
    """Parse the manifest and compare every listed hash with the file on disk."""
    try:
        values = json.loads(manifest_bytes)
    except ValueError as error:
        raise UserError(f"'{folder / MANIFEST_NAME}' is not JSON ({error}). Install the bundle again.") from error
    manifest = BundleManifest.from_dict(values)
    for name, expected in manifest.sha256.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"Bundle '{manifest.name}' lacks the file '{name}'. Install the bundle again.")
        found = file_sha256(path)
        if found != expected:
            raise UserError(
                f"File '{name}' of bundle '{manifest.name}' was changed: its SHA-256 is {found[:12]}..., the manifest says {expected[:12]}.... "
                "Install the bundle again, or export it again if you changed it on purpose."
            )
    return Bundle(folder=folder, manifest=manifest, sha256=hashlib.sha256(manifest_bytes).hexdigest())


def _label_from_dict(values: dict) -> Label:
    """A Label from its JSON object."""
    reject_unknown_keys(Label, values, where="a label of the bundle manifest")
    codes = {key: Code(**values[key]) if values.get(key) else None for key in ("category", "type", "modifier")}
    return Label(value=int(values["value"]), name=values["name"], color=tuple(values["color"]), **codes)
