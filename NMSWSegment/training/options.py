"""What decides a training run: the options with their checks, the recipes, and their flags.

Everything here is stored in the run folder and must be the same on resume; how a run is carried out (device, workers, folders)
is not an option.
"""

import argparse
import ast
import inspect
from dataclasses import dataclass, fields
from pathlib import Path

from NMSWSegment.data.layouts import CT
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.normalization import FIXED, NORMALIZATIONS, PERCENTILES, ZSCORE
from NMSWSegment.nets.backbones import known_preset
from NMSWSegment.protocol import UserError, reject_unknown_keys, unknown_name
from NMSWSegment.training.config_file import read_config

OPTIONS_NAME = "options.json"
CT_INTENSITY_POINTS = ((-1000.0, 0.0), (-200.0, 0.2), (300.0, 0.85), (1500.0, 1.0))
PAPER_INTENSITY_POINTS = ((-250.0, 0.0), (500.0, 1.0))
MR = "MR"
MODALITIES = (CT, MR)
INTENSITY_POINTS = {FIXED: CT_INTENSITY_POINTS, PERCENTILES: ((0.0, 0.0), (1.0, 1.0)), ZSCORE: ((-3.0, 0.0), (4.0, 1.0))}
"""Defaults by normalization. Of z-scores, 4 because MR has a long bright tail."""
SPARSE_BACKBONE = "e2enet"
ADAMW, SGD = "adamw", "sgd"
UPON_LOCAL = ("importance", "weights")
"""What a run trains that needs a finished local net."""
CHANGEABLE = ("data", "splits", "iterations", "patience")
"""What may be another on resume: places of the same cases, and how long the run goes on."""
_FLAG_NAMES = {"spacing_mm": "spacing"}
_TRIPLE_AXES = ("S", "A", "R")


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a run; stored in the run folder and compared on resume."""

    data: tuple[str, ...]
    """KIND:FOLDER; the kinds are those of layouts.read_cases, and anatomies (CT synthesized on the fly)."""
    subset: str = ""
    """Of totalsegmentator: organ, vertebrae, total, or class names with commas."""
    hold_out: tuple[str, ...] = ()
    """Ids of cases and anatomies that take no part in training; the cases among them are validated on, unless a fold says which are."""
    fold: int | None = None
    """Number of the fold whose cases are validated on, from 0; of `folds` or `splits`."""
    folds: int = 0
    """Number of folds into which the cases, sorted by name, are dealt out."""
    splits: str = ""
    """Lists of cases in nnU-Net's format (splits_final.json)."""
    validate_every: int = 2000
    """Iterations between two validations on held-out cases; 0 for none."""
    validation_cases: int = 10
    """At most so many of the held-out cases are validated on, evenly chosen by name."""
    validation_patches: int = 10
    """Patches a case in the validation, as --k of nmsw segment; coarse and local alone have none to choose."""
    patience: int = 0
    """The run ends after so many validations without a better score; 0 never."""
    backbone: str = "unet"
    """Of the local net."""
    preset: str = "compact"
    """Size of the nets: compact or paper."""
    cascade: bool = False
    """The local net also reads the coarse net's logits in its patch, and corrects them."""
    train: str = "both"
    """both nets together; coarse or local alone; patches: the local net and the class weights, upon the coarse net of coarse_run as it is;
    importance: the importance head and the class weights, upon the nets of initial_run; weights: the class weights alone, likewise."""
    sparsity: float = 0.0
    """Share of fusion weights that e2enet leaves out (S of the paper), 0 for none."""
    sparsity_update_every: int = 1200
    """Optimizer steps between two changes of what a sparse e2enet leaves out; the paper's, for its long runs."""
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    """Model spacing in mm, KJI."""
    modality: str = CT
    """Of all data of the run."""
    normalization: str = FIXED
    """What intensity_points are counted in: fixed (HU), or the volume's own percentiles or zscore, for MR."""
    intensity_points: tuple[tuple[float, float], ...] = CT_INTENSITY_POINTS
    """See BundleManifest.intensity_points."""
    patch_size: tuple[int, int, int] = (64, 64, 64)
    """Voxels of a patch, KJI."""
    overlap: float = 0.5
    """Share of a patch that the next candidate repeats."""
    coarse_factor: tuple[int, int, int] = (2, 2, 2)
    """Voxels that the coarse net sees as one, KJI."""
    augmentation: str = "scan"
    """scan: random scan ranges, warps, contrast and scanners (as the packaged model), of CT in HU only; paper: the paper's list, on whole volumes."""
    max_sample_voxels: int = 160 * 128 * 160
    """Largest sample of the augmentation scan; raise it for a fine spacing."""
    iterations: int = 150_000
    """Optimizer steps. The paper: 300 epochs of 500."""
    batch_size: int = 1
    """Volumes of one step, shared out over all processes."""
    optimizer: str = ADAMW
    """adamw with a cosine schedule, as in NMSW; or sgd with momentum 0.99 (Nesterov) and a polynomial one, as in nnU-Net and E2ENet, which start it at 0.01."""
    learning_rate: float = 3e-4
    """Highest one."""
    weight_decay: float = 1e-5
    """Of the optimizer."""
    warmup: float = 0.2
    """Share of the iterations over which the learning rate of adamw rises."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    top_k_patches: int = 3
    """Patches a volume that are drawn by importance."""
    random_patches: int = 1
    """Patches a volume that are drawn evenly."""
    estimator: str = "gain"
    """Of the importance. gain: it learns the measured gain of every trained patch; gate: the gradient of the selection is the patch's benefit; scale: through
    the patch's intensity, as published."""
    tau_start: float = 2.0
    """Temperature of the differentiable top-k at the beginning."""
    tau_end: float = 0.33
    """The same at the end; it falls exponentially."""
    entropy_weight: float = 1e-4
    """lambda of Eq. 7."""
    real_fraction: float = 0.35
    """Share of samples drawn from labelled CT where both kinds of data are given."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast; on GPUs, and on processors with AMX)."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is exported, less at the beginning of a run; 0 exports the last weights."""
    seed: int = 0
    """Of weights, samples and patches."""
    initial_run: str = ""
    """Run folder whose weights to start from."""
    initial_bundle: str = ""
    """Bundle, by name or folder, whose weights to start from; its classes are matched by name, and its nets, spacing, intensity and patches are the defaults.
    With another backbone only its coarse net is taken."""
    coarse_run: str = ""
    """Run folder whose coarse net train = patches uses; its local net may have another backbone."""

    def __post_init__(self) -> None:
        known_preset(self.preset)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(unknown_name(name, getattr(self, name), known))
        if self.iterations < 1 or self.top_k_patches + self.random_patches < 1 or self.batch_size < 1:
            raise UserError("iterations, batch_size and top_k_patches + random_patches must be at least 1.")
        if min(self.spacing_mm) <= 0 or min(self.coarse_factor) < 1 or min(self.patch_size) < 1 or self.max_sample_voxels < 1:
            raise UserError(
                f"spacing {self.spacing_mm}, patch_size {self.patch_size}, coarse_factor {self.coarse_factor} and max_sample_voxels {self.max_sample_voxels} must be positive."
            )
        if self.cascade and self.train == "local" and not (self.coarse_run or self.initial_run or self.initial_bundle):
            raise UserError("The local net of a cascade reads what the coarse net found. Give --coarse-run RUN, the folder of a run that trained a coarse net.")
        try:
            grid = CandidateGrid.covering(self.patch_size, patch_size=self.patch_size, overlap=self.overlap, coarse_factor=self.coarse_factor)
        except ValueError as error:
            raise UserError(f"The candidate grid is not possible: {error}. Use overlap 0.5 with an even patch_size.") from error
        if self.cascade and not grid.has_whole_coarse_voxels:
            raise UserError(
                f"The patches of a cascade must begin and end with whole coarse voxels, but patch_size is {self.patch_size}, overlap {self.overlap:g} and coarse_factor {self.coarse_factor}. Use multiples of twice the coarse factor."
            )
        upon_coarse = ("patches", *UPON_LOCAL, *(("local",) if self.cascade else ()))
        if self.train == "patches" and not (self.coarse_run or self.initial_run or self.initial_bundle):
            raise UserError(
                "train is 'patches', which needs a finished coarse net. Give --coarse-run RUN, the folder of a run that trained one, or --initial-bundle MODEL."
            )
        if self.coarse_run and self.train not in upon_coarse:
            raise UserError(
                f"coarse_run is '{self.coarse_run}', but train is '{self.train}', which does not use one. Leave --coarse-run out, or use --train patches."
            )
        if self.train in UPON_LOCAL and not (self.initial_run or self.initial_bundle):
            raise UserError(
                f"train is '{self.train}' without initial_run. Give --initial-run RUN, the folder of a run whose coarse and local nets are trained, or --initial-bundle."
            )
        if self.initial_bundle and self.initial_run:
            raise UserError(f"Both initial_bundle '{self.initial_bundle}' and initial_run '{self.initial_run}' are given. Start from one of them.")
        if self.fold is not None and bool(self.folds) == bool(self.splits):
            raise UserError(
                f"fold is {self.fold}, with folds {self.folds} and splits '{self.splits}'. Give --fold together with --folds K, or with --splits FILE."
            )
        if self.fold is None and (self.folds or self.splits):
            raise UserError("folds or splits are given without a fold. Add --fold I, the number of the fold to validate on, from 0.")
        if self.fold is not None and (self.fold < 0 or self.folds == 1 or (self.folds and self.fold >= self.folds)):
            raise UserError(f"fold is {self.fold} of {self.folds or 'the splits'}. Folds are numbered from 0, and there must be at least 2 of them.")
        if min(self.validate_every, self.patience) < 0 or min(self.validation_cases, self.validation_patches) < 1:
            raise UserError("validate_every and patience must be 0 or more, validation_cases and validation_patches 1 or more.")
        if self.patience and not self.validate_every:
            raise UserError(f"patience is {self.patience}, but validate_every is 0, so that nothing is validated. Give --validate-every too.")
        if self.augmentation == "scan" and (self.modality != CT or self.normalization != FIXED):
            raise UserError(
                f"The augmentation is 'scan', which changes Hounsfield units, but the data is {self.modality} with normalization {self.normalization}. Use --augmentation paper."
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}. It is a decay from 0 (none) to below 1, for example 0.999.")
        if not 0 <= self.sparsity < 1 or (self.sparsity and self.backbone != SPARSE_BACKBONE):
            raise UserError(
                f"sparsity is {self.sparsity} with backbone {self.backbone}. It is a share from 0 to below 1, and only {SPARSE_BACKBONE} can be sparse."
            )

    @classmethod
    def from_dict(cls, values: dict) -> "TrainOptions":
        """Options from the JSON of a run folder."""
        reject_unknown_keys(cls, values, where=OPTIONS_NAME)
        return cls(**{key: _tupled(value) for key, value in values.items()})


CHOICES = {
    "modality": MODALITIES,
    "normalization": NORMALIZATIONS,
    "optimizer": (ADAMW, SGD),
    "estimator": ("gain", "gate", "scale"),
    "precision": ("fp32", "bf16"),
    "augmentation": ("scan", "paper"),
    "train": ("both", "patches", "importance", "weights", "coarse", "local"),
}
DEFAULT_RECIPE = "compact"
_PAPER = {"preset": "paper", "patch_size": (128, 128, 128), "intensity_points": PAPER_INTENSITY_POINTS, "augmentation": "paper"}
RECIPES = {
    "compact": {},
    "paper-word": _PAPER | {"spacing_mm": (3.0, 1.0, 1.0), "coarse_factor": (3, 3, 3)},
    "paper-totalsegmentator": _PAPER | {"spacing_mm": (1.5, 1.5, 1.5), "coarse_factor": (4, 3, 3)},
}
"""Options that go together, by name; a flag that is given overrides the recipe. Source: paper section 4 (its 3 x 3 x 4 is H W D); what the
packaged models were trained with: docs/deviations.md, D12."""


_BY_MODALITY = {CT: {}, MR: {"normalization": PERCENTILES, "augmentation": "paper"}}


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per option; what is not given is left out, so that the file of --config decides, and then the recipe."""
    group = parser.add_argument_group("what is trained (the same on --resume)")
    group.add_argument("--config", type=Path, default=None, metavar="FILE.yaml", help="options by name, also the options.json of a run; flags override them")
    group.add_argument(
        "--recipe", default=argparse.SUPPRESS, metavar="NAME", help=f"options that go together: {', '.join(RECIPES)} (default: {DEFAULT_RECIPE})"
    )
    group.add_argument(
        "--data",
        action="append",
        default=argparse.SUPPRESS,
        metavar="KIND:FOLDER",
        help="decathlon, nnunet, word, totalsegmentator, prepared or anatomies; repeat to mix",
    )
    group.add_argument(
        "--hold-out", type=_comma_list, default=argparse.SUPPRESS, metavar="ID,...", help="cases and anatomies to leave out; the cases are validated on"
    )
    group.add_argument(
        "--window",
        type=float,
        nargs=2,
        default=argparse.SUPPRESS,
        metavar=("LOW", "HIGH"),
        help="intensity window of the nets in HU, or in units of the normalization (default: a piecewise line for CT, 0 1 for percentiles, -3 4 for zscore)",
    )
    texts = _attribute_texts(TrainOptions)
    for field in fields(TrainOptions):
        flag = "--" + _FLAG_NAMES.get(field.name, field.name).replace("_", "-")
        text = f"{texts[field.name]} (default: {'none' if field.default in ('', None) else field.default})"
        default = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if field.type in (tuple[float, float, float], tuple[int, int, int]):
            group.add_argument(flag, type=field.type.__args__[0], nargs=3, metavar=_TRIPLE_AXES, **default)
        elif field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **default)
        elif field.type in (int, float, str, int | None):
            group.add_argument(flag, type=int if field.type == int | None else field.type, choices=CHOICES.get(field.name), **default)


def options_from_arguments(arguments: argparse.Namespace) -> TrainOptions:
    """The recipe's options with what the file of --config and, before it, the flags say.

    Raises:
        UserError: the file, the recipe or a value is not possible, or there is no data.
    """
    option_types = {field.name: field.type for field in fields(TrainOptions)}
    file_types = option_types | {"recipe": str, "window": tuple[float, float]}
    aliases = {flag: name for name, flag in _FLAG_NAMES.items()}
    config = read_config(arguments.config, types=file_types, aliases=aliases) if arguments.config else {}
    flags = {name: _tupled(value) for name, value in vars(arguments).items() if name in file_types}
    if "window" in flags or "window" in config:  # the points of a file do not undo the window of a flag
        low, high = flags.pop("window", config.pop("window", None))
        if not low < high:
            raise UserError(f"The window is {low:g} {high:g}. Give the lower bound first.")
        flags["intensity_points"] = ((low, 0.0), (high, 1.0))
    given = config | flags
    recipe = given.pop("recipe", DEFAULT_RECIPE)
    if recipe not in RECIPES:
        raise UserError(unknown_name("recipe", recipe, list(RECIPES)))
    if not given.get("data"):
        raise UserError("There is no data to train on. Give --data KIND:FOLDER, or write data into the file of --config.")
    bundle = _as_in_bundle(given.get("initial_bundle"))
    modality = (bundle | given).get("modality", CT)
    if modality not in MODALITIES:
        raise UserError(unknown_name("modality", modality, MODALITIES))
    if bundle and bundle["modality"] != modality:  # its weights are a start, its intensities mean nothing here
        bundle = {name: value for name, value in bundle.items() if name not in ("normalization", "intensity_points")}
    values = RECIPES[recipe] | _BY_MODALITY[modality] | bundle | given
    if values.get("normalization", FIXED) != bundle.get("normalization", FIXED) and "intensity_points" not in given:
        values["intensity_points"] = INTENSITY_POINTS[values["normalization"]]
    return TrainOptions(**values)


def _attribute_texts(cls: type) -> dict[str, str]:
    """What stands below every attribute of a class, on one line."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        attribute.target.id: " ".join(text.value.value.split())
        for attribute, text in zip(body, body[1:])
        if isinstance(attribute, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def changed_options(old: TrainOptions, new: TrainOptions) -> str:
    """'seed was 3, is 4' for every difference that a resumed run may not have; empty when there is none."""
    changed = [field.name for field in fields(TrainOptions) if field.name not in CHANGEABLE and getattr(old, field.name) != getattr(new, field.name)]
    return ", ".join(f"{name} was {getattr(old, name)!r}, is {getattr(new, name)!r}" for name in changed)


def _as_in_bundle(name: str | None) -> dict:
    """The options that suit the weights of a bundle; none without one."""
    if not name:
        return {}
    manifest = load_bundle(name).manifest
    kept = {
        name: getattr(manifest, name)
        for name in ("modality", "normalization", "spacing_mm", "intensity_points", "patch_size", "overlap", "coarse_factor", "backbone")
    }
    return kept | {"preset": manifest.architecture["preset"], "cascade": manifest.is_cascade}


def _comma_list(text: str) -> tuple[str, ...]:
    """The names between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _tupled(value: object) -> object:
    """Lists as tuples, at any depth."""
    return tuple(_tupled(item) for item in value) if isinstance(value, (list, tuple)) else value
