"""A second device on a machine that has only one, as far as Python can tell."""

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CPU, SECOND = torch.device("cpu"), torch.device("cuda:1")
MOVES = ("to", "cpu")
ACROSS = ("copy_", "__set__", "__deepcopy__", *MOVES)  # functions that take tensors of several devices


class SecondDevice(TorchFunctionMode):
    """While it is active, every storage is on the CPU or on `SECOND`, and operators on tensors of both fail.

    Only what Python calls is checked, not what happens inside of an operator or in a backward pass.
    """

    def __init__(self):
        super().__init__()
        self._storages = {}  # device and storage, which stays alive so that its number is not given to another

    def put(self, *modules: nn.Module):
        """Move modules to the second device."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._put(tensor, SECOND)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if issubclass(type(x), Tensor)]
        if any(issubclass(type(x), fx.Proxy) for x in leaves):
            return function(*args, **kwargs)
        if function == Tensor.device.__get__:
            return self._device(args[0])
        result_device = self._asked(name, args, kwargs)
        if result_device == SECOND:
            assert kwargs.get("generator") is None, f"{name}: a generator of the CPU draws on another device"
            kwargs.pop("device", None)
        if name in MOVES and result_device is not None and result_device.type != "meta":
            args = tuple(CPU if issubclass(type(x), torch.device | str) else x for x in args)
            kwargs["copy"] = self._device(tensors[0]) != result_device
            function = Tensor.to
            args = args if name == "to" else (*args, CPU)
        if name.startswith("_foreach_"):  # one call for each place in the lists
            return self._many(name, function, args, kwargs)
        result_device = result_device or self._common(name, tensors)
        result = function(*args, **kwargs)
        for x in pytree.tree_leaves(result):
            if issubclass(type(x), Tensor) and not x.is_meta and x.layout is torch.strided:
                known = x.untyped_storage()._cdata in self._storages
                if not known or name == "__get__":  # the backward pass does not say where it leaves gradients
                    self._put(x, result_device)
        return result

    def _many(self, name, function, args, kwargs):
        lists = [x for x in args if isinstance(x, list | tuple)]
        devices = [
            self._common(name, [x for x in place if issubclass(type(x), Tensor)]) for place in zip(*lists, strict=True)
        ]
        result = function(*args, **kwargs)
        for x, device in zip(result or (), devices, strict=False):
            if x.untyped_storage()._cdata not in self._storages:
                self._put(x, device)
        return result

    def _asked(self, name, args, kwargs) -> torch.device | None:
        """The device that a call names."""
        asked = [kwargs.get("device"), *(args[1:] if name == "to" else ())]
        found = [torch.device(x) for x in asked if issubclass(type(x), torch.device | str)]
        found += [self._device(x) for x in asked if issubclass(type(x), Tensor)]
        return CPU if name == "cpu" else next(iter(found), None)

    def _common(self, name, tensors) -> torch.device:
        """The device of tensors that a call puts together; numbers of the CPU go with all."""
        if name in ACROSS:
            tensors = tensors[:1]
        if name in ("__getitem__", "__setitem__"):  # the CPU may say what to index
            tensors = [x for i, x in enumerate(tensors) if i == 0 or self._device(x) != CPU]
        takes_numbers = name not in ("stack", "cat")
        devices = {self._device(x) for x in tensors if x.dim() or self._device(x) != CPU or not takes_numbers}
        devices.discard(torch.device("meta"))
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {devices}")
        return next(iter(devices), CPU)

    def _device(self, tensor) -> torch.device:
        if tensor.is_meta:
            return torch.device("meta")
        return self._storages.get(tensor.untyped_storage()._cdata, (CPU, None))[0]

    def _put(self, tensor, device):
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = device, storage
