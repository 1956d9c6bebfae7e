"""Where the directories that 0.1.0 built look for the tokenizer (their telechat_tokenizer.py); it is in `text` now."""

from telechat_mindie.text.tokenizer import TelechatTokenizer as TelechatTokenizer
