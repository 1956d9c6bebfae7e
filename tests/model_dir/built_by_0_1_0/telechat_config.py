"""The configuration that the yaml's auto_map names (AutoConfig)."""

from telechat_mindie.config import TelechatConfig  # noqa: F401
