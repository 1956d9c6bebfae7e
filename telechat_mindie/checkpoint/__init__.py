"""Checkpoints as numpy sees them: read, mapped, split, planned and written without any framework."""
