"""The tokenizer that the yaml's auto_map names (AutoTokenizer)."""

from telechat_mindie.tokenizer import TelechatTokenizer  # noqa: F401
