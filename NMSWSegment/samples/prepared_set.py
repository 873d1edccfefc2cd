"""Prepared data: everything that training reads of cases and anatomies, in one folder that can go to another computer.

    FOLDER/dataset.json                      label names, modality
    FOLDER/cases/<name>/                     intensity.npy, labels.npy, case.json        as in the cache of a run
    FOLDER/anatomies/<name>/                 tissue_map.npy, anatomy.json

`nmsw prepare` writes it; `nmsw train --data prepared:FOLDER` reads it, for any model spacing, without the original files.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from NMSWSegment.data.body_extent import BodyExtent
from NMSWSegment.data.case_cache import ENTRY_INFO_NAME, json_tuples, read_entry, write_entry
from NMSWSegment.data.layouts import DATASET_NAME
from NMSWSegment.data.prepared_case import PreparedCase, ijk_to_ras_of
from NMSWSegment.files.output_file import draft_folder, replace_path
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.synthesis import PreparedAnatomy, prepare_anatomy
from NMSWSegment.samples.tissues import Tissue

CASES, ANATOMIES = "cases", "anatomies"
ANATOMY_NAME, MAP_NAME = "anatomy.json", "tissue_map.npy"
LABELS_NAME = "labels.npy"


def prepared_entries(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The folders of the cases and of the anatomies in prepared data, sorted by name.

    Raises:
        UserError: the folder holds no prepared data.
    """
    cases, anatomies = (
        tuple(sorted(path.parent for path in (folder / part).glob(f"*/{name}"))) for part, name in ((CASES, ENTRY_INFO_NAME), (ANATOMIES, ANATOMY_NAME))
    )
    if not cases and not anatomies:
        raise UserError(f"'{folder}' holds no prepared data. Give a folder that 'nmsw prepare --output' wrote, or another kind.")
    return cases, anatomies


def read_prepared_case(entry: Path) -> PreparedCase:
    """A case of prepared data.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_entry(entry)
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise _damaged(entry, error) from error


def prepared_grid(entry: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (KJI) and ijk_to_ras of a case of prepared data; its voxels are not read.

    Raises:
        UserError: it is damaged.
    """
    try:
        info = json.loads((entry / ENTRY_INFO_NAME).read_text(encoding="utf-8"))
        shape = np.load(entry / LABELS_NAME, mmap_mode="r").shape
        return shape, ijk_to_ras_of(info["spacing_mm"], info["direction"])
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise _damaged(entry, error) from error


def read_anatomy(folder: Path, *, num_labels: int | None = None) -> PreparedAnatomy:
    """An anatomy, prepared or as a folder of label_full.nii.gz and tissues.json.

    Raises:
        UserError: it cannot be used.
    """
    if not (folder / ANATOMY_NAME).is_file():
        return prepare_anatomy(folder, num_labels=num_labels)
    try:
        values = json_tuples(json.loads((folder / ANATOMY_NAME).read_text(encoding="utf-8")))
        tissues = tuple(Tissue(**entry) for entry in values["tissues"])
        return PreparedAnatomy(
            name=folder.name, tissue_map=np.load(folder / MAP_NAME), tissues=tissues, spacing_mm=values["spacing_mm"], extent=BodyExtent(**values["extent"])
        )
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise _damaged(folder, error) from error


def write_prepared_set(
    output: Path, *, label_names: Sequence[str], modality: str, cases: Iterable[tuple[str, PreparedCase]], anatomies: Iterable[PreparedAnatomy]
) -> None:
    """Write the folder, one case after the other; it is whole or not there.

    Raises:
        UserError: it exists, two cases or anatomies have one name, or it cannot be written.
    """
    if output.exists():
        raise UserError(f"'{output}' already exists. Remove it, or give another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(output.parent, prefix=".partial-") as place:
            draft = place / output.name
            for part in (CASES, ANATOMIES):
                (draft / part).mkdir(parents=True)
            for case_name, case in cases:
                (draft / CASES / case_name).mkdir()
                write_entry(case, draft / CASES / case_name)
            for anatomy in anatomies:
                _write_anatomy(anatomy, draft / ANATOMIES / anatomy.name)
            labels = {"background": 0} | {label: value for value, label in enumerate(label_names, start=1)}
            (draft / DATASET_NAME).write_text(json.dumps({"modality": {"0": modality}, "labels": labels}, indent=1) + "\n", encoding="utf-8")
            replace_path(draft, output)
    except FileExistsError as error:
        name = Path(error.filename or "").name
        raise UserError(f"Two cases or anatomies are named '{name}'. Prepare their data sets in two folders, and train with --data for each.") from error
    except OSError as error:
        raise UserError(f"The prepared data cannot be written to '{output}' ({error}). Make room on the disk, or give another --output.") from error


def _write_anatomy(anatomy: PreparedAnatomy, folder: Path) -> None:
    """One anatomy."""
    folder.mkdir()
    np.save(folder / MAP_NAME, anatomy.tissue_map)
    values = {"spacing_mm": anatomy.spacing_mm, "extent": asdict(anatomy.extent), "tissues": [asdict(tissue) for tissue in anatomy.tissues]}
    (folder / ANATOMY_NAME).write_text(json.dumps(values), encoding="utf-8")


def _damaged(folder: Path, error: Exception) -> UserError:
    """The sentence for what cannot be read."""
    return UserError(f"The prepared data in '{folder}' is damaged ({error}). Write it again with 'nmsw prepare'.")
