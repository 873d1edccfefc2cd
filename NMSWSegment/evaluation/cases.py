"""Labelled cases to score against, and the scores of one labelmap."""

import argparse
from collections.abc import Sequence

import numpy as np

from NMSWSegment.data.layouts import KINDS, SPLITS, read_cases
from NMSWSegment.data.metrics import dice_per_class, model_steps, surface_scores
from NMSWSegment.data.prepared_case import CaseRequest, check_headers, read_labels
from NMSWSegment.data.totalsegmentator import TOTAL
from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.volume import Volume, read_volume
from NMSWSegment.protocol import UserError
from NMSWSegment.training.label_checks import few

METRICS = ("dsc", "nsd_2mm", "nsd_2voxels", "hd95_mm")


def add_case_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The flags that say which cases, for find_cases."""
    parser.add_argument("--data", required=required, action="append", default=[], metavar="KIND:FOLDER", help=f"labelled cases: {', '.join(KINDS)}; repeat")
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="train", help="of the data; a decathlon folder has labels for train only (default: %(default)s)"
    )
    parser.add_argument("--cases", default="", metavar="ID,...", help="only these cases (default: all labelled ones)")


def find_cases(data: Sequence[str], manifest: BundleManifest, *, wanted: str = "", split: str = "train") -> list[CaseRequest]:
    """The labelled cases of some folders.

    Args:
        data: KIND:FOLDER each; classes are matched by name, and those that only the bundle or only the folder has are not scored.
        wanted: names with commas between them; empty for all.
        split: train, val or test; a decathlon folder has labels for train only.

    Raises:
        UserError: a folder cannot be used, it has no class of the bundle, a wanted case is not there, or two cases share a name.
    """
    cases: list[CaseRequest] = []
    for argument in data:
        known = TOTAL if argument.startswith("totalsegmentator:") else ()
        found = read_cases(argument, subset=",".join(name for name in manifest.label_names if name in known) or ",".join(known[:1]), split=split)
        if not set(found.label_names) & set(manifest.label_names):
            raise UserError(
                f"'{argument}' and bundle '{manifest.name}' have no class in common: {', '.join(known or found.label_names)}; and {', '.join(manifest.label_names)}. "
                "Give the classes of the data the bundle's names."
            )
        cases += [CaseRequest(files=files, label_names=found.label_names, unknown_value=found.unknown_value) for files in found.files]
    names = [case.files.name for case in cases]
    if len(set(names)) < len(names):
        raise UserError(f"Several cases of {', '.join(data)} have the same name. Give the folders one after the other.")
    chosen = [name for name in wanted.split(",") if name]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"No case '{unknown[0]}' in {', '.join(data)}. There are: {', '.join(names)}.")
    return [case for case in cases if not chosen or case.files.name in chosen]


def names_apart(cases: Sequence[CaseRequest], manifest: BundleManifest) -> str:
    """A sentence about the classes that are not scored, because only the bundle or only the data know them; empty where all are."""
    data_names = list(dict.fromkeys(name for case in cases for name in case.label_names))
    parts = [
        f"{', '.join(names)} only in the {where}"
        for names, where in (
            ([name for name in manifest.label_names if name not in data_names], f"bundle '{manifest.name}'"),
            ([name for name in data_names if name not in manifest.label_names], "data"),
        )
        if names
    ]
    return f"Not scored: {'; '.join(parts)}." if parts else ""


def read_case(case: CaseRequest, manifest: BundleManifest) -> tuple[Volume, Volume]:
    """The volume of a case and its reference labels in the values of a bundle; unknown voxels are 255, classes that the bundle does not know 0.

    Raises:
        UserError: a file is missing or damaged, the label does not lie on the volume's grid, or holds a value that is not in the list.
    """
    check_headers(case)
    volume = read_volume(case.files.image)
    table = np.zeros(256, dtype=np.uint8)
    table[UNKNOWN_LABEL] = UNKNOWN_LABEL
    values = {label.name: label.value for label in manifest.labels}
    for value, name in enumerate(case.label_names, start=1):
        table[value] = values.get(name, 0)
    return volume, Volume(array=table[read_labels(case)], ijk_to_ras=volume.ijk_to_ras)


def score_labelmap(labelmap: Volume, reference: Volume, *, manifest: BundleManifest) -> dict:
    """All metrics, JSON-ready.

    Returns:
        {"mean": mean DSC, "mean_nsd_2mm", "mean_nsd_2voxels", "mean_hd95_mm", for every metric {structure: value}, and "volumes_ml" of the reference}. A structure that the
        case does not hold is left out. HD95 of a structure that was missed altogether is None, and is not part of the mean; a mean of
        nothing is None.
    """
    num_classes = manifest.num_classes
    surfaces = surface_scores(
        labelmap.array,
        reference.array,
        num_classes=num_classes,
        spacing_mm=reference.spacing_mm,
        spacing_voxels=model_steps(reference.ijk_to_ras, model_spacing_mm=manifest.spacing_mm),
    )
    dice = dice_per_class(labelmap.array, reference.array, num_classes=num_classes)
    columns = dict(zip(METRICS, (dice, surfaces.nsd_mm, surfaces.nsd_voxels, surfaces.hd95_mm)))
    scores = {"mean" if metric == "dsc" else f"mean_{metric}": _mean(values[1:]) for metric, values in columns.items()}
    for metric, values in columns.items():
        scores[metric] = {label.name: _rounded(values[label.value]) for label in manifest.labels if not np.isnan(values[label.value])}
    voxels = np.bincount(reference.array.ravel(), minlength=256)
    ml = float(np.prod(reference.spacing_mm)) / 1000
    scores["volumes_ml"] = {label.name: round(voxels[label.value] * ml, 2) for label in manifest.labels if voxels[label.value]}
    return scores


def was_held_out(case_name: str, manifest: BundleManifest) -> bool:
    """Whether the manifest says that a case was left out of training."""
    return case_name in manifest.training.get("held_out", manifest.training.get("options", {}).get("hold_out", ()))


def not_held_out(cases: Sequence[CaseRequest], manifest: BundleManifest) -> str:
    """A sentence about the cases that a bundle does not say were left out of its training; empty where it says so of all."""
    seen = [case.files.name for case in cases if not was_held_out(case.files.name, manifest)]
    return f"Not held out: {few(seen)}. The bundle may have been trained on them, so that the scores are too good." if seen else ""


def _mean(values: np.ndarray) -> float | None:
    """Mean of the finite values; None where there is none."""
    finite = values[np.isfinite(values)]
    return round(float(finite.mean()), 4) if len(finite) else None


def _rounded(value: float) -> float | None:
    """Four digits; None for infinity, which JSON does not have."""
    return round(float(value), 4) if np.isfinite(value) else None
