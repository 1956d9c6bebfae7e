"""The TeleChat2 decoder in MindSpore."""
