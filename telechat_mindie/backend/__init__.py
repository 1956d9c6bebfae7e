"""What MindIE imports: the model runner, and the tokenizer with its prompt builder."""
