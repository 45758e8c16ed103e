"""A second device where there is no GPU: to PyTorch it is not the CPU, yet it computes with the CPU's kernels, on the CPU's memory.

Tensors on it are PyTorch's own, with the key of a device that PyTorch lets others add. So NumPy refuses them as it refuses a GPU's, and
every operation comes to `computed`, which refuses what CUDA refuses: tensors of two devices, but for numbers without dimensions and
indices, and the CPU's generators. It has no streams, graphs, memory counters or compiler. A process that imports this keeps the device.
"""

import functools

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
CPU = torch.device("cpu")
PLAIN = (int, float, torch.dtype)  # arguments that are no tensors, nor lists of them
Key, Keys = torch._C.DispatchKey, torch._C.DispatchKeySet
# Where CUDA takes no number from the CPU, though it has no dimensions; and what takes tensors of the CPU.
STRICT = {"cat", "mm", "bmm", "addmm", "baddbmm", "dot", "mv", "embedding", "gather", "scatter_add", "index_select", "equal"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Module(_DummyBackendModule):
    """What stands at torch.pretended."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, Module())
THERE = torch.device(NAME, 0)
place = torch.ops.aten.set_.source_Storage_storage_offset


def at(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    """The same bytes on another device; they live as long as they are seen there."""
    if device == CPU and hasattr(storage, "kept"):
        return storage.kept
    new = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), device, storage.nbytes())
    new.kept = storage
    return new


def seen(x: torch.Tensor, device: torch.device, storage: torch.UntypedStorage | None = None) -> torch.Tensor:
    """The same memory as a tensor of another device."""
    empty = torch.empty(0, dtype=x.dtype) if device == CPU else torch._C._acc.create_empty_tensor([0], x.dtype)
    return placed(empty, storage or at(x.untyped_storage(), device), x)


def placed(target, storage, like):
    return place.redispatch(Keys(Key.CPU), target, storage, like.storage_offset(), like.shape, like.stride())


@functools.cache
def known(op):
    """Its name, its arguments, and which of them it writes."""
    arguments = {a.name: a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments}
    return op._schema.name.removeprefix("aten::"), list(arguments), arguments


def check(op, argument: str, x) -> None:
    """Refuse a tensor or a generator of the CPU, where CUDA does."""
    name, _, written = known(op)
    if isinstance(x, torch.Generator):
        raise RuntimeError(f"{op}: expected a generator of {NAME}, not of {x.device}")
    is_free = name in INDEXED and argument == "indices" or isinstance(x, torch.Tensor) and not x.dim() and name not in STRICT
    if isinstance(x, torch.Tensor) and (written[argument] or not is_free):
        raise RuntimeError(f"{op}: expected all tensors on the same device; {argument} {tuple(x.shape)} is on {x.device}")


def computed(op, *args, **kwargs):
    """Any operation: checked, done on the CPU, and given back as tensors of this device; views stay views."""
    ours, devices = [], []

    def down(argument, x):
        if isinstance(x, PLAIN) or (isinstance(x, (list, tuple)) and x and isinstance(x[0], PLAIN)):
            return x
        if isinstance(x, (list, tuple)):
            return type(x)(down(argument, y) for y in x)
        if isinstance(x, torch.Tensor) and x.device == THERE:
            below = seen(x, CPU) if x.untyped_storage().nbytes() else torch.empty(x.shape, dtype=x.dtype)
            ours.append((x, below, below.untyped_storage()))
            return below
        if isinstance(x, torch.device):
            devices.append(x)
            return CPU
        check(op, argument, x)
        return x

    def up(x):
        if isinstance(x, torch.Tensor) and CPU not in devices:
            owner = None
            for whole, below, storage in ours:
                if below is x:
                    return whole
                owner = whole.untyped_storage() if storage._cdata == x.untyped_storage()._cdata else owner
            return seen(x, THERE, owner)
        return type(x)(map(up, x)) if isinstance(x, (list, tuple)) else x

    below = [down(argument, x) for argument, x in zip(known(op)[1], args)]
    out = op(*below, **{argument: down(argument, x) for argument, x in kwargs.items() if argument != "pin_memory"})
    for x, b, storage in ours:  # what was empty may have been given memory
        if (b.untyped_storage()._cdata, b.shape, b.stride()) != (storage._cdata, x.shape, x.stride()):
            placed(x, at(b.untyped_storage(), THERE), b)
    return up(out)


def resized(x, size, memory_format=None):
    """What is written anew afterwards."""
    fresh = torch.empty(size, dtype=x.dtype)
    return x if x.shape == fresh.shape else placed(x, at(fresh.untyped_storage(), THERE), fresh)


def copied(self, source, non_blocking=False):
    """From one device to another."""
    a, b = (seen(x, CPU) if x.device == THERE else x for x in (self, source))
    a.copy_(b)
    return self


@functools.partial(setattr, torch.UntypedStorage, "__deepcopy__")
def deepcopied(self, memo, plain=torch.UntypedStorage.__deepcopy__):
    """Of buffers and plain tensors."""
    if self.device != THERE:
        return plain(self, memo)
    return memo.setdefault(("storage", self._cdata), at(at(self, CPU).clone(), THERE))


ANY, ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")  # they register as long as they live
ANY.fallback(computed, "PrivateUse1")
ANY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for op in (place, torch.ops.aten.set_.source_Storage, torch.ops.aten.set_.source_Tensor):
    ATEN.impl(op.name(), functools.partial(op.redispatch, Keys(Key.CPU)), "PrivateUse1")
ATEN.impl("resize_", resized, "PrivateUse1")
ATEN.impl("copy_", copied, "PrivateUse1")
ATEN.impl("_copy_from", lambda source, target, _=False: copied(target, source), "PrivateUse1")
ATEN.impl("convolution_overrideable", functools.partial(computed, torch.ops.aten.convolution.default), "PrivateUse1")
back = torch.ops.aten.convolution_backward.default
ATEN.impl("convolution_backward_overrideable", lambda d, x, w, *o: computed(back, d, x, w, None, *o), "PrivateUse1")
