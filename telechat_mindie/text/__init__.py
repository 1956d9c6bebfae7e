"""Text and token ids: the tokenizer, its settings, chat templates."""
