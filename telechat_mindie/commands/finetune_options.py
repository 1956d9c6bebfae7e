"""Options of `finetune` where it trains here; those of --render stand in `finetune_render`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Sections of the help
WHAT, OPTIMIZER, COMPUTATION = "What is trained, and how long", "Optimizer", "Computation"
RESULT = "Evaluation and result"

Model = Annotated[Path | None, typer.Argument(help="A TeleChat2 checkpoint.")]
Data = Annotated[list[str] | None, typer.Argument(help="What `preprocess` made, or what it reads; patterns in quotes.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder of the run: its checkpoints, curve and result.")
]

Lora = Annotated[
    str | None,
    typer.Option(
        "--lora",
        help="R,ALPHA[,MODULE+MODULE...]: train a LoRA adapter, such as 8,16 or 8,16,query+key_value; "
        "default: all weights.",
        rich_help_panel=WHAT,
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(
        "--epochs", help="Times that each row is trained on; default: 3, with --render 1.", rich_help_panel=WHAT
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Optimizer steps, in place of --epochs.", rich_help_panel=WHAT)
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Rows of an optimizer step, over all ranks and micro batches; default: 8, with --render as proposed.",
        rich_help_panel=WHAT,
    ),
]
MicroBatch = Annotated[
    int, typer.Option("--micro-batch", help="Rows that a rank computes at once.", rich_help_panel=WHAT)
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        help="Tokens of a row where data are made into rows; default: as the model was trained, with --render 8192.",
        rich_help_panel=WHAT,
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", help="Of the order of rows and of the first LoRA factors.", rich_help_panel=WHAT)
]
NoShuffle = Annotated[bool, typer.Option("--no-shuffle", help="Rows in the order of the data.", rich_help_panel=WHAT)]

LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        help="The highest; default: 2e-5, with --lora 2e-4, with --render 1.5e-4.",
        rich_help_panel=OPTIMIZER,
    ),
]
MinLearningRate = Annotated[
    float | None,
    typer.Option(
        "--min-learning-rate",
        help="What the cosine ends at; default: a tenth of the highest.",
        rich_help_panel=OPTIMIZER,
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option("--warmup", help="Steps of linear warm-up from 0; default: 3 % of all.", rich_help_panel=OPTIMIZER),
]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", help="Of AdamW; not on norms and biases.", rich_help_panel=OPTIMIZER)
]
Clip = Annotated[float, typer.Option("--clip", help="Norm that the gradient is clipped to.", rich_help_panel=OPTIMIZER)]

Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="bf16 or fp32 computation; what is trained and the optimizer are fp32. Default: fp32, with --render bf16.",
        rich_help_panel=COMPUTATION,
    ),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        help="Compute activations again for their gradients; on a CPU that takes more memory and time, not less.",
        rich_help_panel=COMPUTATION,
    ),
]
NoDocumentMask = Annotated[
    bool,
    typer.Option(
        "--no-document-mask",
        help="Conversations of one row see each other, as in mindformers' recipe.",
        rich_help_panel=COMPUTATION,
    ),
]
Dp = Annotated[
    int | None,
    typer.Option(
        "--dp",
        help="Data parallel size: copies of the model, each in a process of its own; default: 1.",
        rich_help_panel=COMPUTATION,
    ),
]
Tp = Annotated[
    int | None,
    typer.Option(
        "--tp", help="Tensor parallel size: processes that share a copy; default: 1.", rich_help_panel=COMPUTATION
    ),
]
IgnoreMemory = Annotated[
    bool,
    typer.Option("--ignore-memory", help="Begin although memory seems too small.", rich_help_panel=COMPUTATION),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check everything, estimate the memory, train nothing.", rich_help_panel=COMPUTATION
    ),
]

EvalData = Annotated[
    list[str] | None, typer.Option("--eval", help="Held-out data, as DATA; repeatable.", rich_help_panel=RESULT)
]
EvalShare = Annotated[
    float, typer.Option("--eval-share", help="Part of the rows to hold out, such as 0.02.", rich_help_panel=RESULT)
]
EvalEvery = Annotated[
    int,
    typer.Option("--eval-every", help="Steps between evaluations; 0: at the end alone.", rich_help_panel=RESULT),
]
SaveEvery = Annotated[
    int,
    typer.Option("--save-every", help="Steps between checkpoints; 0: at the end alone.", rich_help_panel=RESULT),
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Checkpoints that stay, the newest.", rich_help_panel=RESULT)]
SaveDtype = Annotated[
    str,
    typer.Option(
        "--save-dtype",
        help="auto (as MODEL's), float16, bfloat16 or float32 weights in the result.",
        rich_help_panel=RESULT,
    ),
]
