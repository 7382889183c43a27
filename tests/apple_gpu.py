"""An Apple GPU as far as a machine without one can have it: `mps` tensors that compute on the CPU, by the GPU's rules.

It has no float64, none of the operations for which PyTorch has no kernel there (by the table that it was built from),
no random numbers that equal the host's, and does not mix its tensors with those of the host, but with their numbers.
To PyTorch's C++ its tensors are on `meta:1`. What is computed is what the CPU computes, so results are equal to the
bit where both take the same form of attention: that of the CPU is to run inside `sdpa_kernel(SDPBackend.MATH)`, too.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from lightning.fabric.accelerators import MPSAccelerator
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, IN_CPP = torch.device("mps:0"), torch.device("meta:1")
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._unsafe_index_put.default}
"""Their indices may be on the host."""
EMPTY = {ATEN.empty.memory_format, ATEN.empty_strided.default, ATEN.empty_like.default, ATEN.new_empty.default}


class AppleTensor(Tensor):
    """A tensor of the GPU, whose numbers a tensor of the host holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> AppleTensor:
        sizes = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.size(), device=IN_CPP, **sizes)  # type: ignore[no-any-return]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_mps = property(lambda self: True)  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu()")

    def __repr__(self, **options: Any) -> str:
        return f"mps {self.held}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, *arguments: Any) -> Any:
        raise RuntimeError(f"{function} outside of apple_gpu()")


class _Devices(TorchFunctionMode):
    """What is asked for on `mps` is asked for on `meta:1`."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.device, torch._C._nn._parse_to):
            return function(*args, **(kwargs or {}))

        def moved(value: Any) -> Any:
            return IN_CPP if isinstance(value, torch.device) and value.type == "mps" else value

        args, kwargs = tree_map(moved, (args, dict(kwargs or {})))
        if str(kwargs.get("device")) in ("mps", "mps:0"):
            kwargs["device"] = IN_CPP
        if function is Tensor.to and str(args[1:2]) in ("('mps',)", "('mps:0',)"):
            args = (args[0], IN_CPP, *args[2:])
        if function is Tensor.new_tensor and isinstance(args[0], AppleTensor):
            function, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": IN_CPP, **kwargs}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == IN_CPP:  # which has no numbers
            return function(*args, **{**kwargs, "device": None}).to(IN_CPP)
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            place = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in place), *args[2:])
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Operations on the GPU, which break its rules or are done on the host."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        own, made = [tensor for tensor in tensors if isinstance(tensor, AppleTensor)], kwargs.get("device") == IN_CPP
        if not own and not made:
            return function(*args, **kwargs)
        if function.namespace != "aten":  # ours, made of others
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        _check(function, tensors, kwargs)
        stays = made or kwargs.get("device") is None
        if made:
            kwargs["device"] = torch.device("cpu")
        if "found_inf" in kwargs:  # PyTorch's kernel for this GPU does not look at it
            kwargs["found_inf"] = None
        known: dict[int, Tensor] = {id(tensor.held): tensor for tensor in own}
        out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if function in EMPTY:
            out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(torch.uint8).max)
        return tree_map(lambda value: _on_gpu(value, known) if stays else value, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, AppleTensor) else value


def _on_gpu(value: Any, known: Mapping[int, Tensor]) -> Any:
    """A result as a tensor of the GPU, the same one where an operation was in place."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    if id(value) in known:
        return known[id(value)]
    return AppleTensor(value.resolve_conj().resolve_neg())  # of bits that wrappers do not carry


def _check(function: Any, tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
    """Raise an error for what the GPU does not do."""
    if not _has_kernel(function._schema.name.removeprefix("aten::"), function._overloadname):
        raise NotImplementedError(f"The operator '{function}' is not currently implemented for the MPS device")
    if torch.Tag.nondeterministic_seeded in function.tags:
        raise RuntimeError(f"{function} draws other numbers on this device than on the host")
    foreign = [tensor for tensor in tensors if not isinstance(tensor, AppleTensor)]
    if function in COPIES:
        if torch.float64 in (kwargs.get("dtype"), *(tensor.dtype for tensor in tensors)):
            raise TypeError(f"{function} would convert to or from float64 on a device that has none")
    elif function not in INDEXED and any(tensor.ndim for tensor in foreign):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} found cpu and mps:0")
    elif any(tensor.dtype == torch.float64 for tensor in foreign):
        raise TypeError(f"{function} with a number in float64, which this device does not have")


@functools.cache
def _has_kernel(name: str, overload: str) -> bool:
    """Whether PyTorch has a form of an operation for this GPU."""
    own = _table().get(f"{name}.{overload}" if overload != "default" else name)
    if own is None:
        return False
    if made_by := re.search(r"structured_delegate: (\S+)", own):
        return _has_kernel(*made_by[1].split("."))
    return bool(re.search(r"\b(MPS|Composite\w+)\b", own)) or "dispatch:" not in own


@functools.cache
def _table() -> dict[str, str]:
    """Of native_functions.yaml, which names the kernels of each operation: {operation: its entry}."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = re.split(r"^- func: ", file.read_text(), flags=re.MULTILINE)[1:]
    return {entry.partition("(")[0]: entry for entry in entries}


class _Event:
    """A mark among the work of the GPU, which is never behind."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end.time - self.time)


@contextmanager
def apple_gpu() -> Iterator[None]:
    """Within this context `mps` is the GPU, as which Lightning takes it, too."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH), _Devices(), _Operations():
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
        patch.setattr(torch.mps, "synchronize", lambda: None)
        patch.setattr(torch.mps, "recommended_max_memory", lambda: 8 * 10**9)
        patch.setattr(torch.mps, "Event", _Event)
        patch.setattr(torch, "inference_mode", torch.no_grad)  # which wrappers cannot be in
        yield
