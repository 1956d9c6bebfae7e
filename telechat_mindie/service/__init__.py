"""Around MindIE's daemon: the schema of its conf/config.json, and the values a model directory implies for it."""

DEFAULT_GENERATION = "3.0.0.beta"  # of MindIE's config, where nothing says which is installed
