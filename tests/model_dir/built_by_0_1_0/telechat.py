"""The model that the yaml's auto_map names (AutoModel)."""

from telechat_mindie.model.decoder import TelechatForCausalLM as ParallelTelechatForCausalLM  # noqa: F401
