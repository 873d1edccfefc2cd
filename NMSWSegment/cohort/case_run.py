"""One case of a cohort: segmented, measured, drawn, and put in place as one folder, complete or not there at all.

Whatever goes wrong with the case becomes its outcome; nothing but the end of the process stops the others.
"""

import json
import os
import shutil
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from NMSWSegment.cohort.cases import Case
from NMSWSegment.cohort.outcome import DONE, OUTCOME_NAME, CaseOutcome, case_outcome, failed_outcome
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.protocol import SegmentOptions, UserError

PARTIAL_PREFIX = ".partial-"
_CASES, _FAILED = "cases", "failed"


@dataclass(frozen=True)
class CohortSettings:
    """What all cases of a cohort have in common."""

    output: Path
    options: SegmentOptions
    bundle_sha256: str
    ending: str
    """Of the segmentation: .seg.nrrd, .nii.gz, .nii or .dcm."""
    with_pictures: bool
    """Whether a preview and a quality sheet are made."""
    force_modality: bool = False
    """Whether volumes are segmented that are not what the model was trained on."""


def case_folder(output: Path, case: Case) -> Path:
    """Where the results of a case lie."""
    return output / _CASES / case.name


def finished_outcome(output: Path, case: Case) -> CaseOutcome | None:
    """The outcome of a case that an earlier run has finished for the same input; None if it is still to be done."""
    try:
        outcome = CaseOutcome(**json.loads((case_folder(output, case) / OUTCOME_NAME).read_text(encoding="utf-8"))["outcome"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return outcome if (outcome.input, outcome.series) == (str(case.input), case.series or "") else None


def run_case(case: Case, settings: CohortSettings, *, device: str, threads: int) -> CaseOutcome:
    """Segment a case and put its folder in place.

    Args:
        device: where the networks run; takes the place of the device of the settings.
        threads: CPU threads.
    """
    started = time.perf_counter()
    options = replace(settings.options, device=device, threads=threads)
    target = case_folder(settings.output, case)
    partial = target.parent / f"{PARTIAL_PREFIX}{case.name}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        outcome = _run(case, settings, options=options, folder=partial, started=started)
        _put_in_place(partial, target)
        _failure_path(settings.output, case).unlink(missing_ok=True)
        return outcome
    except UserError as error:
        return _failed(case, settings, str(error), started=started)
    except OSError as error:
        return _failed(case, settings, f"A file could not be written or read ({error}).", started=started, details=traceback.format_exc())
    except MemoryError:
        return _failed(case, settings, "This computer ran out of memory. Crop the volume, or use fewer workers.", started=started)
    except Exception as error:  # one of the process boundaries: the other cases go on
        message = f"This is a bug ({type(error).__name__}: {error}). The details are in {_FAILED}/{case.name}.txt."
        return _failed(case, settings, message, started=started, details=traceback.format_exc())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(case: Case, settings: CohortSettings, *, options: SegmentOptions, folder: Path, started: float) -> CaseOutcome:
    """Fill the folder of a case."""
    from NMSWSegment.cohort.quality import WARNING, quality_checks
    from NMSWSegment.engine.segmentation import segment_with_options
    from NMSWSegment.files.dicom_segmentation import DICOM_SEG_ENDINGS, check_dicom_export
    from NMSWSegment.files.statistics import write_statistics

    bundle = load_bundle(options.bundle)
    if bundle.sha256 != settings.bundle_sha256:
        raise UserError(f"The model '{bundle.manifest.name}' is not the one the cohort was started with. Install the same model on every computer.")
    if settings.ending in DICOM_SEG_ENDINGS:
        check_dicom_export(case.input)
    result = segment_with_options(case.input, bundle, options=options, series=case.series, force_modality=settings.force_modality)
    result.save(folder / f"segmentation{settings.ending}")
    rows = result.statistics()
    write_statistics(rows, folder / "statistics.csv")
    checks = quality_checks(result.volume, rows, labels=result.labels, modality=bundle.manifest.modality, spacing_mm=bundle.manifest.spacing_mm)
    (folder / "report.json").write_text(json.dumps(result.run_info, indent=1) + "\n", encoding="utf-8")
    outcome = case_outcome(
        case,
        status=DONE,
        seconds=time.perf_counter() - started,
        warnings=sum(check.severity == WARNING for check in checks),
        patches=len(result.patches),
        device=result.run_info["device"],
    )
    facts = {
        "outcome": outcome.to_dict(),
        "volume": result.run_info["volume"],
        "checks": [asdict(check) for check in checks],
        "statistics": [row.to_dict() for row in rows],
        "colors": {label.name: list(label.color) for label in result.labels},
        "titles": {label.name: label.title for label in result.labels},
        "model": bundle.manifest.name,
        "k": "all" if options.num_patches is None else str(options.num_patches),
    }
    if settings.with_pictures:
        from NMSWSegment.cohort.quality_page import write_sheet, write_thumbnail
        from NMSWSegment.files.outputs import write_preview

        write_preview(result.volume, result.labelmap, labels=result.labels, patches=result.patches, path=folder / "preview.png")
        write_thumbnail(folder / "preview.png", folder / "thumbnail.jpg")
        write_sheet(facts, folder=folder)
    (folder / OUTCOME_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return outcome


def _put_in_place(partial: Path, target: Path) -> None:
    """Let a complete folder take the place of an older one."""
    if target.exists():
        old = target.parent / f"{PARTIAL_PREFIX}old-{target.name}-{os.getpid()}"
        os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, target)


def _failed(case: Case, settings: CohortSettings, message: str, *, started: float, details: str = "") -> CaseOutcome:
    """The outcome of a case that failed; the details go into a file."""
    if details:
        path = _failure_path(settings.output, case)
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(details, encoding="utf-8")
        except OSError:  # the outcome itself matters more
            pass
    return failed_outcome(case, message, seconds=time.perf_counter() - started)


def _failure_path(output: Path, case: Case) -> Path:
    """The file with the details of a failure."""
    return output / _FAILED / f"{case.name}.txt"
