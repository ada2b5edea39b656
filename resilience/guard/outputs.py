"""What a forward returned, written down without pickle, and built again for a script that is led past that forward.

Plain values and small tensors are kept by value; the containers (dicts, lists, tuples, named tuples, dataclasses,
Hugging Face's `ModelOutput`) by the name of their class. What is large, or of a type that nobody here knows (a cache of
keys and values), becomes a placeholder: its shape, dtype and device may be read, any other use is refused. Never here:
files, engines, the question what happens after a refusal.
"""

from __future__ import annotations

import base64
import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from resilience.errors import SnapshotError

__all__ = ["Node", "Refuse", "decode", "encode", "tensors_in"]

Refuse = Callable[[str], NoReturn]
"""Called with the reason, in words, where the script needs what was not recorded; does not return."""

Node = list[Any]
"""A value as JSON: its kind (one letter), and what that kind needs."""

_PLAIN = (bool, int, float, str, type(None))


def encode(value: Any, *, bytes_max: int) -> tuple[Node, list[torch.Tensor]]:
    """Write down `value`.

    Args:
        value: what a forward returned.
        bytes_max: tensors up to this size are kept by value, and those of one element.

    Returns:
        The structure as JSON, and detached copies of the tensors that it refers to by their place, on their devices.
    """
    kept: list[torch.Tensor] = []
    return _encode(value, bytes_max, kept), kept


def decode(node: Node, tensors: Sequence[torch.Tensor], refuse: Refuse) -> Any:
    """Build again what `encode` wrote down.

    Args:
        node: the structure.
        tensors: the kept tensors, on the devices where the script expects them.
        refuse: called where the script uses a placeholder.

    Raises:
        SnapshotError: a class that the value is made of is not there any more, or is made in another way.
    """
    try:
        return _decode(node, tensors, refuse)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise SnapshotError(f"recorded outputs cannot be built again ({type(error).__name__}: {error})") from None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in `value`, in the order of a walk through what `encode` knows."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in _children(value) for tensor in tensors_in(item)]


# ------ writing down


def _encode(value: Any, bytes_max: int, kept: list[torch.Tensor]) -> Node:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return _encode_tensor(value, bytes_max, kept)
    if type(value) in _PLAIN:
        return ["v", value]
    if type(value) is bytes:
        return ["b", base64.b64encode(value).decode()]
    if type(value) in (torch.dtype, torch.device):
        return ["o", type(value).__name__, str(value).removeprefix("torch.")]
    kind = _kind_of(value)
    if kind == "x":
        return ["x", _name_of(type(value))]
    items = [_encode(item, bytes_max, kept) for item in _children(value)]
    if kind in ("l", "u"):
        return [kind, items]
    if kind == "n":
        return [kind, _name_of(type(value)), items]
    keys = [_encode(key, 0, kept) for key in _keys_of(value)]
    return [kind, _name_of(type(value)), keys, items]


def _encode_tensor(tensor: torch.Tensor, bytes_max: int, kept: list[torch.Tensor]) -> Node:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or (tensor.numel() != 1 and tensor.nbytes > bytes_max):
        return ["p", dtype, list(tensor.shape), str(tensor.device)]
    kept.append(tensor.detach().clone())
    return ["t", len(kept) - 1, tensor.requires_grad]


def _kind_of(value: Any) -> str:
    """The letter of a container; `x` for everything else."""
    if isinstance(value, tuple):
        return "n" if hasattr(value, "_fields") else "u" if type(value) is tuple else "x"
    if type(value) is list:
        return "l"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "D" if isinstance(value, Mapping) else "c"
    return "d" if type(value) in (dict, OrderedDict) else "x"


def _keys_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value)
    return [field.name for field in dataclasses.fields(value) if field.init]


def _children(value: Any) -> list[Any]:
    kind = _kind_of(value)
    if kind in ("l", "u", "n"):
        return list(value)
    if kind in ("d", "D"):
        return list(value.values())
    return [getattr(value, name) for name in _keys_of(value)] if kind == "c" else []


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


# ------ building again


def _decode(node: Node, tensors: Sequence[torch.Tensor], refuse: Refuse) -> Any:
    kind = node[0]
    if kind == "v":
        return node[1]
    if kind == "b":
        return base64.b64decode(node[1])
    if kind == "o":
        return torch.device(node[2]) if node[1] == "device" else getattr(torch, node[2])
    if kind == "t":
        tensor = tensors[node[1]].clone()
        return _on_the_tape(tensor) if node[2] else tensor
    if kind == "p":
        return _UnrecordedTensor(getattr(torch, node[1]), node[2], torch.device(node[3]), refuse)
    if kind == "x":
        return _Unrecorded(node[1], refuse)
    items = [_decode(item, tensors, refuse) for item in node[-1]]
    if kind in ("l", "u"):
        return items if kind == "l" else tuple(items)
    made_of = _class_of(node[1])
    if kind == "n":
        return made_of(*items)
    pairs = dict(zip([_decode(key, tensors, refuse) for key in node[2]], items, strict=True))
    return made_of(pairs) if kind == "d" else made_of(**pairs)


def _class_of(name: str) -> Any:
    """A class that the script has imported already; nothing is imported on a file's word."""
    module, _, path = name.partition(":")
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not (issubclass(found, (dict, tuple)) or dataclasses.is_dataclass(found)):
        raise TypeError(f"{name} is no container")
    return found


def _on_the_tape(value: torch.Tensor) -> torch.Tensor:
    """`value` as an output of a forward: it has a graph, and a backward pass through it does nothing."""
    anchor = torch.zeros((), requires_grad=True)
    led: torch.Tensor = _Led.apply(anchor, value)  # type: ignore[no-untyped-call]
    return led


class _Led(torch.autograd.Function):
    """Hands out a recorded value; takes gradients and drops them."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None


class _UnrecordedTensor(torch.Tensor):
    """A tensor without values."""

    _refuse: Refuse

    @staticmethod
    def __new__(
        cls, dtype: torch.dtype, shape: Sequence[int], device: torch.device, refuse: Refuse
    ) -> _UnrecordedTensor:
        made: _UnrecordedTensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made._refuse = refuse
        return made

    def __init__(self, *_: Any) -> None:
        """Made whole by `__new__`."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<values not recorded, {self.dtype}, shape {tuple(self.shape)}>"

    def __reduce_ex__(self, _: Any) -> Any:
        self._refuse_to("save")

    def __deepcopy__(self, _: Any) -> Any:
        return self

    def numpy(self, **_: Any) -> Any:
        self._refuse_to("convert")

    def tolist(self) -> Any:
        self._refuse_to("convert")

    def data_ptr(self) -> Any:
        self._refuse_to("read")

    def _refuse_to(self, what: str) -> NoReturn:
        self._refuse(
            f"the script uses an output of the model that was too large to be recorded "
            f"(shape {tuple(self.shape)}, {self.dtype}; it wants to {what} it)"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = next(value for value in _arguments(args, kwargs) if isinstance(value, _UnrecordedTensor))
        if function not in _HARMLESS:
            first._refuse_to(str(function).removeprefix("aten."))
        return _UnrecordedTensor(first.dtype, first.shape, first.device, first._refuse)


_HARMLESS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _arguments(args: Any, kwargs: Any) -> list[Any]:
    """Arguments of an operation, lists among them opened."""
    values = [*args, *(kwargs or {}).values()]
    return [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]


class _Unrecorded:
    """A value of a type that nobody here knows."""

    def __init__(self, name: str, refuse: Refuse) -> None:
        self.__dict__.update(_name=name, _refuse=refuse)

    def _refuse_it(self, *_: Any) -> NoReturn:
        self.__dict__["_refuse"](
            f"the script uses an output of the model whose type is not recorded ({self.__dict__['_name']})"
        )
        raise AssertionError("a refusal returned")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            self._refuse_it()
        # Questions of the interpreter and of libraries: whether it is an array, and the like.
        raise AttributeError(name)

    __len__ = __iter__ = __getitem__ = __bool__ = __call__ = __contains__ = __reduce_ex__ = _refuse_it
