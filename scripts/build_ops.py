"""Compiles the operator that DeepSpeed's CPU backend loads at start, so that the first run does not wait for it."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator


def main() -> None:
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:  # there is none for GPUs
        builder.load(verbose=False)


if __name__ == "__main__":
    main()
