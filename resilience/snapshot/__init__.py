"""The memory tier: copies of the training state on tmpfs, their guardian, parity, and what is restored from them."""
