"""Around MindIE's daemon: the schema of its conf/config.json, and the values a model directory implies for it."""
