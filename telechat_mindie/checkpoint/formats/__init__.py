"""File formats of weights, read with suspicion and written in a stream."""
