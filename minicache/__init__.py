"""Offline DPO in two stages: run the frozen reference once, then train the policy alone against what it said."""

__version__ = "0.1.0"
