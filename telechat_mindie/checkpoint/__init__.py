"""Checkpoints as numpy sees them: read, mapped, split and written in a stream, without any framework.

A weight's walk, and the words for what it passes through:

    source file -> mapping -> sharding -> block -> rank file

- A *stored tensor* is a tensor of a source file: the byte *extents* it lies in (`formats`).
- A *weight* has its Hugging Face name and whole, unsplit shape (`mapping`). What a source gives for each is its dtype
  and *tiles* (`tiles`): rectangles of the weight, each held by one stored tensor. A Hugging Face file holds a weight in
  one tile, rank folders in one a rank; whatever a source is, the stages below see nothing but tiles.
- A *training run* (`training_run`) is the ranks' checkpoints of a step, and the strategy that says how they divide each
  parameter. `distributed` puts the pieces together; what comes of it is a stored tensor like any (`pieces`). With the
  optimizer's state it is copied, whole or divided by another strategy (`redistribute`).
- A *target* is a tensor of the output: *parts*, which are rows of weights, below each other (`mapping`). Its *role*
  says which axis the ranks divide (`sharding`).
- A *block* is a rectangle of one weight that is read once, and says which of its columns go to which rank (`blocks`).
- A *shard* is an output file of every rank, with its *frames*: bytes that the file format puts before stretches of
  tensor data (`plan`, `formats.containers`).

`plan` lays targets out in shards, `pipeline` streams a shard's blocks from tiles to the ranks' files, `stream` runs a
plan with its journal; `convert` and model_dir.build are the two who make plans to be run.
"""
