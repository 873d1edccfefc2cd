"""The classes of the TotalSegmentator dataset 2 and its subsets; our label names are its names.

Source: class map 'total' and its parts in TotalSegmentator 2 (Wasserthal et al. 2023), in its order.
"""

from NMSWSegment.protocol import UserError, unknown_name

ORGANS = (
    "spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left lung_upper_lobe_left "
    "lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right esophagus trachea thyroid_gland small_bowel "
    "duodenum colon urinary_bladder prostate kidney_cyst_left kidney_cyst_right"
).split()
VERTEBRAE = ["sacrum", "vertebrae_S1", *(f"vertebrae_{part}{number}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for number in range(count, 0, -1))]
HEART_AND_VESSELS = (
    "heart aorta pulmonary_vein brachiocephalic_trunk subclavian_artery_right subclavian_artery_left common_carotid_artery_right "
    "common_carotid_artery_left brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left superior_vena_cava "
    "inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right"
).split()
BONES_AND_MUSCLES = (
    "humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right hip_left hip_right "
    "spinal_cord gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right gluteus_minimus_left "
    "gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right brain skull"
).split()
RIBS = [*(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)), "sternum", "costal_cartilages"]
TOTAL = [*ORGANS, *VERTEBRAE, *HEART_AND_VESSELS, *BONES_AND_MUSCLES, *RIBS]
SUBSETS = {"organ": ORGANS, "vertebrae": VERTEBRAE, "total": TOTAL}


def subset_classes(subset: str) -> tuple[str, ...]:
    """The classes of a subset in label order.

    Args:
        subset: organ (24), vertebrae (26), total (117), or names of classes separated by commas.

    Raises:
        UserError: there is no subset, or a name is no class.
    """
    if subset in SUBSETS:
        return tuple(SUBSETS[subset])
    names = tuple(name.strip() for name in subset.split(",") if name.strip())
    if not names:
        raise UserError(
            "The TotalSegmentator dataset has 117 classes. Say which to learn with --subset organ, vertebrae, total, or names such as liver,spleen."
        )
    for name in names:
        if name not in TOTAL:
            raise UserError(unknown_name("TotalSegmentator class", name, [*SUBSETS, *TOTAL]))
    return names
