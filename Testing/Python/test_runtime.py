"""Devices, archives, and what happens when a GPU runs out of memory; a meta tensor stands for one on a GPU."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from NMSWSegment.engine.runtime import Nets, OutOfMemory, available_devices, memory_explained, open_nets, reproducible, resolve_device, without_padding
from NMSWSegment.engine.selection import LEAST_ENTROPY, log_entropy
from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.protocol import UserError

TORCHSCRIPT_MESSAGE = (
    "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript (most recent call last):\n"
    "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
)

TWO_CLASSES = SimpleNamespace(name="two classes", num_classes=2)


class FullOffCpu(torch.nn.Module):
    """A net that fits on the CPU only: two classes, background minus x and x."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.calls = []

    def forward(self, x):
        self.calls.append(x.device.type)
        if x.device.type != "cpu":
            raise self.error
        return torch.cat([-x, x], dim=1)


def nets_on_full_gpu(error: Exception) -> tuple[Nets, FullOffCpu]:
    local = FullOffCpu(error)
    coarse = torch.nn.Identity()
    return Nets(manifest=TWO_CLASSES, coarse_net=coarse, local_net=local, device=torch.device("meta"), on_cpu=lambda: (coarse, local)), local


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("Small GPU", "Large GPU")[index])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_devices_without_gpu_are_the_cpu(no_gpu):
    assert list(available_devices()) == ["cpu"]
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_devices_with_gpus_are_named(two_gpus):
    assert list(available_devices().items())[1:] == [("cuda:0", "Small GPU"), ("cuda:1", "Large GPU")]
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_missing_device_lists_what_is_there(two_gpus):
    with pytest.raises(UserError, match=r"'cuda:2' is not there.*cpu \(CPU.*cuda:1 \(Large GPU\).*Choose one of these, or auto"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(TORCHSCRIPT_MESSAGE),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("Invalid buffer size: 12.34 GB"),
    ],
)
def test_out_of_memory_moves_the_nets_to_the_cpu_for_good(error):
    # An archive raises a plain RuntimeError where eager torch raises OutOfMemoryError (pytorch issue 148642).
    nets, local = nets_on_full_gpu(error)
    patch = torch.arange(24.0).reshape(1, 2, 3, 4)
    for _ in range(2):
        assert torch.equal(nets.local(patch), torch.stack([-patch, patch], dim=1))
    assert local.calls == ["meta", "cpu", "cpu"] and nets.batch_size == 1
    assert nets.device == torch.device("cpu")
    assert nets.device_steps == ["meta ran out of memory; the nets went on with the CPU"]


def test_missing_operator_on_mps_moves_the_nets_to_the_cpu():
    nets, local = nets_on_full_gpu(NotImplementedError("The operator 'aten::slow_conv_transpose3d' is not currently implemented for the MPS device."))
    patches = torch.arange(48.0).reshape(2, 2, 3, 4)
    assert torch.equal(nets.local(patches), torch.stack([-patches, patches], dim=1))
    assert nets.device_steps == ["meta lacks an operator of the nets; the nets went on with the CPU"]


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
            "is not supported by this build of torch",
        ),
        ("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later", "failed (CUDA error: unspecified launch failure)"),
        (
            "The following operation failed in the TorchScript interpreter.\nRuntimeError: Expected all tensors to be on the same device",
            "failed (Expected all tensors to be on the same device)",
        ),
        ("", "failed (RuntimeError)"),
    ],
)
def test_a_gpu_that_fails_in_any_other_way_leaves_the_run_to_the_cpu(error, step):
    nets, local = nets_on_full_gpu(RuntimeError(error))
    patch = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(nets.local(patch), torch.stack([-patch, patch], dim=1))
    assert nets.device_steps == [f"meta {step}; the nets went on with the CPU"] and local.calls == ["meta", "cpu"]


def test_an_error_that_the_cpu_makes_too_is_passed_on():
    def broken(*inputs):
        raise RuntimeError("shape mismatch")

    nets = Nets(manifest=TWO_CLASSES, coarse_net=broken, local_net=broken, device=torch.device("meta"), on_cpu=lambda: (broken, broken))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        nets.local(torch.zeros(1, 2, 3, 4))


class DeviceWatch(TorchDispatchMode):
    """Operations that mix devices, which a GPU refuses and meta tensors allow."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        tensors = [one for one in [*arguments, *(options or {}).values()] if isinstance(one, torch.Tensor) and one.dim()]
        if len({one.device for one in tensors}) > 1 and "type_as" not in str(operation):
            self.mixed.append(f"{operation} of {[(tuple(one.shape), one.device.type) for one in tensors]}")
        return operation(*arguments, **(options or {}))


def with_weights_on(net: torch.jit.ScriptModule, device: torch.device) -> torch.jit.ScriptModule:
    """As net.to(device), which does not move an archive to meta."""
    for module in net.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            module._c.setattr(name, value.to(device))
    return net


def mixed_devices(bundle: Bundle, monkeypatch) -> list[str]:
    """What the nets of a bundle do on a GPU, for which meta tensors stand, with tensors of the CPU."""
    monkeypatch.setattr(torch.jit.RecursiveScriptModule, "to", with_weights_on)
    monkeypatch.setattr("NMSWSegment.engine.runtime.resolve_device", lambda name: torch.device("meta"))
    nets, manifest = open_nets(bundle, device="meta"), bundle.manifest
    patch = torch.zeros(1, 1, *manifest.patch_size, device="meta")
    parts = [length // factor for length, factor in zip(manifest.patch_size, manifest.coarse_factor)]
    inputs = (patch, torch.zeros(1, manifest.num_classes, *parts, device="meta")) if manifest.is_cascade else (patch,)
    with torch.inference_mode(), DeviceWatch() as watch:
        logits = nets.local_net(*inputs)
        coarse_logits, importance_map = nets.coarse_net(torch.zeros(1, 1, *[2 * manifest.coarse_multiple] * 3, device="meta"))
    assert {one.device.type for one in (logits, coarse_logits, importance_map)} == {"meta"}
    return watch.mixed


@pytest.mark.parametrize("name", ["torso-unet", "torso-unet-fine", "torso-mednext", "torso-swinunetr", "torso-e2enet"])
def test_packaged_nets_run_on_a_gpu_with_nothing_left_on_the_cpu(name, monkeypatch):
    assert mixed_devices(load_bundle(name), monkeypatch) == []


def test_nets_that_do_not_fit_on_the_gpu_are_opened_on_the_cpu(a_tiny_bundle, monkeypatch):
    monkeypatch.setattr("NMSWSegment.engine.runtime.resolve_device", lambda name: torch.device("cuda:0"))

    def full(net, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("NMSWSegment.engine.runtime.moved", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    nets = open_nets(load_bundle(a_tiny_bundle), device="cuda")
    assert nets.device == torch.device("cpu") and nets.batch_size == 1
    assert nets.device_steps == ["cuda:0 ran out of memory; the nets went on with the CPU"]
    assert nets.coarse(torch.rand(1, 1, 4, 4, 4))[0].shape == (4, 4, 4, 4)


def test_nets_that_cannot_move_pass_on_what_the_gpu_says():
    def full(*inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    nets = Nets(manifest=TWO_CLASSES, coarse_net=full, local_net=full, device=torch.device("meta"))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        nets.local(torch.zeros(4, 2, 3, 4))
    assert nets.batch_size == 1  # smaller batches were tried first


def test_out_of_memory_on_the_cpu_is_passed_on():
    def full(x):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")

    nets = Nets(manifest=TWO_CLASSES, coarse_net=full, local_net=full, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not enough memory"):
        nets.local(torch.zeros(1, 2, 3, 4))
    assert nets.device_steps == []


class NetsWithoutTransfer(Nets):
    """Nets of a GPU that is not there: nothing is moved to it."""

    def _call(self, name, x):
        return getattr(self, name)(x)


class FitsOnly(torch.nn.Module):
    """A net on a GPU with room for so many patches at once: two classes, background minus x and x."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        if len(x) > self.room:
            raise RuntimeError(TORCHSCRIPT_MESSAGE)
        return torch.cat([-x, x], dim=1)


def nets_with_room(room: int, monkeypatch) -> tuple[Nets, FitsOnly, list[str]]:
    local, freed, coarse = FitsOnly(room), [], torch.nn.Identity()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cuda"))

    def on_cpu():
        local.room = 99
        return coarse, local

    return NetsWithoutTransfer(manifest=TWO_CLASSES, coarse_net=coarse, local_net=local, device=torch.device("cuda:0"), on_cpu=on_cpu), local, freed


@pytest.mark.parametrize(
    ("room", "calls", "steps", "device"),
    [
        (4, [4, 3], [], "cuda:0"),
        (3, [4, 2, 2, 2, 1], ["cuda:0 ran out of memory; the batch went from 4 to 2"], "cuda:0"),
        (
            1,
            [4, 2, 1, 1, 1, 1, 1, 1, 1],
            ["cuda:0 ran out of memory; the batch went from 4 to 2", "cuda:0 ran out of memory; the batch went from 2 to 1"],
            "cuda:0",
        ),
        (
            0,
            [4, 2, 1, 1, 1, 1, 1, 1, 1, 1],
            [
                "cuda:0 ran out of memory; the batch went from 4 to 2",
                "cuda:0 ran out of memory; the batch went from 2 to 1",
                "cuda:0 ran out of memory; the nets went on with the CPU",
            ],
            "cpu",
        ),
    ],
)
def test_gpu_without_room_for_a_batch_gets_smaller_ones_and_every_patch_its_own_answer(monkeypatch, room, calls, steps, device):
    nets, local, freed = nets_with_room(room, monkeypatch)
    patches = torch.arange(7.0 * 24).reshape(7, 2, 3, 4)
    answer = torch.cat([nets.local(patches[:4]), nets.local(patches[4:])])
    assert torch.equal(answer, torch.stack([-patches, patches], dim=1))
    assert local.calls == calls and nets.device_steps == steps
    assert str(nets.device) == device and freed == ["cuda"] * len(steps)


def test_gpu_that_answers_nothing_any_more_leaves_the_run_to_the_cpu(monkeypatch):
    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    nets, _, _ = nets_with_room(0, monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", dead)
    patch = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(nets.local(patch), torch.stack([-patch, patch], dim=1))
    assert nets.device == torch.device("cpu")


def test_batch_size_is_one_on_the_cpu_and_four_on_a_gpu():
    for device, batch_size in (("cpu", 1), ("cuda:1", 4), ("mps", 4)):
        assert Nets(manifest=TWO_CLASSES, coarse_net=None, local_net=None, device=torch.device(device)).batch_size == batch_size


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.5 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000 bytes."),
        RuntimeError(
            "The following operation failed in the TorchScript interpreter.\nRuntimeError: DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
        ),
    ],
)
def test_lack_of_memory_names_the_volume_and_the_way_out(error):
    with pytest.raises(OutOfMemory, match="volume of 512 x 500 x 90 voxels. Crop the volume, or close other programs"), memory_explained((90, 500, 512)):
        raise error


def test_real_lack_of_memory_is_recognized():
    with pytest.raises(OutOfMemory), memory_explained((1, 1, 1)):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(OutOfMemory), memory_explained((1, 1, 1)):
        np.empty(1 << 60, dtype=np.uint8)


def test_other_errors_are_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape mismatch"), memory_explained((1, 1, 1)):
        raise RuntimeError("shape mismatch")


def test_archives_are_stored_in_half_and_computed_in_single_precision(a_tiny_bundle):
    nets = open_nets(load_bundle(a_tiny_bundle), device="cpu")
    assert {parameter.dtype for parameter in torch.jit.load(str(a_tiny_bundle / "local.pt")).parameters()} == {torch.float16}
    assert {parameter.dtype for net in (nets.coarse_net, nets.local_net) for parameter in net.parameters()} == {torch.float32}
    logits, importance_map = nets.coarse(torch.rand(1, 1, 4, 5, 6))
    assert logits.shape == (4, 4, 5, 6) and importance_map.shape == (4, 5, 6)
    assert logits.dtype == importance_map.dtype == nets.local(torch.rand(1, 4, 5, 6)).dtype == torch.float32
    assert not logits.requires_grad


def test_nets_are_read_where_torchscript_cannot_open_the_path(a_tiny_bundle, monkeypatch):
    monkeypatch.delattr(torch._C, "import_ir_module")  # what opens a path
    assert open_nets(load_bundle(a_tiny_bundle), device="cpu").local(torch.rand(1, 4, 5, 6)).dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"not a net", None])
def test_unreadable_archive_says_what_to_install(a_tiny_bundle, tmp_path, content):
    folder = shutil.copytree(a_tiny_bundle, tmp_path / "tiny")
    archive = folder / "local.pt"
    archive.write_bytes(archive.read_bytes()[:500] if content is None else content)
    bundle = Bundle(folder=folder, manifest=load_bundle(a_tiny_bundle).manifest, sha256="")
    with pytest.raises(UserError, match=r"cannot read the nets of bundle 'tiny'.*Use torch 2\.2 or later"):
        open_nets(bundle, device="cpu")


def test_torch_that_was_built_for_an_older_numpy_says_what_to_install(a_tiny_bundle, monkeypatch):
    def no_numpy(tensor):
        raise RuntimeError("Numpy is not available")  # torch 2.2.2 beside numpy 2

    monkeypatch.setattr(torch.Tensor, "numpy", no_numpy)
    with pytest.raises(UserError, match=r'built for numpy 1.*slicer\.util\.pip_install\("numpy<2"\) and restart.*pip install "numpy<2"'):
        open_nets(load_bundle(a_tiny_bundle), device="cpu")


def test_reproducible_gives_everything_back_even_after_an_error():
    threads, flags = torch.get_num_threads(), (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    with pytest.raises(KeyError), reproducible(2):
        assert torch.get_num_threads() == 2 and torch.backends.cudnn.deterministic
        raise KeyError
    assert torch.get_num_threads() == threads
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == flags


def test_default_threads_are_those_that_torch_takes_by_itself():
    before = torch.get_num_threads()
    with reproducible(None):
        assert torch.get_num_threads() == before


def test_padding_of_the_coarse_net_is_taken_out_without_a_copy():
    full = torch.randn(5, 8, 6, 7)
    expected = full[:, :5, :6, :4].clone()
    found = without_padding(full[:, :5, :6, :4])
    assert found.is_contiguous() and torch.equal(found, expected) and found.data_ptr() == full.data_ptr()
    whole = torch.randn(3, 4, 4, 4)
    assert without_padding(whole) is whole
    channels_last = torch.randn(4, 6, 6, 3).permute(3, 0, 1, 2)[:, :2]
    assert torch.equal(without_padding(channels_last), channels_last.contiguous())


@pytest.mark.parametrize("num_classes", [2, 25, 118])
def test_entropy_in_parts_is_that_of_the_whole_bit_for_bit(num_classes):
    logits = torch.randn(1, num_classes, 23, 31, 29) * 5  # 20677 voxels: more than one part, and no multiple of a vector
    log_probabilities = torch.log_softmax(logits, dim=1)
    whole = torch.log(-(log_probabilities.exp() * log_probabilities).sum(1, keepdim=True) + LEAST_ENTROPY)
    assert torch.equal(log_entropy(logits), whole)


@pytest.mark.parametrize("kept", [(3, 6, 8), (5, 4, 8), (5, 6, 7), (2, 3, 4), (5, 6, 8)])  # padded along each axis alone, along all, and not at all
def test_logits_without_padding_are_the_corner_in_memory_of_their_own(kept):
    padded = torch.randn(4, 5, 6, 8)
    expected = padded[(slice(None), *map(slice, kept))].clone()
    found = without_padding(padded[(slice(None), *map(slice, kept))])
    assert torch.equal(found, expected) and found.is_contiguous()
