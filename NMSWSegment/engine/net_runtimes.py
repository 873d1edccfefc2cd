"""What computes the local net on a CPU: torch in float32, torch in bfloat16, or OpenVINO in either.

"exact" is torch in float32, bit for bit the same on every run; nothing else is loaded or measured. "auto" measures for about a second what is
fastest on this computer for this model, keeps the choice in the user's cache, and takes it only where the answer on a phantom agrees with torch's.
The coarse net stays in torch: it runs once a volume, at a size of its own each time, and preparing OpenVINO for a size takes longer than that run.
"""

import hashlib
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from NMSWSegment.engine.resampling import normalize_intensity
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import Bundle, BundleManifest
from NMSWSegment.files.normalization import intensity_scale
from NMSWSegment.files.user_cache import cached_folder, put_in_cache
from NMSWSegment.protocol import EXACT, UserError

logger = logging.getLogger(__name__)

LocalNet = Callable[..., Tensor]
"""Patches (B, 1, P, P, P) and, for a cascade, their coarse logits -> local logits."""
Inputs = tuple[Tensor, ...]

TITLES = {
    EXACT: "PyTorch (float32)",
    "torch-bf16": "PyTorch (bfloat16)",
    "openvino": "OpenVINO (float32)",
    "openvino-bf16": "OpenVINO (bfloat16)",
}
LEAST_GAIN = 1.15
"""A runtime must be this much faster than torch in float32 to be taken."""
FLOAT32_TOLERANCE = 1e-3
"""Largest difference of a logit to torch's, as a share of their range."""
BFLOAT16_AGREEMENT = 0.995
"""Least share of the phantom's voxels with the same arg max as in float32."""
MEASURED_S = 0.25
"""For each runtime, beside one call to warm up."""
NOISE = 0.05
"""Standard deviation of the noise in the phantom, of normalized intensity."""
COARSE_NOISE = 4.0
"""Standard deviation of the coarse logits that a cascade is tried with."""


@dataclass(frozen=True)
class RuntimeChoice:
    """What computes the local net."""

    name: str
    """A key of TITLES."""
    speedup: float | None = None
    """Over torch in float32 on this computer; None where that was not measured."""
    agreement: float | None = None
    """Share of the phantom's voxels with torch's arg max."""

    def sentence(self) -> str:
        """For the run info, in plain words."""
        text = f"The local network ran in {TITLES[self.name]}"
        if self.speedup is not None and self.name != EXACT:
            text += f", {self.speedup:.1f} times as fast as {TITLES[EXACT]} on this computer"
        if self.agreement is not None and self.name != EXACT:
            text += f"; {100 * self.agreement:.2f} % of the voxels of a test volume get the same label"
        return text + "."


class Unusable(Exception):
    """A runtime does not do for a net on this computer; the text says why."""


def choose_runtime(bundle: Bundle, net: LocalNet, *, runtime: str) -> tuple[LocalNet, RuntimeChoice]:
    """The local net as it will run on the CPU, with as many threads as torch has now.

    Args:
        net: of the bundle, in torch and float32.
        runtime: as in SegmentOptions.

    Raises:
        UserError: a runtime that was asked for by name cannot be used.
    """
    if runtime == EXACT:
        return net, RuntimeChoice(EXACT)
    key = _choice_key(bundle)
    remembered = _remembered_choice(key) if runtime == "auto" else None
    if remembered and remembered.name == EXACT:
        return net, remembered
    inputs = probe_inputs(bundle.manifest)
    with torch.inference_mode():
        expected = net(*inputs)
    if runtime != "auto":
        try:
            return prepared_runtime(runtime, bundle, net, inputs=inputs, expected=expected)
        except Unusable as error:
            raise UserError(f"The runtime {runtime} cannot be used on this computer: {error}. Use the runtime 'exact', or 'auto'.") from error
    if remembered is None:
        return _measured(bundle, net, inputs=inputs, expected=expected, key=key)
    try:
        prepared, choice = prepared_runtime(remembered.name, bundle, net, inputs=inputs, expected=expected)
        return prepared, RuntimeChoice(choice.name, speedup=remembered.speedup, agreement=choice.agreement)
    except Unusable as error:
        logger.warning("The local net of %s goes on in %s: %s", bundle.manifest.name, TITLES[EXACT], error)
        return net, RuntimeChoice(EXACT)


def possible_runtimes() -> list[str]:
    """What this computer has besides torch in float32. bfloat16 only where the processor computes with it: elsewhere torch is up to 140 times slower."""
    names = ["torch-bf16"] if _torch_has_bfloat16() else []
    try:
        has_bfloat16 = "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (Unusable, RuntimeError):  # not there, or without a part of it that drives this processor
        return names
    return [*names, "openvino", *(["openvino-bf16"] if has_bfloat16 else [])]


def prepared_runtime(name: str, bundle: Bundle, net: LocalNet, *, inputs: Inputs, expected: Tensor) -> tuple[LocalNet, RuntimeChoice]:
    """The net in a runtime, if its answer agrees with the expected one.

    Raises:
        Unusable: it does not, or the runtime is not there, or it does not take the net.
    """
    if name not in possible_runtimes():
        _openvino() if name.startswith("openvino") else None  # tells what is missing
        raise Unusable("OpenVINO does not start" if name == "openvino" else "the processor has no bfloat16 instructions")
    try:
        prepared = _in_bfloat16(net) if name == "torch-bf16" else _OpenVinoNet(_converted(bundle, net), in_bfloat16=name.endswith("bf16"))
        with torch.inference_mode():
            found = prepared(*inputs).float()
    except Exception as error:  # whatever a converter or a compiler of another project raises: torch in float32 remains
        raise Unusable(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}") from error
    share = agreement(found, expected)
    difference = float((found - expected).abs().max()) / max(float(expected.max() - expected.min()), 1e-6)
    if name.endswith("bf16") and not share >= BFLOAT16_AGREEMENT:
        raise Unusable(f"only {100 * share:.2f} % of the voxels of a test volume get the same label, {100 * BFLOAT16_AGREEMENT:g} % are needed")
    if not name.endswith("bf16") and not difference <= FLOAT32_TOLERANCE:
        raise Unusable(f"logits of a test volume differ by {difference:.2g} of their range, {FLOAT32_TOLERANCE:g} is allowed")
    return prepared, RuntimeChoice(name, agreement=share)


def probe_inputs(manifest: BundleManifest) -> Inputs:
    """A patch of a phantom with noise, (1, 1, P, P, P) in [0, 1], and, for a cascade, smooth random coarse logits; the same at every call."""
    shape = manifest.patch_size
    spacing_mm = [2 * radius / length for radius, length in zip(phantoms.BODY_RADII_MM[::-1], shape)]
    volume, _ = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras(spacing_mm, shape))
    intensity = intensity_scale(volume.array, manifest.normalization).normalized(torch.from_numpy(volume.array))
    patch = normalize_intensity(intensity, manifest.intensity_points)
    generator = torch.Generator().manual_seed(0)
    image = (patch + NOISE * torch.randn(shape, generator=generator)).clamp(0, 1)[None, None]
    if not manifest.is_cascade:
        return (image,)
    logits = COARSE_NOISE * torch.randn(1, manifest.num_classes, 3, 3, 3, generator=generator)
    size = [length // factor for length, factor in zip(shape, manifest.coarse_factor)]
    return image, torch.log_softmax(torch.nn.functional.interpolate(logits, size=size, mode="trilinear", align_corners=True), dim=1)


def agreement(found: Tensor, expected: Tensor) -> float:
    """Share of voxels with the same arg max over the classes; both (1, C, P, P, P)."""
    return float((found.argmax(1) == expected.argmax(1)).float().mean())


def _measured(bundle: Bundle, net: LocalNet, *, inputs: Inputs, expected: Tensor, key: str) -> tuple[LocalNet, RuntimeChoice]:
    """Try what the computer has, take the fastest and remember it."""
    best, choice = net, RuntimeChoice(EXACT)
    exact_s, least_s = _seconds(net, inputs), None
    for name in possible_runtimes():
        try:
            candidate, facts = prepared_runtime(name, bundle, net, inputs=inputs, expected=expected)
        except Unusable as error:
            logger.info("%s is left out for %s: %s", TITLES[name], bundle.manifest.name, error)
            continue
        seconds = _seconds(candidate, inputs)
        if seconds * LEAST_GAIN < exact_s and (least_s is None or seconds < least_s):
            best, least_s = candidate, seconds
            choice = RuntimeChoice(name, speedup=exact_s / seconds, agreement=facts.agreement)
    logger.info("%s: %s", bundle.manifest.name, choice.sentence())
    put_in_cache(key, lambda folder: (folder / "choice.json").write_text(json.dumps({"name": choice.name, "speedup": choice.speedup}), encoding="utf-8"))
    return best, choice


def _seconds(net: LocalNet, inputs: Inputs) -> float:
    """Least seconds of a call. The net has run before, so that nothing is planned or compiled any more."""
    least, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < MEASURED_S:
        before = time.perf_counter()
        with torch.inference_mode():
            net(*inputs)
        least = min(least, time.perf_counter() - before)
    return least


def _in_bfloat16(net: LocalNet) -> LocalNet:
    """The net under torch's automatic choice of bfloat16."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(*inputs)

    return run


class _OpenVinoNet:
    """A converted net, compiled for the threads that torch has now."""

    def __init__(self, folder: Path, *, in_bfloat16: bool) -> None:
        core = _openvino().Core()
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if in_bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request = core.compile_model(core.read_model(folder / "local.xml"), "CPU", options).create_infer_request()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Inputs of B patches -> (B, C, P, P, P); one patch after the other."""
        patches = ({number: part[None].contiguous().numpy() for number, part in enumerate(parts)} for parts in zip(*inputs))
        answers = [torch.from_numpy(self._request.infer(patch)[0].copy()) for patch in patches]
        return answers[0] if len(answers) == 1 else torch.cat(answers)


def _converted(bundle: Bundle, net: LocalNet) -> Path:
    """The folder with the OpenVINO form of the local net, converted from the bundle's archive unless an earlier start did so."""
    openvino = _openvino()
    name = "openvino-" + _digest(bundle.manifest.sha256["local.pt"], openvino.__version__, torch.__version__, "1")
    folder = cached_folder(name) or put_in_cache(name, lambda place: _convert(bundle.manifest, net, place=place))
    if folder is None:
        raise OSError("the converted net cannot be kept in the user's cache folder")
    return folder


def _convert(manifest: BundleManifest, net: LocalNet, *, place: Path) -> None:
    """Write local.xml and local.bin, in float32."""
    openvino = _openvino()
    inputs = probe_inputs(manifest)
    model = openvino.convert_model(net, example_input=inputs, input=[list(one.shape) for one in inputs])
    openvino.save_model(model, place / "local.xml", compress_to_fp16=False)


def _openvino() -> ModuleType:
    """The library, without the package by which it reports its use to its vendor: a hospital's computer tells nobody what it does.

    Raises:
        Unusable: it is not installed.
    """
    with _hidden("openvino_telemetry"):
        try:
            import openvino
        except ImportError as error:
            raise Unusable("OpenVINO is not installed; install it with: pip install openvino") from error
    return openvino


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let the import of a package fail, unless somebody has it already."""
    is_there = package in sys.modules
    if not is_there:
        sys.modules[package] = None
    try:
        yield
    finally:
        if not is_there:
            del sys.modules[package]


def _torch_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers and torch knows."""
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return platform.machine().lower() in ("x86_64", "amd64") and any(test() for test in tests if test)


def _remembered_choice(key: str) -> RuntimeChoice | None:
    """What an earlier start measured."""
    folder = cached_folder(key)
    try:
        values = json.loads((folder / "choice.json").read_text(encoding="utf-8")) if folder else None
        return RuntimeChoice(values["name"], speedup=values["speedup"]) if values and values["name"] in TITLES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _choice_key(bundle: Bundle) -> str:
    """Names the choice: it holds for this processor, number of threads, libraries and net."""
    processor = platform.processor() or platform.machine()
    facts = (platform.node(), processor, torch.get_num_threads(), torch.__version__, possible_runtimes(), bundle.manifest.sha256["local.pt"])
    return "runtime-" + _digest(*map(str, facts), "1")


def _digest(*parts: str) -> str:
    """A short name for some texts."""
    return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()[:32]
