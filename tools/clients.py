"""Speak to a server through the clients that applications use: langchain-openai and litellm.

tools/clients.sh installs them in a virtual environment of their own, starts a server and calls this.

    python tools/clients.py URL MODEL
"""

from __future__ import annotations

import sys

QUESTION = "生抽与老抽的区别？"
BEGIN = "生抽和老抽都是酱油"  # of telechat2-nano's answer


def langchain(url: str, model: str) -> None:
    from langchain_core.messages import (  # type: ignore[import-not-found]
        AIMessage,
        HumanMessage,
        SystemMessage,
        ToolMessage,
    )
    from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_retries=0)
    answer = chat.invoke([HumanMessage(QUESTION)])
    assert str(answer.content).startswith(BEGIN), answer
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"
    pieces = list(chat.stream([HumanMessage(QUESTION)]))
    assert "".join(str(piece.content) for piece in pieces) == answer.content
    call = {"name": "天气", "args": {"地点": "北京"}, "id": "1"}
    turns = [
        SystemMessage("你是助手。"),
        HumanMessage(QUESTION),
        AIMessage("", tool_calls=[call]),
        ToolMessage("晴", tool_call_id="1"),
    ]
    tool = {"type": "function", "function": {"name": "天气", "parameters": {"type": "object", "properties": {}}}}
    assert chat.bind_tools([tool]).invoke(turns).response_metadata["finish_reason"]
    # `max_tokens` goes out as max_completion_tokens, which MindIE does not read; extra_body reaches it.
    short = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, extra_body={"max_tokens": 3})
    assert short.invoke(QUESTION).usage_metadata["output_tokens"] == 3


def litellm(url: str, model: str) -> None:
    import litellm  # type: ignore[import-not-found]

    litellm.telemetry = False
    to_server = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(messages=messages, temperature=0, **to_server)
    text = answer.choices[0].message.content
    assert text.startswith(BEGIN), answer
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    pieces = litellm.completion(messages=messages, temperature=0, stream=True, **to_server)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    short = litellm.completion(messages=messages, max_tokens=3, **to_server)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")
    try:
        litellm.completion(messages=messages, top_p=1.5, **to_server)
    except litellm.exceptions.BadRequestError as error:
        assert "422" in str(error)
    else:
        raise AssertionError("top_p 1.5 was taken")


def main() -> None:
    url, model = sys.argv[1:]
    for check in (langchain, litellm):
        check(url, model)
        print(f"{check.__name__}: ok", flush=True)


if __name__ == "__main__":
    main()
