"""An exact 64-bit hash of a tensor's bits. Kernels and their oracle only; README.md has the definition."""
