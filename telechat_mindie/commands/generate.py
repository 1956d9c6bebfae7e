"""`telechat-mindie generate`."""

from __future__ import annotations

import sys

import typer

from telechat_mindie.commands.messages import logger
from telechat_mindie.commands.options import (
    AsJson,
    MaxNewTokens,
    ModelPath,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)


def generate(
    model_path: ModelPath,
    prompt: str = typer.Argument(help="The question, or with --raw the text to go on with; - reads it from stdin."),
    raw: bool = typer.Option(False, "--raw/--chat", help="The prompt as it is, or as a user's question."),
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt on the CPU, through the interface that MindIE calls.

    Examples:
        telechat-mindie generate model "What is MindIE?"
        telechat-mindie generate model "Once upon a time" --raw --temperature 0.8 --seed 1
    """
    from telechat_mindie.client.answers import Figures, local_params
    from telechat_mindie.client.dialects import Sampling
    from telechat_mindie.engine.local import open_local
    from telechat_mindie.errors import InputError
    from telechat_mindie.model_dir.layout import ModelDir

    if raw and system is not None:
        raise InputError("has no place in a raw prompt", where="--system", advice="Leave out --raw.")
    if prompt == "-":
        prompt = _stdin()
    if not prompt.strip():
        raise InputError("is empty", where="the prompt", advice="Ask something, or name - and give it on stdin.")
    sampling = Sampling(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    params = local_params(sampling, ModelDir.open(model_path).serving)  # refused before the weights are loaded
    local = open_local(model_path)
    tokenizer = local.tokenizer
    if raw:
        prompt_ids = tokenizer.encode(prompt, bare_prompt="raw")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = []
    for output in local.engine.generate(prompt_ids, params):
        answer.append(output.text)
        if not as_json:
            print(output.text, end="", flush=True)
    if output.error:
        raise InputError(output.error)
    figures = Figures.of(output)
    if as_json:
        from telechat_mindie.commands.output import print_json

        print_json(
            {
                "text": "".join(answer),
                "finish_reason": output.finish_reason.value if output.finish_reason else None,
                "prompt_tokens": output.prompt_tokens,
                "generated_tokens": output.generated_tokens,
                "seconds_to_first_token": figures.first_seconds,
                "tokens_per_second": figures.tokens_per_second or 0.0,
                "seed": output.seed,
            }
        )
        return
    print()
    logger.info(f"[{figures}]")


def _stdin() -> str:
    from telechat_mindie.errors import InputError

    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"is not {error.encoding}: {error.reason} at byte {error.start}", where="stdin") from None
