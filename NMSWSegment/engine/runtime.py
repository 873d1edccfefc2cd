"""Where the nets run: devices, threads, and what happens when a GPU cannot go on."""

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.engine.net_runtimes import LocalNet, RuntimeChoice, choose_runtime
from NMSWSegment.engine.resampling import run_coarse
from NMSWSegment.engine.selection import log_entropy
from NMSWSegment.files.bundle import Bundle, BundleManifest
from NMSWSegment.protocol import EXACT, UserError

logger = logging.getLogger(__name__)

GPU_BATCH_SIZE = 4  # patches; on a CPU a batch only takes memory
OUT_OF_MEMORY = "ran out of memory"

CoarseNet = Callable[[Tensor], tuple[Tensor, Tensor]]


class OutOfMemory(UserError):
    """The computer's own memory does not do; there is no other device to go to."""


@dataclass
class Nets:
    """The two nets of a bundle on a device. Calls take float32 tensors on any device; results come back on the CPU.

    When a GPU runs out of memory, the batch of patches is halved; when that is no help, or the GPU fails in any other way, the nets
    of the CPU go on for good. `device_steps` says what happened.
    """

    manifest: BundleManifest
    coarse_net: CoarseNet
    """x_low (1, 1, d, h, w) -> coarse logits (1, C, d, h, w), importance map (1, 1, d, h, w)."""
    local_net: LocalNet
    """(B, 1, P, P, P) and, for a cascade, coarse logits (B, C, P/r, P/r, P/r) -> local logits (B, C, P, P, P)."""
    device: torch.device
    on_cpu: Callable[[], tuple[CoarseNet, LocalNet]] | None = None
    """Loads the nets again, on the CPU: what a GPU that has failed holds may be lost. None where they are there already, or may not move, as those of a training."""
    device_steps: list[str] = field(default_factory=list)
    runtime: RuntimeChoice = RuntimeChoice(EXACT)
    """What computes the local net on the CPU."""
    batch_size: int = field(init=False)
    """Patches that go through the local net together."""

    def __post_init__(self) -> None:
        self.batch_size = 1 if self.device.type == "cpu" else GPU_BATCH_SIZE

    def coarse(self, x_low: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse logits (C, d, h, w) and importance map (d, h, w) of x_low (1, 1, d, h, w)."""
        logits, importance_map = run_coarse(lambda x: self._run("coarse_net", x), x_low, multiple=self.manifest.coarse_multiple)
        coarse_logits = without_padding(logits[0])
        del logits
        if not self.manifest.importance_has_entropy:
            importance_map = importance_map + log_entropy(coarse_logits[None])
        return coarse_logits, importance_map[0, 0].contiguous()

    def local(self, patches: Tensor, coarse_parts: Sequence[Tensor] | None = None) -> Tensor:
        """Local logits (B, C, P, P, P) of patches (B, P, P, P); more than `batch_size` go one batch after the other.

        Args:
            coarse_parts: for a cascade the coarse logits of every patch, (C, P/r, P/r, P/r) each.
        """
        batches, num_done = [], 0
        inputs = (patches[:, None],) if coarse_parts is None else (patches[:, None], torch.stack(list(coarse_parts)))
        while num_done < len(patches):
            batches.append(self._run("local_net", *(one[num_done : num_done + self.batch_size] for one in inputs)))
            num_done += len(batches[-1])
        return batches[0] if len(batches) == 1 else torch.cat(batches)

    def _run(self, name: str, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Call a net on as much of its inputs as there is memory for; the only place where a GPU that cannot go on is caught."""
        try:
            return self._call(name, *inputs)
        except RuntimeError as error:
            if self.device.type == "cpu":
                is_of_archive = "TorchScript interpreter" in str(error) or "forward()" in str(error)  # the latter of other arguments
                if is_of_archive and not _is_out_of_memory(error):
                    last_line = str(error).strip().splitlines()[-1]
                    raise UserError(f"The {_title(name)} of model '{self.manifest.name}' does not run ({last_line}). Export the bundle again.") from error
                raise
            reason = _reason_to_leave(error)
            is_divisible = reason == OUT_OF_MEMORY and len(inputs[0]) > 1
            if self.on_cpu is None and not is_divisible:
                raise
            logger.warning("%s %s: %s", self.device, reason, error)
        # After the except block, because the error keeps the frames of the failed call alive, and with them their memory.
        free_cached_memory(self.device)
        if is_divisible:
            self.batch_size = len(inputs[0]) // 2
            self.device_steps.append(f"{self.device} {reason}; the batch went from {len(inputs[0])} to {self.batch_size}")
        else:
            self._move_to_cpu(reason)
        return self._run(name, *(one[: self.batch_size] for one in inputs))

    def _call(self, name: str, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The net's outputs on the CPU."""
        with torch.inference_mode():
            outputs = getattr(self, name)(*(one.to(self.device) for one in inputs))
            self._check_outputs(name, inputs[0], outputs if isinstance(outputs, tuple) else (outputs,))
            return tuple(output.float().cpu() for output in outputs) if isinstance(outputs, tuple) else outputs.float().cpu()

    def _check_outputs(self, name: str, x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        """Raise UserError unless a net gives what its kind gives, and numbers: weights may be broken although their hash is right."""
        channels = (self.manifest.num_classes, 1) if name == "coarse_net" else (self.manifest.num_classes,)
        expected = [(len(x), count, *x.shape[2:]) for count in channels]
        if [tuple(output.shape) for output in outputs] != expected:
            found = ", ".join(str(tuple(output.shape)) for output in outputs)
            raise UserError(
                f"The {_title(name)} of model '{self.manifest.name}' gives {found} for an input of {tuple(x.shape)}, but must give {', '.join(map(str, expected))}. "
                "Export the bundle again."
            )
        if not all(bool(extreme.isfinite()) for output in outputs for extreme in (output.min(), output.max())):  # isfinite of all takes a copy
            raise UserError(f"The {_title(name)} of model '{self.manifest.name}' gives values that are no numbers. Export the bundle again.")

    def _move_to_cpu(self, reason: str) -> None:
        """Leave the device for good."""
        self.device_steps.append(_step_to_cpu(self.device, reason))
        self.coarse_net, self.local_net = self.on_cpu()
        self.device, self.batch_size = torch.device("cpu"), 1


def without_padding(logits: Tensor) -> Tensor:
    """Logits (C, d, h, w) that are a corner of a larger (C, D, H, W), moved to the front of its memory: a copy would take as much again."""
    num_voxels = logits[0].numel()
    if logits.is_contiguous() or logits.storage_offset() or logits.stride(0) < num_voxels:
        return logits.contiguous()
    with torch.inference_mode():
        memory = logits.as_strided((len(logits) * num_voxels,), (1,))
        for value, voxels in enumerate(logits):  # what is overwritten has been moved, or is of this class and copied
            memory[value * num_voxels : (value + 1) * num_voxels] = voxels.clone(memory_format=torch.contiguous_format).view(-1)
    return memory.view(logits.shape)


def _reason_to_leave(error: Exception) -> str:
    """Why a GPU cannot go on."""
    text = str(error)
    # TorchScript turns torch's OutOfMemoryError into a plain RuntimeError (pytorch issue 148642); MPS refuses a large tensor by its size (141909)
    if "out of memory" in text or "Invalid buffer size" in text:
        return OUT_OF_MEMORY
    # MPS lacks 3-D transposed convolution in older versions of torch
    if "not supported on MPS" in text or "not currently implemented for the MPS" in text:
        return "lacks an operator of the nets"
    if "no kernel image" in text:
        return "is not supported by this build of torch"
    lines = [line.removeprefix("RuntimeError: ") for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [type(error).__name__]
    return f"failed ({lines[0].strip()})"


def _step_to_cpu(device: torch.device, reason: str) -> str:
    """For device_steps."""
    return f"{device} {reason}; the nets went on with the CPU"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the computer's own memory did not do; torch's allocator raises a plain RuntimeError, with other words on Windows than elsewhere."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)


def _title(name: str) -> str:
    """'coarse net' for coarse_net."""
    return name.replace("_", " ")


def free_cached_memory(device: torch.device) -> None:
    """Give the memory that torch keeps for later back to the GPU."""
    with suppress(RuntimeError):  # a GPU that has failed does not even do that
        if device.type == "cuda":
            torch.cuda.empty_cache()
        elif device.type == "mps":
            torch.mps.empty_cache()


@contextmanager
def memory_explained(shape: Sequence[int]) -> Iterator[None]:
    """Turn a lack of the computer's own memory, wherever it shows, into a sentence with the way out.

    Args:
        shape: voxels of the volume, KJI.

    Raises:
        OutOfMemory: numpy or torch could not get memory in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        size = " x ".join(str(length) for length in reversed(tuple(shape)))
        raise OutOfMemory(
            f"This computer ran out of memory with a volume of {size} voxels. Crop the volume, or close other programs; fewer patches help little."
        ) from error


def check_numpy() -> None:
    """Raise UserError if torch cannot exchange arrays with numpy: the last torch for Intel Macs was built for numpy 1 and loads beside numpy 2 all the same."""
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        raise UserError(
            f"PyTorch {torch.__version__} was built for numpy 1, but numpy {np.__version__} is installed. "
            'In the Python console of Slicer, run slicer.util.pip_install("numpy<2") and restart Slicer; elsewhere, run: pip install "numpy<2"'
        ) from error


def available_devices() -> dict[str, str]:
    """What is really there: device string -> display name; the CPU always, then CUDA GPUs, then MPS."""
    devices = {"cpu": f"CPU ({os.cpu_count()} cores)"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for; auto takes the first GPU, else the CPU.

    Raises:
        UserError: the device is not there.
    """
    devices = available_devices()
    if name == "auto":
        return torch.device(next((key for key in devices if key != "cpu"), "cpu"))
    key = "cuda:0" if name == "cuda" else name
    if key not in devices:
        raise UserError(
            f"Device '{name}' is not there. This computer has: {', '.join(f'{key} ({title})' for key, title in devices.items())}. Choose one of these, or auto."
        )
    return torch.device(key)


def open_nets(bundle: Bundle, *, device: str, runtime: str = EXACT) -> Nets:
    """Load the nets of a bundle; weights are stored in fp16 and computed in fp32.

    Args:
        runtime: as in SegmentOptions; prepared for as many threads as torch has now.

    Raises:
        UserError: the device is not there, a runtime that was asked for by name cannot be used, or this version of torch cannot read the archives
            or goes with another numpy.
    """
    check_numpy()
    target = resolve_device(device)
    coarse, local = _loaded(bundle)
    if target.type == "cpu":
        local, choice = choose_runtime(bundle, local, runtime=runtime)
        return Nets(manifest=bundle.manifest, coarse_net=coarse, local_net=local, device=target, runtime=choice)
    try:
        coarse, local = moved(coarse, target), moved(local, target)
    except RuntimeError as error:
        reason = _reason_to_leave(error)
        logger.warning("%s %s: %s", target, reason, error)
    else:
        return Nets(manifest=bundle.manifest, coarse_net=coarse, local_net=local, device=target, on_cpu=lambda: _loaded(bundle))
    free_cached_memory(target)
    coarse, local = _loaded(bundle)
    return Nets(manifest=bundle.manifest, coarse_net=coarse, local_net=local, device=torch.device("cpu"), device_steps=[_step_to_cpu(target, reason)])


def moved(net: torch.jit.ScriptModule, device: torch.device) -> torch.jit.ScriptModule:
    """An archive that has not run yet, on a device: a trace holds the device that it was made on wherever a tensor is created, which `to` leaves (pytorch issue 145995)."""
    for module in net.modules():
        for node in module.graph.findAllNodes("prim::Constant") if hasattr(module, "forward") else ():
            if node.output().type().kind() == "DeviceObjType":
                node.s_("value", str(device))
    return net.to(device)


def read_archive(path: Path) -> torch.jit.ScriptModule:
    """A net on the CPU, in float32. The file is read here, because TorchScript opens only plain names on Windows."""
    return torch.jit.load(io.BytesIO(path.read_bytes()), map_location="cpu").float().eval()


def _loaded(bundle: Bundle) -> tuple[torch.jit.ScriptModule, torch.jit.ScriptModule]:
    """Coarse and local net on the CPU, in float32.

    Raises:
        UserError: this version of torch cannot read the archives.
    """
    try:
        return read_archive(bundle.coarse_path), read_archive(bundle.local_path)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"Torch {torch.__version__} cannot read the nets of bundle '{bundle.manifest.name}' ({reason}). Use torch 2.2 or later, or install the bundle again."
        ) from error


def thread_count(threads: int | None) -> int:
    """CPU threads of a run; None is what torch takes by itself, one for each physical core where it knows them."""
    return threads or torch.get_num_threads()


@contextmanager
def reproducible(threads: int | None) -> Iterator[None]:
    """Fixed thread count, deterministic cuDNN, products of float32 in float32; everything as before at the end.

    Args:
        threads: CPU threads; None as in thread_count.
    """
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(thread_count(threads))
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
