"""The `resilience` command: parse, call, print. No logic of its own, and it runs without torch."""
