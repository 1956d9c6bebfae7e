"""Options that several commands have, each declared once; what only one command has stands in its own signature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telechat_mindie.commands.completion import names_in
from telechat_mindie.kv_budget import DEFAULT_CARD_GB
from telechat_mindie.mindie import GENERATION_NAMES as GENERATION_NAMES

# Sections of a command's help
TRAINING_RUN, SAMPLING, HTTPS, DEVICES, LIMITS = "Training run", "Sampling", "HTTPS", "Cards", "Limits"

VARIANT_NAMES = "3b, 7b, 35b, 115b or 39b-a12b"

ModelPath = Annotated[Path, typer.Argument(help="A model directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that this program made.")]
Overwrite = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]

# Conversions
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="A LoRA adapter to merge: peft's folder, or a mindformers checkpoint as PATH or PATH=SCALE; repeatable.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (16 bits as stored, or of 32), float16, bfloat16 or float32.",
        autocompletion=names_in("dtypes", "WEIGHT_DTYPES", "auto"),
    ),
]
Tp = Annotated[int, typer.Option("--tp", help="Tensor parallel size: the number of NPUs that share the model.")]
NoQkvConcat = Annotated[bool, typer.Option("--no-qkv-concat", help="Keep q, k/v, gate and up apart.")]
Backend = Annotated[
    str,
    typer.Option("--backend", help="ms: MindSpore, MindIE up to 3.0.0.beta.2; atb: MindIE from 3.0 on, in float16."),
]
BlockSize = Annotated[int, typer.Option("--block-size", help="Tokens of a KV cache block.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity in the weights.")]
AllowOverflow = Annotated[bool, typer.Option("--allow-overflow", help="Accept values that float16 cannot hold.")]
ConfigDir = Annotated[
    Path | None, typer.Option("--config", help="Folder of config.json and the tokenizer, if not with the weights.")
]
Strategy = Annotated[
    Path | None,
    typer.Option(
        "--strategy",
        help="A training run's strategy files; default: the folder beside its checkpoints.",
        rich_help_panel=TRAINING_RUN,
    ),
]
Step = Annotated[
    str | None,
    typer.Option(
        "--step",
        help="A training run's step, EPOCH_STEP in its files' names; default: the newest.",
        rich_help_panel=TRAINING_RUN,
    ),
]
Source = Annotated[
    list[Path] | None,
    typer.Option(
        "--source",
        help="Another folder of the same training run, of another machine; repeatable.",
        rich_help_panel=TRAINING_RUN,
    ),
]
PackedByRank = Annotated[
    bool,
    typer.Option(
        "--packed-by-rank",
        help="A training run's packed weights were packed rank by rank.",
        rich_help_panel=TRAINING_RUN,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant", help=f"A released size instead: {VARIANT_NAMES}.", autocompletion=names_in("variants", "VARIANTS")
    ),
]

# Service configs
Instances = Annotated[
    int | None,
    typer.Option(
        "--instances", help="Copies of the model, each on as many cards as it was built for.", rich_help_panel=DEVICES
    ),
]
Reserve = Annotated[
    float | None,
    typer.Option("--reserve", help="GB of a card kept free; default: a fifth of it.", rich_help_panel=DEVICES),
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", help="Cards, as 0-7 or 0,2,4-5; default: the first ones.", rich_help_panel=DEVICES),
]
DeviceMem = Annotated[float, typer.Option("--device-mem", help="Memory of one card, in GB.", rich_help_panel=DEVICES)]
CardMem = Annotated[
    float | None,
    typer.Option(
        "--device-mem",
        help=f"Memory of one card, in GB; default: as npu-smi says, else {DEFAULT_CARD_GB}.",
        rich_help_panel=DEVICES,
    ),
]
MaxSeqLen = Annotated[
    int | None, typer.Option("--max-seq-len", help="Tokens of prompt and answer together.", rich_help_panel=LIMITS)
]
MaxInputLen = Annotated[int | None, typer.Option("--max-input-len", help="Tokens of a prompt.", rich_help_panel=LIMITS)]
PortBase = Annotated[
    int | None, typer.Option("--port-base", help="First of three ports; the next free ones are taken.")
]
InsecureHttp = Annotated[bool, typer.Option("--insecure-http", help="Serve without HTTPS.", rich_help_panel=HTTPS)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="PATH=VALUE, such as ScheduleConfig.maxBatchSize=64; repeatable."),
]
Generation = Annotated[
    str,
    typer.Option(
        "--mindie", help=f"Generation of MindIE: {GENERATION_NAMES}.", autocompletion=names_in("mindie", "GENERATIONS")
    ),
]
AnyGeneration = Annotated[
    str | None,
    typer.Option(
        "--mindie",
        help=f"Generation of MindIE: {GENERATION_NAMES}; default: one with the model's backend.",
        autocompletion=names_in("mindie", "GENERATIONS"),
    ),
]
MindieHome = Annotated[
    Path | None,
    typer.Option("--mindie-home", help="MindIE's folder; default: as its set_env.sh exports it, or the usual place."),
]

# Sampling
System = Annotated[
    str | None, typer.Option("--system", help="System text of the chat template.", rich_help_panel=SAMPLING)
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help="Most tokens of an answer; default: the model's own.", rich_help_panel=SAMPLING
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", help="Sample at this temperature; default: the model's own.", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Sample among the k most likely tokens; 0: all.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Sample among the most likely tokens of this total probability.", rich_help_panel=SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="1: none.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the sampling.", rich_help_panel=SAMPLING)]

# Clients of a service
ServedModel = Annotated[
    str | None, typer.Option("--model", help="The model's name at a service; default: the first that it names.")
]
CaCert = Annotated[
    Path | None,
    typer.Option(
        "--ca-cert", help="HTTPS: authority that signed the service's certificate (PEM).", rich_help_panel=HTTPS
    ),
]
ClientCert = Annotated[
    Path | None,
    typer.Option(
        "--client-cert",
        "--cert",
        help="HTTPS: our own certificate (PEM), which MindIE asks for.",
        rich_help_panel=HTTPS,
    ),
]
ClientKey = Annotated[
    Path | None, typer.Option("--client-key", "--key", help="HTTPS: its private key (PEM).", rich_help_panel=HTTPS)
]
