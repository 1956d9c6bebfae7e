"""`telechat-mindie chat`."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from telechat_mindie.commands.options import (
    CaCert,
    ClientCert,
    ClientKey,
    MaxNewTokens,
    RepetitionPenalty,
    Seed,
    ServedModel,
    System,
    Temperature,
    TopK,
    TopP,
)


def chat(
    target: str = typer.Argument(metavar="MODEL_PATH|URL", help="A model directory, or a service: http://HOST:PORT."),
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    model: ServedModel = None,
    timeout: float = typer.Option(600, "--timeout", min=1, help="URL only: most seconds to wait for the next token."),
    ca_cert: CaCert = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    no_history: bool = typer.Option(False, "--no-history", help="Remember nothing of what is typed."),
) -> None:
    """Chat in the terminal, with a directory on the CPU or with a running service.

    What is not set is as the directory's yaml or the service has it; --model and certificates are for a service.
    In a pipe, each line is a question. What is typed at a terminal is remembered in this user's state folder.

    Examples:
        telechat-mindie chat model
        telechat-mindie chat http://127.0.0.1:1025 --temperature 0.7
        telechat-mindie chat https://127.0.0.1:1025 --ca-cert ca.pem --client-cert client.pem --client-key client.key
    """
    from telechat_mindie.client.answers import Answers, LocalAnswers, RemoteAnswers
    from telechat_mindie.client.chat_loop import ChatLoop
    from telechat_mindie.client.dialects import Sampling
    from telechat_mindie.service.launch.rundir import state_home

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
        from telechat_mindie.commands.service_tls import service_tls

        tls = service_tls(target, ca_cert, client_cert, client_key)
        answers = RemoteAnswers(target, sampling, model=model, tls=tls, timeout=timeout)
    else:
        from telechat_mindie.errors import InputError

        given = {"--model": model, "--ca-cert": ca_cert, "--client-cert": client_cert, "--client-key": client_key}
        if names := ", ".join(name for name, value in given.items() if value is not None):
            raise InputError("is for a service", where=names, advice="Leave it out, or name a URL: http://HOST:PORT.")
        answers = LocalAnswers(Path(target), sampling)
    history = None if no_history else state_home(os.environ) / "chat_history"
    ChatLoop(answers, system, history).run()
