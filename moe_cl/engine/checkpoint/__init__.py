"""Checkpoints: one directory a step, complete or not there, readable at any number of ranks (docs/checkpoints.md)."""

from moe_cl.engine.checkpoint.saver import Checkpointer
from moe_cl.engine.checkpoint.store import latest_complete

__all__ = ["Checkpointer", "latest_complete"]
