"""A pretend accelerator, `pretend`: it computes on the CPU, but keeps its tensors apart from the host's as a GPU does.

Code that mixes the two raises RuntimeError, as on CUDA, and `waits` counts the calls in which a GPU's host would wait until
the GPU has done all its work. Importing this module registers the device for the rest of the process, so import it before
nanorlhf. It needs torch.utils.backend_registration._setup_privateuseone_for_python_backend, which older versions of torch lack.

    python tests/pretend_device.py train_dpo.py --device pretend --max_steps 2        runs a script and prints its waits
    python tests/pretend_device.py -m nanorlhf.evaluate RUN --device pretend          likewise a module

It has no streams, no autocast and no memory of its own, so it says nothing about races, dtypes or memory.
"""

import collections
import runpy
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

waits = collections.Counter()                     # {what waited: how often}
READS = {"_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "masked_select", "equal": "equal",
         "_unique2": "unique", "repeat_interleave": "repeat_interleave", "bincount": "bincount"}  # sizes or values for the host
COPIES = {"_to_copy", "copy_", "_copy_from"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Pretend(torch.Tensor):
    """A tensor on the device. `values` is the host's tensor that holds its numbers; the two share size and strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        self = torch.Tensor._make_wrapper_subclass(cls, values.size(), strides=values.stride(), dtype=values.dtype,
                                                   storage_offset=values.storage_offset(), device=torch.device("pretend", 0))
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return execute(op, args, kwargs or {})

    def __getitem__(self, index):                 # torch makes a tensor of a list and sends it up, in a way that fails here
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(i, device="pretend") if isinstance(i, list) else i for i in index))

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the device to numpy: use Tensor.cpu() first")

    def __repr__(self):
        return f"Pretend({self.values})"


def on_host(x):
    return isinstance(x, torch.Tensor) and not isinstance(x, Pretend)


def execute(op, args, kwargs):
    """Runs one operation with an operand or a result on the device: checks it, counts what waits, computes on the CPU."""
    name, tensors = op.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name in COPIES:
        to_host = on_host(args[0]) if name == "copy_" else "cpu" in str(kwargs.get("device", ""))
        source = args[1] if name == "copy_" else args[0]
        if to_host != on_host(source) and not (on_host(source) and (kwargs.get("non_blocking") or args[2:] == (True,))):
            waits["to the host" if to_host else "to the device"] += 1
    else:
        indices = [x for x in args[1] if x is not None] if name in INDEXING else []
        for x in tensors:                         # CUDA takes the host's scalars as operands, and copies its indices
            scalar = x.dim() == 0 and name not in ("stack", "cat")
            if on_host(x) and not scalar and (on_host(args[0]) or not any(x is i for i in indices)):
                raise RuntimeError(f"{op}: expected all tensors on one device, found one of the host, {tuple(x.shape)}")
        filled = name.startswith("index_put") and args[2].dim() == 0                   # x[mask] = number is masked_fill
        if any(map(on_host, indices)):
            waits["index by the host's tensor"] += 1
        if not filled and any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            waits["index by a mask"] += 1
        if name in READS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            waits[READS[name]] += 1
        to_host = False
    args_, kwargs_ = tree_map(lambda x: x.values if isinstance(x, Pretend) else x, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs_["device"] = torch.device("cpu")
    result = op(*args_, **kwargs_)
    if "out" in kwargs or op._schema.is_mutable and name.endswith("_"):                # the operand itself has changed
        return kwargs.get("out", args[0])
    return result if to_host else tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) else x, result)


class Module(backend_registration._DummyBackendModule):
    """What torch.get_device_module("pretend") returns."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def synchronize(self, device=None):
        pass


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=Module())
library = torch.library.Library("_", "IMPL")      # it lives as long as this variable
library.fallback(lambda op, *args, **kwargs: execute(op, args, kwargs), "PrivateUse1")
library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")              # autocast changes nothing


def replaced(module, name):
    """Decorator: puts a function in the place of module.name, which it gets as its first argument."""
    old = getattr(module, name)
    return lambda new: setattr(module, name, lambda *args, **kwargs: new(old, *args, **kwargs))


@replaced(torch, "tensor")
def tensor(old, data, device=None, **kwargs):
    return old(data, **kwargs) if device is None else old(data, **kwargs).to(device)


@replaced(safetensors.torch, "save_file")
def save_file(old, tensors, *args, **kwargs):
    return old({k: v.cpu() for k, v in tensors.items()}, *args, **kwargs)


@replaced(safetensors.torch, "load_file")
def load_file(old, file, device="cpu"):
    return {k: v.to(device) for k, v in old(file).items()}


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    as_module, sys.argv = sys.argv[1] == "-m", sys.argv[2 if sys.argv[1] == "-m" else 1:]
    try:
        (runpy.run_module if as_module else runpy.run_path)(sys.argv[0], run_name="__main__")
    finally:
        print("waits:", dict(waits.most_common()))
