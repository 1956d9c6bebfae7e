"""Training of the decoder that is served: data in, a checkpoint or a LoRA adapter out; runs can be resumed."""
