"""The model card of a bundle: what it segments, what it learned from, how good it is on data it did not see."""

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.normalization import FIXED, PERCENTILES, ZSCORE

PICTURE_NAME = "overlay.png"
_INTENSITIES = {FIXED: "as they are", PERCENTILES: "between percentiles of the volume", ZSCORE: "z-scores of the volume"}


def model_card(manifest: BundleManifest, *, has_picture: bool = False) -> str:
    """Markdown text made from the manifest, so that the card and the bundle cannot disagree; the picture lies beside it."""
    spacing, patch = (" x ".join(f"{value:g}" for value in triple) for triple in (manifest.spacing_mm, manifest.patch_size))
    training = manifest.training
    lines = [
        f"# {manifest.title}",
        "",
        manifest.description,
        "",
        "**A research model. Not for clinical use.**",
        "",
        f"- Backbone: {manifest.backbone} (coarse net: unet), {manifest.architecture.get('preset', '')} preset",
        *(["- A cascade: the local net reads the coarse answer of its patch beside the image"] if manifest.is_cascade else []),
        *([f"- An ensemble of {manifest.num_runs} runs, whose probabilities are averaged"] if manifest.num_runs > 1 else []),
        f"- Modality: {manifest.modality}; intensities: {_INTENSITIES[manifest.normalization]}; model spacing {spacing} mm (S, A, R); patch {patch} voxels, overlap {manifest.overlap:g}",
        f"- Structures ({len(manifest.labels)}): {', '.join(label.title for label in manifest.labels)}",
        *([f"- Parts of a structure smaller than {100 * manifest.min_island_share:g} % of its largest part are removed"] if manifest.min_island_share else []),
        f"- License of the weights: {manifest.license}",
        "",
        *([f"![What the model finds]({PICTURE_NAME})", ""] if has_picture else []),
        "## Training",
        "",
        training.get("trained_on", ""),
        "",
        *_validation_lines(training),
        f"{training.get('iterations', 0)} iterations with {training.get('program', '')} in the last run; its options stand in `manifest.json`.",
        "",
        "## Held-out scores",
        "",
        *_score_lines(manifest.scores),
        *_auto_lines(manifest),
        "## Learned class weights",
        "",
        "The share a = sigmoid(clamp(c, -1, 10)) of the local logits where patches cover (Eq. 6), by class.",
        "",
        "| class | c |",
        "|---|---|",
        *(f"| {name} | {weight:.2f} |" for name, weight in zip(["background", *manifest.label_names], manifest.class_weights)),
        "",
        "## Attributions",
        "",
        *(f"- {text}" for text in manifest.attributions),
    ]
    return "\n".join(lines).rstrip() + "\n"


def shown(score: float | None) -> str:
    """'0.912', or a dash for None, the mean of a case that shows none of the classes."""
    return "-" if score is None else f"{score:.3f}"


def _validation_lines(training: dict) -> list[str]:
    """What the validation said about the iteration that was exported."""
    if "validation_dsc" not in training:
        return []
    return [f"The weights are those of iteration {training['iterations']}, the best in the validation: mean DSC {training['validation_dsc']:.3f}.", ""]


def _auto_lines(manifest: BundleManifest) -> list[str]:
    """What k = auto was found to do on held-out cases."""
    points = manifest.training.get("auto", ())
    if not points:
        return []
    lines = [
        "## k = auto",
        "",
        f"The next patch must cover {100 * manifest.auto_gain:g} % of the expected error. Means over the held-out cases, DSC on the model's grid:",
        "",
    ]
    lines += ["| the next patch must cover | patches | of | expected error covered | DSC | gain, of that of all patches |", "|---|---|---|---|---|---|"]
    none, most = points[0]["dsc"], points[-1]["dsc"]
    for point in points:
        title = f"{100 * point['auto_gain']:g} %" if point["auto_gain"] is not None else "all patches" if point["patches"] else "no patch"
        gained = f"{100 * (point['dsc'] - none) / (most - none):.0f} %" if most > none else "-"
        lines.append(f"| {title} | {point['patches']:.1f} | {point['candidates']:.0f} | {100 * point['predicted']:.0f} % | {point['dsc']:.3f} | {gained} |")
    return [*lines, ""]


def _score_lines(scores: dict) -> list[str]:
    """One table of DSC by structure and k for every held-out case."""
    if not scores:
        return ["None were measured.", ""]
    lines = []
    for case, by_k in scores.items():
        ks = list(by_k)
        candidates = next(iter(by_k.values()))["candidates"]
        lines += [f"Case `{case}`, DSC by number of patches k (of {candidates} candidates), on the case's own grid:", ""]
        lines += ["| structure | " + " | ".join(f"k = {k}" for k in ks) + " |", "|---" * (len(ks) + 1) + "|"]
        for structure in next(iter(by_k.values()))["dsc"]:
            lines.append(f"| {structure} | " + " | ".join(shown(by_k[k]["dsc"][structure]) for k in ks) + " |")
        lines += ["| **mean** | " + " | ".join(f"**{shown(by_k[k]['mean'])}**" for k in ks) + " |", ""]
    return lines
