"""One case of a cohort: segmented, measured, drawn, and put in place as one folder, complete or not there at all.

Whatever goes wrong with the case becomes its outcome; nothing but the end of the process stops the others.
"""

import json
import os
import shutil
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from NMSWSegment.cohort.cases import FAILED_NAME, STATISTICS_NAME, Case
from NMSWSegment.cohort.outcome import (
    DONE,
    INPUT_FACTS,
    OUTCOME_NAME,
    CaseOutcome,
    case_folder,
    case_outcome,
    failed_outcome,
    failure_path,
    holds_outcome,
    input_facts,
    tells_failure,
)
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.output_file import check_name, replace_folder, use_utf8_names
from NMSWSegment.protocol import SegmentOptions, UserError

PARTIAL_PREFIX = ".partial-"


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


def run_case(case: Case, settings: CohortSettings, *, device: str, threads: int) -> CaseOutcome:
    """Segment a case and put its folder in place.

    Args:
        device: where the networks run; takes the place of the device of the settings.
        threads: CPU threads.
    """
    use_utf8_names()  # a worker comes here without the program's own start
    started = time.perf_counter()
    options = replace(settings.options, device=device, threads=threads)
    target = case_folder(settings.output, case)
    partial = target.parent / f"{PARTIAL_PREFIX}{case.name}-{os.getpid()}"
    try:
        check_name(case.input)
        _check_replaceable(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        outcome = _run(case, settings, options=options, folder=partial, started=started)
        _put_in_place(partial, target)
        _remove_failure(settings.output, case)
        return outcome
    except UserError as error:
        return _failed(case, settings, str(error), started=started)
    except OSError as error:
        return _failed(case, settings, f"A file could not be written or read ({error}).", started=started, details=traceback.format_exc())
    except MemoryError:
        return _failed(case, settings, "This computer ran out of memory. Crop the volume, or use fewer workers.", started=started)
    except Exception as error:  # one of the process boundaries: the other cases go on
        message = f"This is a bug ({type(error).__name__}: {error}). The details are in {FAILED_NAME}/{case.name}.txt."
        return _failed(case, settings, message, started=started, details=traceback.format_exc())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(case: Case, settings: CohortSettings, *, options: SegmentOptions, folder: Path, started: float) -> CaseOutcome:
    """Fill the folder of a case."""
    from NMSWSegment.cohort.quality import WARNING, quality_checks
    from NMSWSegment.engine.segmentation import segment_with_options
    from NMSWSegment.files.dicom_segmentation import DICOM_SEG_ENDINGS, check_dicom_export
    from NMSWSegment.files.statistics import write_statistics

    facts_of_input = input_facts(case)  # before it is read, so that a change meanwhile is noticed
    bundle = load_bundle(options.bundle)
    if bundle.sha256 != settings.bundle_sha256:
        raise UserError(f"The model '{bundle.manifest.name}' is not the one the cohort was started with. Install the same model on every computer.")
    if settings.ending in DICOM_SEG_ENDINGS:
        check_dicom_export(case.input, series_uid=case.series)
    result = segment_with_options(case.input, bundle, options=options, series=case.series, force_modality=settings.force_modality)
    result.save(folder / f"segmentation{settings.ending}")
    rows = result.statistics()
    write_statistics(rows, folder / STATISTICS_NAME)
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
        INPUT_FACTS: facts_of_input,
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
    _check_replaceable(target)
    old = target.parent / f"{PARTIAL_PREFIX}old-{target.name}-{os.getpid()}"
    replace_folder(partial, target, aside=old)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Raise UserError if there is something else where the folder of a case is to be."""
    if os.path.lexists(target) and not holds_outcome(target):
        raise UserError(f"'{target}' is there already and holds no results of this cohort. Move it elsewhere, or choose another output folder.")


def _remove_failure(output: Path, case: Case) -> None:
    """Remove what an earlier run said about a failure."""
    path = failure_path(output, case)
    if tells_failure(path):
        with suppress(OSError):
            path.unlink()


def _failed(case: Case, settings: CohortSettings, message: str, *, started: float, details: str = "") -> CaseOutcome:
    """The outcome of a case that failed; the details go into a file."""
    if details:
        path = failure_path(settings.output, case)
        with suppress(OSError):  # the outcome itself matters more
            path.parent.mkdir(exist_ok=True)
            if tells_failure(path) or not os.path.lexists(path):
                path.write_text(details, encoding="utf-8", errors="backslashreplace")
    return failed_outcome(case, message, seconds=time.perf_counter() - started)
