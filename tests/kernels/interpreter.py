"""Triton's interpreter for kernels as they are imported, and the mending of what is wrong in it. Nothing else.

Within `interpreting()` a launch of any `@triton.jit` function runs in NumPy on the CPU. `TRITON_INTERPRET=1` would have
to be set before anything imports triton, torch's compiler and DeepSpeed among them, and would turn the same functions
into ones that cannot be compiled ahead of time.

Wrong in Triton 3.7.1 with NumPy 2.4, and mended within:
- float32 to bfloat16 truncates (a cast without a rounding mode) or rounds halves away from zero, not to even;
- `tl.dot` of bfloat16 multiplies the bit patterns, as unsigned integers;
- `tl.maximum` and `tl.minimum` keep what is not a number, which a GPU does only if it is asked to (`propagate_nan`);
- a call from kernel to kernel leaves `triton.language` patched.
Loop bounds that are arguments of the kernel, broken in earlier versions, work.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

__all__ = ["interpreting"]

_convert_float = interpreter._convert_float


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to nearest, ties to even; the result as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    if (source, target) == (tl.float32, tl.bfloat16):
        return _bfloat16_bits(values)
    if (source, target) == (tl.bfloat16, tl.float32):
        return _widened(values)
    return _convert_float(values, source, target, rounding_mode).reshape(values.shape)


def _dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> TensorHandle:
    left, right = (_widened(side.data) if side.dtype.scalar == tl.bfloat16 else side.data for side in (a, b))
    product = np.matmul(left, right, dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.binary_op(left, right, np.fmax)


def _smaller(builder: Any, left: Any, right: Any) -> Any:
    return builder.binary_op(left, right, np.fmin)


def _call(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    scope = interpreter._patch_lang(function.fn)
    try:
        return InterpretedFunction(function.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _run(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    # Arithmetic that overflows or is not a number is a GPU's daily bread, and NumPy's warning.
    with np.errstate(all="ignore"):
        InterpretedFunction(function.fn).run(*args, grid=grid, warmup=warmup, **kwargs)


@contextmanager
def interpreting() -> Iterator[None]:
    """Run the launches within in the interpreter, on CPU tensors."""
    builder = interpreter.InterpreterBuilder
    assert "create_dot" in vars(builder), "this Triton has another interpreter: look whether it needs mending"
    assert "rounding_mode" in inspect.signature(_convert_float).parameters
    with (
        mock.patch.object(interpreter, "_convert_float", _convert),
        mock.patch.object(builder, "create_dot", _dot),
        mock.patch.object(builder, "create_maxnumf", _larger),
        mock.patch.object(builder, "create_minnumf", _smaller),
        mock.patch.object(JITFunction, "__call__", _call),
        mock.patch.object(JITFunction, "run", _run),
    ):
        yield
