"""telechat2-nano: a real, tiny TeleChat2 checkpoint."""
