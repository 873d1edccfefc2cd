"""A bundle: a folder with a manifest and two TorchScript nets, checked before it is trusted.

The manifest says everything that inference needs to know: labels, spacing, intensity, patches, hashes. Bundles come with
the program, or a user installs them into a folder of their own, which an update of the program leaves alone.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from NMSWSegment.files.manifest_schema import check_manifest
from NMSWSegment.files.normalization import FIXED
from NMSWSegment.files.output_file import check_name, replace_folder, replace_path
from NMSWSegment.files.resources import resources_folder
from NMSWSegment.protocol import AUTO_GAIN, UserError, reject_unknown_keys, unknown_name

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
BUNDLES_FOLDER = resources_folder() / "Bundles"
"""The bundles that come with the program."""
USER_FOLDER_VARIABLE = "NMSW_BUNDLES"
"""Environment variable that moves the folder of user-installed bundles, for example to a network drive of the department."""
NET_NAMES = ("coarse.pt", "local.pt")
MAX_NAME_LENGTH = 64  # Windows takes 260 characters for a whole path
_WINDOWS_CHARACTERS = frozenset('<>:"/\\|?*')
_WINDOWS_DEVICES = frozenset(("con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))))


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
        """Display name: 'right kidney' for kidney_right."""
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
    """Piecewise-linear map from the volume's intensity, in units of `normalization`, to [0, 1], clamped outside; two points are a window (docs/deviations.md, D11)."""
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
    importance_has_entropy: bool = False
    """Whether the importance map is the log of a gain already; that of older bundles does not know the coarse answer's entropy, which is added."""
    normalization: str = FIXED
    """One of normalization.NORMALIZATIONS; fixed, that of older bundles, takes the intensity as it is, HU for CT."""
    num_runs: int = 1
    """Runs whose nets the archives hold; of more than one, such as the folds of a cross-validation, the mean of their probabilities is the answer."""
    auto_gain: float = AUTO_GAIN
    """Share of the expected error that the next patch must add for k = auto to take it."""
    min_island_share: float = 0.0
    """Parts of a structure that lie apart from it and are smaller than this share of its largest part become background; 0 keeps all."""
    training: dict = field(default_factory=dict)
    """What the weights were trained on and how; for people."""
    scores: dict = field(default_factory=dict)
    """Held-out scores; for people."""
    license: str = "not stated"
    """Of the weights."""
    attributions: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        """C, with background."""
        return len(self.labels) + 1

    @property
    def is_cascade(self) -> bool:
        """Whether the local net reads the coarse logits of its patch beside the image."""
        return bool(self.architecture.get("cascade", False))

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
            UserError: a key is unknown or missing, a value is of the wrong type or out of range, or the format is newer than this program.
        """
        found_version = values.get("format_version", FORMAT_VERSION)
        if found_version != FORMAT_VERSION:
            raise UserError(
                f"The bundle has format {found_version}, this program reads format {FORMAT_VERSION}. Update NMSWSegment or export the bundle again."
            )
        values = dict(values)
        if "licence" in values:  # as the key was spelled at first
            values.setdefault("license", values.pop("licence"))
        reject_unknown_keys(cls, values, where="the bundle manifest")
        check_manifest(values)
        values["labels"] = tuple(_label_from_dict(label) for label in values["labels"])
        for key in ("spacing_mm", "patch_size", "coarse_factor", "class_weights"):
            values[key] = tuple(values[key])
        values["intensity_points"] = tuple((float(x), float(y)) for x, y in values["intensity_points"])
        values["attributions"] = tuple(values.get("attributions", ()))
        return cls(**values)


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
        return self.folder / NET_NAMES[0]

    @property
    def local_path(self) -> Path:
        """TorchScript archive of the local net."""
        return self.folder / NET_NAMES[1]


def user_bundles_folder() -> Path:
    """Where user-installed bundles lie; it need not exist."""
    chosen = os.environ.get(USER_FOLDER_VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    if sys.platform == "win32":
        data_folder = os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        data_folder = _home() / "Library" / "Application Support"
    else:
        data_folder = os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share"
    return Path(data_folder) / "NMSWSegment" / "Bundles"


def _home() -> Path:
    """The home folder; the root where a person has none, for example a number without a name in a container."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.sep)


def list_bundles(*folders: Path) -> list[str]:
    """Names of the bundles in some folders, sorted; without a folder all that are installed, the packaged and the user-installed ones."""
    folders = folders or (BUNDLES_FOLDER, user_bundles_folder())
    names = {path.parent.name for folder in folders for path in Path(folder).glob(f"*/{MANIFEST_NAME}")}
    return sorted(name for name in names if not name.startswith("."))  # a dot: half installed or half removed


def load_bundle(name_or_folder: str | Path) -> Bundle:
    """Find a bundle by name or folder, read its manifest and check the hashes of its files.

    A name means the packaged bundle, else the user-installed one, else a folder.

    Raises:
        UserError: there is no such bundle, or a file is missing or was changed.
    """
    folder = Path(name_or_folder)
    with _as_user_error(f"Bundle '{name_or_folder}' could not be found"):
        if _is_plain_name(str(name_or_folder)):
            installed = [parent / name_or_folder for parent in (BUNDLES_FOLDER, user_bundles_folder())]
            folder = next((path for path in installed if (path / MANIFEST_NAME).is_file()), folder)
        if not folder.is_dir():
            raise UserError(unknown_name("bundle", str(name_or_folder), list_bundles()) + " A folder that 'nmsw export' wrote works too.")
    return _checked_bundle(folder.resolve())


def install_bundle(source_folder: str | Path, *, folder: Path | None = None, replace: bool = False) -> Bundle:
    """Copy a bundle under its own name into the user's folder, all of it or nothing.

    A bundle holds TorchScript, that is, code that runs with the user's rights: only bundles from a trusted source may be installed.

    Args:
        source_folder: what 'nmsw export' wrote; files beside those of the manifest come along, links to files as the files themselves.
        folder: None is user_bundles_folder().
        replace: let it take the place of an own bundle of the same name.

    Returns:
        The installed bundle, checked again after the copy.

    Raises:
        UserError: the source is no complete bundle, its name is taken or is no file name, or the folder cannot be written.
    """
    folder = user_bundles_folder() if folder is None else Path(folder)
    check_name(Path(source_folder))
    source = Path(source_folder).resolve()
    if not source.is_dir():
        raise UserError(f"There is no folder '{source_folder}'. Give the folder that 'nmsw export' wrote.")
    name = _checked_bundle(source).manifest.name
    _check_name(name, folder=folder, replace=replace)
    files = _files_inside(source)
    copy = folder / f".{name}.installing"
    with _as_user_error(f"Bundle '{name}' could not be installed in '{folder}'"):
        try:
            shutil.rmtree(copy, ignore_errors=True)  # of an installation that crashed
            for file in files:
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, copy / file)  # without its mode, so that a read-only file can be removed again
            _checked_bundle(copy)
            _put_in_place(copy, folder / name)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    return _checked_bundle((folder / name).resolve())


def remove_bundle(name: str, *, folder: Path | None = None) -> None:
    """Delete a user-installed bundle; a packaged one stays.

    Args:
        folder: None is user_bundles_folder().

    Raises:
        UserError: there is no such bundle among the user-installed ones, or its files cannot be deleted.
    """
    folder = user_bundles_folder() if folder is None else Path(folder)
    is_own = folder.resolve() != BUNDLES_FOLDER.resolve() and name in list_bundles(folder)
    if not is_own and name in list_bundles(BUNDLES_FOLDER):
        raise UserError(f"Bundle '{name}' comes with the program and stays. Only bundles that you installed yourself can be removed.")
    if not is_own:
        raise UserError(unknown_name("bundle of your own", name, list_bundles(folder)))
    with _as_user_error(f"Bundle '{name}' could not be removed from '{folder}'"):
        hidden = _hidden_name(folder / name)
        replace_path(folder / name, hidden)
        _delete(hidden)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked_bundle(folder: Path) -> Bundle:
    """Read the manifest of a folder and compare every listed hash with the file on disk."""
    with _as_user_error(f"The bundle in '{folder}' could not be read"):
        if not (folder / MANIFEST_NAME).is_file():
            raise UserError(f"The folder '{folder}' is not a bundle: it has no {MANIFEST_NAME}. Give the folder that 'nmsw export' wrote.")
        manifest_bytes = (folder / MANIFEST_NAME).read_bytes()
        try:
            values = json.loads(manifest_bytes)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{folder / MANIFEST_NAME}' is not JSON ({error}). Install the bundle again.") from error
        if not isinstance(values, dict):
            raise UserError(f"'{folder / MANIFEST_NAME}' is not the manifest of a bundle. Install the bundle again.")
        manifest = BundleManifest.from_dict(values)
        _check_files(folder, manifest)
    return Bundle(folder=folder, manifest=manifest, sha256=hashlib.sha256(manifest_bytes).hexdigest())


def _check_files(folder: Path, manifest: BundleManifest) -> None:
    """Raise UserError unless both nets are listed and every listed file is there, unchanged and inside the folder."""
    for name in (*NET_NAMES, *manifest.sha256):
        if name not in manifest.sha256 or not _is_plain_name(name):
            raise UserError(f"The manifest of bundle '{manifest.name}' does not say which '{name}' belongs to it. Export the bundle again.")
        if not (folder / name).is_file():
            raise UserError(f"Bundle '{manifest.name}' lacks the file '{name}'. Install the bundle again.")
        expected, found = manifest.sha256[name], file_sha256(folder / name)
        if found != expected:
            raise UserError(
                f"File '{name}' of bundle '{manifest.name}' was changed: its SHA-256 is {found[:12]}..., the manifest says {expected[:12]}.... "
                "Install the bundle again, or export it again if you changed it on purpose."
            )


def _check_name(name: str, *, folder: Path, replace: bool) -> None:
    """Raise UserError unless a bundle of this name may be put into the folder."""
    if not _is_plain_name(name):
        raise UserError(
            f"The bundle is named {name!r}, which is no file name on every computer. Export it to a folder named with letters, digits, '-' and '_'."
        )
    # Without case, because Windows and macOS see one name where Linux sees two.
    if name.casefold() in map(str.casefold, list_bundles(BUNDLES_FOLDER)):
        raise UserError(f"A bundle named '{name}' comes with the program. Export yours under another name, and install that.")
    taken = [path.name for path in folder.glob("*") if path.name.casefold() == name.casefold()]
    if taken and not (replace and taken == [name] and name in list_bundles(folder)):
        raise UserError(
            f"A bundle named '{taken[0]}' is installed already in '{folder}'. Remove it first ('nmsw remove {taken[0]}'), replace it ('nmsw install --replace'), or export yours under another name."
        )


def _is_plain_name(name: str) -> bool:
    """Whether a text is one visible file name on Linux, macOS and Windows alike, and leads to no other folder."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or name[0] in ". " or name[-1] in ". ":
        return False
    # Windows takes "nul.txt" for the device, too.
    return name.isprintable() and not _WINDOWS_CHARACTERS & set(name) and name.partition(".")[0].rstrip().lower() not in _WINDOWS_DEVICES


def _files_inside(folder: Path) -> list[Path]:
    """All files of a bundle folder, relative to it.

    Raises:
        UserError: something is no file, or is a link that leads out of the folder.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file() or not path.resolve().is_relative_to(folder):
            raise UserError(f"'{path}' is no file of the bundle, but for example a link that leads out of it. Put the file itself there, or remove the link.")
        files.append(path.relative_to(folder))
    return files


def _put_in_place(copy: Path, target: Path) -> None:
    """Rename a complete copy to its final name; a bundle that was there returns if that fails."""
    hidden = _hidden_name(target)
    replace_folder(copy, target, aside=hidden)
    with suppress(OSError):  # the new one is in place; what is left of the old one is hidden, and goes with the next installation
        _delete(hidden)


def _hidden_name(path: Path) -> Path:
    """A free name that is not listed, to which a bundle is renamed in one step, so that no half of it is ever found."""
    hidden = path.parent / f".{path.name}.removed"
    shutil.rmtree(hidden, ignore_errors=True)  # of a removal that crashed
    return hidden


def _delete(path: Path) -> None:
    """Delete a bundle's folder; of a link only the link, because what it leads to is not ours."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Turn what the file system refuses into a sentence with the way out."""
    try:
        yield
    except OSError as error:
        advice = "Check that the disk is not full, that you may use the folder, and that no other program has its files open."
        raise UserError(f"{what} ({error.strerror or error}). {advice}") from error


def _label_from_dict(values: dict) -> Label:
    """A Label from its JSON object."""
    reject_unknown_keys(Label, values, where="a label of the bundle manifest")
    codes = {}
    for key in ("category", "type", "modifier"):
        if values.get(key) is not None:
            reject_unknown_keys(Code, values[key], where="a code of the bundle manifest")
        codes[key] = Code(**values[key]) if values.get(key) is not None else None
    return Label(value=values["value"], name=values["name"], color=tuple(values["color"]), **codes)
