"""Types of the compiled module; what it does stands in `_sweep.c`."""

def sweep(
    matrix: int,
    matrix_shape: tuple[int, ...],
    matrix_strides: tuple[int, ...],
    is_bfloat16: bool,
    right: int,
    right_shape: tuple[int, ...],
    right_strides: tuple[int, ...],
    left: int,
    left_shape: tuple[int, ...],
    left_strides: tuple[int, ...],
    rows: int,
    columns: int,
    gomp_parallel: int,
    threads: int,
    /,
) -> bool: ...
def use(name: str, /) -> bool: ...
def instructions() -> str: ...
