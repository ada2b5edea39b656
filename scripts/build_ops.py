"""Compiles the operators that DeepSpeed loads on a CPU, side by side, so that the first run does not wait for them: the
one that its backend loads at start, and its Adam.
"""

from __future__ import annotations

import multiprocessing

from deepspeed.accelerator import get_accelerator

_BUILDERS = ("ShareMemCommBuilder", "FusedAdamBuilder")


def build(name: str) -> None:
    """Compile one of them, unless that was done."""
    get_accelerator().create_op_builder(name).load(verbose=False)


def main() -> None:
    if get_accelerator().device_name() != "cpu":
        return
    with multiprocessing.get_context("spawn").Pool(len(_BUILDERS)) as pool:
        pool.map(build, _BUILDERS)


if __name__ == "__main__":
    main()
