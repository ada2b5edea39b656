"""Types of the compiled module; what it does stands in `_sweep.c`."""

from torch import Tensor

def sweep(
    matrix: Tensor,
    right: Tensor | None,
    left: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    gomp_parallel: int,
    threads: int,
    /,
) -> tuple[Tensor | None, Tensor | None] | None: ...
def worst(
    matrix: Tensor,
    right: Tensor,
    sums: Tensor,
    alpha: float,
    addend: Tensor | None,
    beta: float,
    factor: float,
    tiny: float,
    gomp_parallel: int,
    threads: int,
    /,
) -> float | None: ...
def use(name: str, /) -> bool: ...
def instructions() -> str: ...
