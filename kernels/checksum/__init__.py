"""Row and column sums of a matrix in one pass. Kernel, launch and oracle only; README.md has the derivation."""
