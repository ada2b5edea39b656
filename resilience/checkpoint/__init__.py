"""Checkpoints that can be trusted: what a manifest says, how one is published, how one is verified.

Nothing here knows DeepSpeed; that is `resilience.deepspeed.checkpoint`.
"""
