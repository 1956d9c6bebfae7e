"""Finetuning: the decoder of `model`, trained on the rows of `data`, here or by mindformers."""
