"""`launch`, `status` and `stop`: MindIE's daemon, started so that it either answers or says why it does not."""
