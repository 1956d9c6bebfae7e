"""Templates of a model directory's files."""
