"""What MindIE imports: the model runner."""
