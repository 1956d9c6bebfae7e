"""The embedded engine: continuous batching over `ModelRunner.forward`, called with the arguments MindIE passes."""
