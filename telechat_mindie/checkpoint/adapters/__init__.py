"""LoRA adapters, merged into weights while they are read."""
