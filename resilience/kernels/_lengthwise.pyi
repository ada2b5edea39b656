"""Types of the compiled module; what it does stands in `_lengthwise.c`."""

def sums(
    shape: tuple[int, ...],
    is_bfloat16: bool,
    one: int,
    one_strides: tuple[int, ...],
    other: int,
    other_strides: tuple[int, ...],
    weights: int,
    out: int,
    gomp_parallel: int,
    threads: int,
    /,
) -> None: ...
def moments(
    shape: tuple[int, ...],
    is_bfloat16: bool,
    operand: int,
    strides: tuple[int, ...],
    weights: int,
    out: int,
    gomp_parallel: int,
    threads: int,
    /,
) -> None: ...
def extremes(
    shape: tuple[int, ...],
    is_bfloat16: bool,
    operand: int,
    strides: tuple[int, ...],
    out: int,
    gomp_parallel: int,
    threads: int,
    /,
) -> None: ...
def use(name: str, /) -> bool: ...
def instructions() -> str: ...
