"""The measurements of a comparison: one record a bundle, case and method, written as it comes, so that a stopped run goes on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from NMSWSegment.data.prepared_case import CaseRequest
from NMSWSegment.evaluation.cases import read_case, score_labelmap, was_held_out
from NMSWSegment.evaluation.costs import bundle_costs
from NMSWSegment.evaluation.measurement import in_own_process, json_text, machine_info, measure, today
from NMSWSegment.evaluation.methods import Method
from NMSWSegment.files.bundle import Bundle
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.model_grid import model_grid_around
from NMSWSegment.files.output_file import replaced_file
from NMSWSegment.files.volume import Volume, read_volume
from NMSWSegment.protocol import OnProgress, Progress, UserError

RESULTS_NAME = "results.json"
LABELMAPS_FOLDER = "labelmaps"


@dataclass(frozen=True)
class CompareOptions:
    """What the figures of a comparison depend on."""

    bundles: dict[str, str]
    """Name -> SHA-256."""
    data: tuple[str, ...]
    cases: dict[str, tuple[str, ...]]
    """Bundle -> its cases."""
    methods: tuple[str, ...]
    device: str
    threads: int | None
    held_out: bool
    """Each bundle runs only on cases that its training left out, and all bundles make one table."""


@dataclass(frozen=True)
class CaseOfBundle:
    """One bundle on one case."""

    bundle: Bundle
    source: str
    """Name or folder that the bundle was loaded from."""
    case: CaseRequest


def run_comparison(bundle_cases: Sequence[CaseOfBundle], methods: Sequence[Method], *, options: CompareOptions, folder: Path, on_progress: OnProgress) -> dict:
    """Measure what is missing in the folder's results and return all of them.

    Args:
        on_progress: called with what comes next and the share that is done.

    Returns:
        {"options", "machine", "date", "records"}, as in results.json.

    Raises:
        UserError: the folder holds the results of other options or of another computer, or a method failed in a way a user can fix.
    """
    results = open_results(folder, options=options, device=options.device, threads=options.threads)
    done = {(record["bundle"], record["case"], record["method"]) for record in results["records"]}
    num_steps = len(bundle_cases) * len(methods)
    for number, bundle_case in enumerate(bundle_cases):
        missing = [method for method in methods if (bundle_case.bundle.manifest.name, bundle_case.case.files.name, method.name) not in done]
        if not missing:
            continue
        volume, reference = read_case(bundle_case.case, bundle_case.bundle.manifest)
        for method in missing:
            on_progress(
                Progress(
                    "compare",
                    (number * len(methods) + methods.index(method)) / num_steps,
                    f"{bundle_case.case.files.name}, {bundle_case.bundle.manifest.name}: {method.title}",
                )
            )
            results["records"].append(measured_record(bundle_case, method, volume=volume, reference=reference, options=options, folder=folder))
            write_results(results, folder)
    return results


def measured_record(bundle_case: CaseOfBundle, method: Method, *, volume: Volume, reference: Volume, options: CompareOptions, folder: Path) -> dict:
    """Everything about one method on one case, JSON-ready."""
    manifest = bundle_case.bundle.manifest
    path = labelmap_path(folder, bundle=manifest.name, case=bundle_case.case.files.name, method=method.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = in_own_process(
        measure, method, bundle=bundle_case.source, image=bundle_case.case.files.image, labelmap=path, device=options.device, threads=options.threads
    )
    model_grid = model_grid_around(volume.shape, volume.ijk_to_ras, spacing_mm=manifest.spacing_mm)
    costs = bundle_costs(manifest, CandidateGrid.covering(model_grid.shape, patch_size=manifest.patch_size, overlap=manifest.overlap))
    record = {
        "bundle": manifest.name,
        "case": bundle_case.case.files.name,
        "held_out": was_held_out(bundle_case.case.files.name, manifest),
        "method": method.name,
        "title": method.title,
    }
    record |= {
        "macs": costs.true.total(measured["windows"], uses_coarse=method.uses_coarse or manifest.is_cascade) if costs else None,
        "paper_macs": costs.paper.total(measured["windows"], uses_coarse=method.uses_coarse or manifest.is_cascade) if costs else None,
    }
    return record | measured | {"scores": score_labelmap(read_volume(path), reference, manifest=manifest)}


def open_results(folder: Path, *, options: object, device: str, threads: int | None) -> dict:
    """The results so far, or empty ones.

    Args:
        options: a dataclass; all of it decides whether figures belong together.

    Raises:
        UserError: the file is damaged, or its figures belong to other options or to another computer.
    """
    path = folder / RESULTS_NAME
    now = {"options": json.loads(json.dumps(asdict(options))), "machine": machine_info(device=device, threads=threads)}
    if not path.exists():
        return now | {"date": today(), "records": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        before = {part: results[part] for part in (*now, "records", "date")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no file of 'nmsw compare'. Give another --output, or remove it.") from error
    for part, values in now.items():
        for key, value in values.items():
            if before[part].get(key) != value:
                raise UserError(
                    f"'{folder}' holds a comparison with {key} = {before[part].get(key)}, now it is {value}. Use the same {key} to go on with it, or another --output."
                )
    return before


def labelmap_path(folder: Path, *, bundle: str, case: str, method: str) -> Path:
    """Where the labelmap of a record lies."""
    return folder / LABELMAPS_FOLDER / bundle / case / f"{method}.nii.gz"


def write_results(results: dict, folder: Path) -> None:
    """Write the results file in one step, so that a stop at any time leaves it whole."""
    with replaced_file(folder / RESULTS_NAME) as temporary:
        temporary.write_text(json_text(results), encoding="utf-8")
