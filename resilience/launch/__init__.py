"""The launch of a run: DeepSpeed's runner with our options, the embedded coordinator, one agent per node, rank shims.

Importing this package loads nothing: the coordinator and the command line share a few of its modules without torch.
"""
