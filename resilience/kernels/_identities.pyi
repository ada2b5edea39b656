"""Types of the compiled module; what it does stands in `_identities.c`."""

from torch import Tensor

def identity(
    one: Tensor,
    other: Tensor,
    random: float,
    coherent: float,
    tiny: float,
    rows: Tensor | None,
    row_weight: float,
    beside: Tensor | None,
    /,
) -> float | None: ...
def excess(inner: Tensor, outer: Tensor, factor: float, tiny: float, with_zero: bool, /) -> float | None: ...
