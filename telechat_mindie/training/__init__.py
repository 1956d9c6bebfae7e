"""Finetuning: the decoder of `model`, trained on the rows of `data`."""
