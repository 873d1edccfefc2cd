"""What the panel says, in the language of the application: values in, sentences out."""

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.panel.application import _
from NMSWSegment.panel.checks import CheckKind, InputCheck, RunEstimate


def progress_message(event: dict) -> str:
    """What a run is doing, from its event "progress"."""
    if event["stage"] == "patches" and event["total"]:
        return _("Patch {done} of {total}").format(done=event["done"], total=event["total"])
    texts = {
        "start": _("Starting..."),
        "load": _("Loading the model..."),
        "canonical": _("Bringing the volume to the spacing of the model..."),
        "coarse": _("Looking at the whole volume..."),
        "preview": _("Showing the coarse result..."),
        "patches": _("Choosing patches..."),
        "restore": _("Bringing the segments to the volume..."),
        "done": _("Showing the result..."),
    }
    return texts.get(event["stage"], event["message"])


def done_message(run_info: dict, *, device: str, seconds: float) -> str:
    """How a run ended, from the run_info of the engine; the device by its display name."""
    text = _("Done in {seconds:.1f} s: {patches} of {candidates} patches on {device}.").format(
        seconds=seconds, patches=len(run_info["patches"]), candidates=run_info["candidates"], device=device
    )
    if run_info.get("patches_reused"):
        text += " " + _("{count} of them were known from before.").format(count=run_info["patches_reused"])
    if run_info["device_steps"]:
        text += " " + _("Note: {steps}.").format(steps="; ".join(run_info["device_steps"]))
    return text


def estimate_message(estimate: RunEstimate, *, seconds: float | None) -> str:
    """The line under the slider."""
    if estimate.patches is None:
        text = _("As many of {candidates} patches as pay").format(candidates=estimate.candidates)
    elif estimate.patches == 0:
        text = _("No patch: the coarse result alone")
    else:
        text = _("{patches} of {candidates} patches, {share:.0f} % of the work of a sliding window").format(
            patches=estimate.patches, candidates=estimate.candidates, share=100 * estimate.share
        )
    if seconds is not None:
        text += ", " + (_("about {seconds:.0f} s").format(seconds=seconds) if seconds >= 1 else _("less than a second"))
    return text + ", " + _("{memory:.1f} GB of memory").format(memory=estimate.memory_bytes / 1e9) + "."


def check_message(check: InputCheck) -> str:
    """What stops a run, or what to know before it, and the way out."""
    texts = {
        CheckKind.NO_VOLUME: _("Choose an input volume, or click 'Load sample CT'."),
        CheckKind.NOT_A_VOLUME: _("The input holds labels, not intensities. Choose the CT volume that it was made from."),
        CheckKind.EMPTY_VOLUME: _("The input volume has no voxels. Load its image file again, or choose another volume."),
        CheckKind.COLOR_VOLUME: _("The input volume has {components} components (color), but one is needed. Extract one with Vector to Scalar Volume."),
        CheckKind.ONE_SLICE: _("The input volume is one voxel thick. Choose a volume of several slices."),
        CheckKind.NONLINEAR_TRANSFORM: _("The input volume is under a non-linear transform. Harden it in the Transforms module, or take the volume out of it."),
        CheckKind.BROKEN_GEOMETRY: _(
            "The place of the input volume in space is broken: its axes lie in one plane or are no numbers. Correct it in the Volumes module."
        ),
        CheckKind.UNIFORM_VOLUME: _("All voxels of the input volume are {intensity:g}: there is nothing to segment. Choose another volume."),
        CheckKind.NO_MODEL: _("No model is installed. Install the extension again, or add a model under Advanced."),
        CheckKind.VOLUME_TOO_LARGE: "{message}",
        CheckKind.ROI_EMPTY: _("The region of interest is empty. Place it with two clicks in the slice views, or choose 'Whole volume'."),
        CheckKind.ROI_OUTSIDE: _("The region of interest lies outside the volume. Drag it onto the volume, or choose 'Whole volume'."),
        CheckKind.MEMORY_SHORT: _(
            "The run may need {needed_gb:.1f} GB of memory, but {available_gb:.1f} GB are free. Close other programs, or crop the volume (module Crop Volume) first."
        ),
        CheckKind.UNLIKE_CT: _(
            "The lowest voxel is {lowest:g}, so this hardly is a CT volume in Hounsfield units, which the model was trained on. Check the result with care."
        ),
    }
    gigabytes = {name.replace("_bytes", "_gb"): value / 1e9 for name, value in check.values.items() if name.endswith("_bytes")}
    return texts[check.kind].format(**check.values, **gigabytes)


def died_message(reason: str) -> str:
    """The worker is gone in the middle of a run."""
    return _(
        "The segmentation stopped because its process ended ({reason}). Nothing was changed.\n\nOften the memory was not enough: close other programs, or crop the volume "
        "(module Crop Volume). Click Segment to try again; if it happens again, please report it with the details."
    ).format(reason=reason)


def model_summary(manifest: BundleManifest) -> str:
    """One line about a model; its scores are those of the most patches, so that models can be compared."""
    scores = [list(by_k.values())[-1]["mean"] for by_k in manifest.scores.values()]
    text = _("{count} structures on {modality}, {spacing} mm, backbone {backbone}.").format(
        count=len(manifest.labels),
        modality=manifest.modality,
        spacing=" x ".join(f"{length:g}" for length in sorted(set(manifest.spacing_mm))),
        backbone=manifest.backbone,
    )
    if scores:
        text += " " + _("Mean Dice on volumes it never saw: {low:.2f} to {high:.2f}.").format(low=min(scores), high=max(scores))
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


def torch_missing_message() -> str:
    """The way to torch, with and without internet."""
    return _(
        "PyTorch, which runs the models, is not installed, and the extension 'PyTorch' that installs it is not there either.\n\n"
        "With internet: install 'PyTorch' in the Extensions Manager, restart the application and click Segment again.\n\n"
        "Without internet: on another computer with the same operating system, download torch with its dependencies for this Python ({python}) into a folder "
        "('pip download torch'), bring the folder here, and run in the Python console:\n"
        "slicer.util.pip_install('--no-index --find-links FOLDER torch')"
    )
