"""Fused attention that checks itself, forward and backward. `api` is what callers use; Triton is imported there."""
