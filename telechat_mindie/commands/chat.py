"""`telechat-mindie chat`."""

from __future__ import annotations

from pathlib import Path

import typer


def chat(
    target: str = typer.Argument(metavar="MODEL_PATH|URL", help="A model directory, or a service: http://HOST:PORT."),
    system: str = typer.Option(None, "--system", help="System text of the chat template."),
    max_new_tokens: int = typer.Option(None, "--max-new-tokens", min=1, help="Most tokens of an answer."),
    temperature: float = typer.Option(None, "--temperature", help="Sample at this temperature."),
    top_k: int = typer.Option(None, "--top-k", help="Sample among the k most likely tokens."),
    top_p: float = typer.Option(None, "--top-p", help="Sample among the most likely tokens of this total probability."),
    repetition_penalty: float = typer.Option(None, "--repetition-penalty", help="1: none."),
    seed: int = typer.Option(None, "--seed", help="Seed of the sampling."),
    model: str = typer.Option(None, "--model", help="URL only: the model's name; default: the first it names."),
    timeout: float = typer.Option(600, "--timeout", min=1, help="URL only: most seconds to wait for the next token."),
    ca_cert: Path = typer.Option(None, "--ca-cert", help="URL only: authority of the service's certificate (PEM)."),
    cert: Path = typer.Option(None, "--cert", help="URL only: our own certificate (PEM), which MindIE asks for."),
    key: Path = typer.Option(None, "--key", help="URL only: its private key (PEM)."),
) -> None:
    """Chat in the terminal, with a directory on the CPU or with a running service.

    What is not set is as the directory's yaml or the service has it. In a pipe, each line is a question.
    """
    from telechat_mindie.client.answers import Answers, LocalAnswers, RemoteAnswers
    from telechat_mindie.client.chat_loop import ChatLoop
    from telechat_mindie.client.conversation import Conversation
    from telechat_mindie.client.dialects import Sampling

    sampling = Sampling(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    answers: Answers
    if "://" in target:
        from telechat_mindie.client.client import client_tls

        tls = client_tls(ca_cert, cert, key)
        answers = RemoteAnswers(target, sampling, model=model, tls=tls, timeout=timeout)
    else:
        answers = LocalAnswers(Path(target), sampling)
    ChatLoop(answers, Conversation(system)).run()
