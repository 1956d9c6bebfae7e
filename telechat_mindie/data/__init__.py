"""Training data: conversations in JSON become rows of tokens in mindrecord files."""
