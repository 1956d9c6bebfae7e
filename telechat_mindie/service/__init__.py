"""Around MindIE's daemon: the schema of its conf/config.json, and the values a model directory implies for it."""

from telechat_mindie.mindie import ATB, MS

DEFAULT_GENERATION = "3.0.0.beta"  # of MindIE's config, where nothing says which is installed

DEFAULT_GENERATIONS = {MS: DEFAULT_GENERATION, ATB: "3.0"}
"""The same by the backend that a directory is for."""
