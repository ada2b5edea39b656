"""Types of the compiled module; what it does stands in `_residual.c`."""

def worst(
    expected: int,
    expected_by_batch: int,
    expected_by_column: int,
    observed: int,
    observed_by_batch: int,
    observed_by_column: int,
    batches: int,
    rows: int,
    count: int,
    factor: float,
    tiny: float,
    /,
) -> float: ...
