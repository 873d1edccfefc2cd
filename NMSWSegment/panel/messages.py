"""What the panel says, in the language of the application: values in, sentences out."""

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.panel.application import _
from NMSWSegment.panel.checks import CheckKind, InputCheck, RunEstimate


def progress_message(event: dict) -> str:
    """What a run is doing, from its event "progress"."""
    if event["stage"] == "patches" and event["done"]:
        return _("Patch {done} of {total}").format(done=event["done"], total=event["total"])
    texts = {
        "start": _("Starting..."),
        "load": _("Loading the model..."),
        "canonical": _("Resampling the volume to the spacing of the model..."),
        "coarse": _("Running the coarse network..."),
        "preview": _("Displaying the coarse result..."),
        "patches": _("Selecting patches..."),
        "restore": _("Resampling the segments to the input volume..."),
        "done": _("Displaying the result..."),
    }
    return texts.get(event["stage"], event["message"])


def done_message(run_info: dict, *, device: str, seconds: float) -> str:
    """How a run ended, from the run_info of the engine; the device by its display name."""
    text = _("Done in {seconds:.1f} s: {patches} of {candidates} patches on {device}.").format(
        seconds=seconds, patches=len(run_info["patches"]), candidates=run_info["candidates"], device=device
    )
    if run_info.get("patches_reused"):
        text += " " + _("{count} of them were reused from the previous run.").format(count=run_info["patches_reused"])
    if run_info["zero_padding_share"]:
        text += " " + _("{share:.0%} of the volume is filled with 0 at its borders, which was taken for air.").format(share=run_info["zero_padding_share"])
    if run_info["device_steps"]:
        text += " " + _("Note: {steps}.").format(steps="; ".join(run_info["device_steps"]))
    return text


def estimate_message(estimate: RunEstimate, *, seconds: float | None) -> str:
    """The line under the slider."""
    if estimate.patches is None:
        text = _("Automatic: up to {candidates} patches").format(candidates=estimate.candidates)
    elif estimate.patches == 0:
        text = _("No patches: coarse result only")
    else:
        text = _("{patches} of {candidates} patches, {share:.0f}% of the work of a full sliding window").format(
            patches=estimate.patches, candidates=estimate.candidates, share=100 * estimate.share
        )
    if seconds is not None:
        text += ", " + (_("about {seconds:.0f} s").format(seconds=seconds) if seconds >= 1 else _("less than a second"))
    return text + ", " + _("{memory:.1f} GB of memory").format(memory=estimate.memory_bytes / 1e9) + "."


def check_message(check: InputCheck) -> str:
    """What stops a run, or what to know before it, and the way out."""
    texts = {
        CheckKind.NO_VOLUME: _("Choose an input volume, or click 'Load sample CT'."),
        CheckKind.NOT_A_VOLUME: _("The input is a labelmap, not an image. Choose the CT volume that it was created from."),
        CheckKind.IMPORTANCE_MAP: _("The input is the importance map of an earlier run, not an image. Choose the CT volume that it belongs to."),
        CheckKind.EMPTY_VOLUME: _("The input volume is empty. Load the image file again or choose another volume."),
        CheckKind.COLOR_VOLUME: _(
            "The input volume is a color image with {components} components. Extract a single component with the Vector to Scalar Volume module."
        ),
        CheckKind.ONE_SLICE: _("The input volume has a single slice. Choose a volume with several slices."),
        CheckKind.NONLINEAR_TRANSFORM: _(
            "The input volume is under a non-linear transform. Harden the transform in the Transforms module or remove the volume from it."
        ),
        CheckKind.BROKEN_GEOMETRY: _(
            "The geometry of the input volume is invalid: its axes lie in one plane or contain invalid numbers. Correct it in the Volumes module."
        ),
        CheckKind.UNIFORM_VOLUME: _("All voxels of the input volume have the value {intensity:g}, so there is nothing to segment. Choose another volume."),
        CheckKind.NO_MODEL: _("No model is installed. Reinstall the extension or add a model in the Advanced section."),
        CheckKind.VOLUME_TOO_LARGE: "{message}",
        CheckKind.ROI_EMPTY: _("The region of interest is empty. Place it with two clicks in the slice views or choose 'Whole volume'."),
        CheckKind.ROI_OUTSIDE: _("The region of interest is outside the volume. Move it onto the volume or choose 'Whole volume'."),
        CheckKind.MEMORY_SHORT: _(
            "There may not be enough memory: the run may need {needed_gb:.1f} GB, and {available_gb:.1f} GB are available. Close other programs or crop the volume with the Crop Volume module."
        ),
        CheckKind.UNLIKE_CT: _(
            "The lowest intensity is {lowest:g}, so this does not appear to be a CT volume in Hounsfield units, which the model was trained on. Review the result carefully."
        ),
        CheckKind.UNLIKE_MR: _(
            "The lowest intensity is {lowest:g}, so this appears to be a CT volume, but the model was trained on MR. Review the result carefully."
        ),
    }
    gigabytes = {name.replace("_bytes", "_gb"): value / 1e9 for name, value in check.values.items() if name.endswith("_bytes")}
    return texts[check.kind].format(**check.values, **gigabytes)


def died_message(reason: str) -> str:
    """The worker is gone in the middle of a run."""
    return _(
        "The segmentation process ended unexpectedly ({reason}). The previous result is kept.\n\nThe most common cause is insufficient memory: close other programs or crop the "
        "volume with the Crop Volume module. Click Segment to try again; if the problem persists, please report it with the details."
    ).format(reason=reason)


def model_summary(manifest: BundleManifest) -> str:
    """One line about a model; its scores are those of the most patches, so that models can be compared."""
    scores = [list(by_k.values())[-1]["mean"] for by_k in manifest.scores.values()]
    text = _("{count} structures, {modality}, {spacing} mm, {backbone} backbone.").format(
        count=len(manifest.labels),
        modality=manifest.modality,
        spacing=" x ".join(f"{length:g}" for length in sorted(set(manifest.spacing_mm))),
        backbone=manifest.backbone,
    )
    if len(scores) == 1:
        text += " " + _("Mean Dice on one held-out volume: {mean:.2f}.").format(mean=scores[0])
    elif scores:
        text += " " + _("Mean Dice on {count} held-out volumes: {low:.2f} to {high:.2f}.").format(count=len(scores), low=min(scores), high=max(scores))
    return text + " " + _("Research model, not for clinical use.")


def model_tooltip(manifest: BundleManifest, *, seconds: float | None = None) -> str:
    """All that helps to choose a model, as rich text."""
    rows = [f"<b>{manifest.title}</b>", manifest.description, _("Structures: {names}.").format(names=", ".join(label.title for label in manifest.labels))]
    if manifest.training.get("trained_on"):
        rows.append(_("Trained on: {data}").format(data=manifest.training["trained_on"].split("\n\n")[0]))  # what follows is for the model card
    for case, by_k in manifest.scores.items():
        means = ", ".join(_("{mean:.2f} at k = {k}").format(mean=row["mean"], k=k) for k, row in by_k.items())
        rows.append(_("Mean Dice on the held-out volume {case}: {means}.").format(case=case, means=means))
    if seconds is not None:
        rows.append(_("About {seconds:.0f} s for the chosen volume on this computer.").format(seconds=seconds))
    rows.append(_("License: {license}").format(license=manifest.license))
    return "<p>" + "</p><p>".join(rows) + "</p>"


def structures_title(*, chosen: int, total: int) -> str:
    """The title of the list of structures."""
    if chosen == total:
        return _("Structures: all {total}").format(total=total)
    return _("Structures: {chosen} of {total}").format(chosen=chosen, total=total)


def no_structure_message() -> str:
    """Nothing is left to segment."""
    return _("No structure is selected. Select at least one.")


def batch_question(names: list[str]) -> str:
    """Before many volumes are segmented."""
    return _(
        "Segment {count} volumes one after the other, with the settings of the panel?\n\n{names}\n\nEach gets a new segmentation that is named after it."
    ).format(count=len(names), names="\n".join(names))


def batch_progress_message(number: int, total: int, name: str, text: str) -> str:
    """What a run is doing, of many."""
    return _("{number} of {total}, {name}: {text}").format(number=number, total=total, name=name, text=text)


def batch_done_message(num_done: int, total: int, *, is_cancelled: bool) -> str:
    """How many volumes were segmented."""
    text = _("{done} of {total} volumes were segmented.").format(done=num_done, total=total)
    return _("Cancelled.") + " " + text if is_cancelled else text


def batch_failures_message(num_done: int, total: int, failures: list[tuple[str, str]]) -> str:
    """Volumes without a result, and why."""
    lines = [f"{name}: {reason}" for name, reason in failures]
    return "\n\n".join([_("{done} of {total} volumes were segmented. Not segmented:").format(done=num_done, total=total), *lines])


def torch_missing_message() -> str:
    """The way to torch, with and without internet."""
    return (
        _(
            "PyTorch, which runs the models, is not installed, and neither is the PyTorch extension that installs it.\n\n"
            "Online: install the PyTorch extension in the Extensions Manager, restart the application, and click Segment again.\n\n"
        )
        + _offline_message()
    )


def torch_not_installed_message() -> str:
    """After an installation of torch that failed or was declined."""
    return (
        _(
            "PyTorch, which runs the models, was not installed.\n\n"
            "Online: check the internet connection and the proxy settings (environment variable HTTPS_PROXY), and click Segment to try again.\n\n"
        )
        + _offline_message()
    )


def highdicom_question() -> str:
    """Before highdicom is installed."""
    return _(
        "Writing DICOM SEG needs the Python package highdicom, which is not installed. Download and install it now?\n\n"
        "It needs pydicom 3 and installs it in place of an older version that came with the application; the application has to be restarted then."
    )


def openvino_question() -> str:
    """Before OpenVINO is installed."""
    return _(
        "The Python package OpenVINO can run the local network faster than PyTorch where there is no GPU. It is not installed. Download and install it now?"
    )


def restart_message(name: str) -> str:
    """After an installation that a running application cannot take up."""
    return _("{name} is installed. Restart the application to use it.").format(name=name)


def package_not_installed_message(name: str, requirement: str) -> str:
    """After an installation that failed or was declined."""
    return _(
        "The Python package {name} was not installed, so nothing was changed.\n\n"
        "Online: check the internet connection and the proxy settings (environment variable HTTPS_PROXY), and click again to retry.\n\n"
        "Offline: download it on another computer ('pip download {name}'), copy the folder to this computer, and run in the Python console:\n"
        "slicer.util.pip_install('--no-index --find-links FOLDER {requirement}')"
    ).format(name=name, requirement=requirement)


def not_from_dicom_message(volume: str) -> str:
    """Why there can be no DICOM SEG of a result."""
    return _(
        "The volume '{volume}' was not loaded from DICOM, so there are no DICOM images that a DICOM SEG could refer to. Load the series with the DICOM module "
        "and segment it, or save the segmentation as .seg.nrrd."
    ).format(volume=volume)


def exported_question(path: str) -> str:
    """After a DICOM SEG was written."""
    return _("The segmentation was written to {path}.\n\nAdd a copy to the DICOM database of the application too?").format(path=path)


def _offline_message() -> str:
    """The way to torch without internet."""
    return _(
        "Offline: on another computer with the same operating system, download PyTorch and its dependencies for Python {python} into a folder "
        "('pip download torch'), copy the folder to this computer, and run in the Python console:\n"
        "slicer.util.pip_install('--no-index --find-links FOLDER torch')"
    )
