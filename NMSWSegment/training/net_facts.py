"""What a bundle manifest says about the nets of a run."""

from collections.abc import Sequence

from NMSWSegment.files.labels import coded_labels
from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.training.options import TrainOptions


def net_facts(options: TrainOptions, net: NMSWNet, *, label_names: Sequence[str]) -> dict:
    """The fields of BundleManifest that inference needs.

    Args:
        label_names: classes without background, in label order.
    """
    return {
        "backbone": options.backbone,
        "modality": options.modality,
        "normalization": options.normalization,
        "spacing_mm": options.spacing_mm,
        "intensity_points": options.intensity_points,
        "patch_size": options.patch_size,
        "overlap": options.overlap,
        "coarse_factor": options.coarse_factor,
        "coarse_multiple": net.architecture.coarse_multiple,
        "labels": coded_labels(list(label_names)),
        "class_weights": tuple(net.class_weights.tolist()),
        "architecture": net.architecture.to_dict(),
        "importance_has_entropy": True,
    }
