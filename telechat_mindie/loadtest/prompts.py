"""The requests of a load test: random texts of a given length, or a file of prompts."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telechat_mindie.client.dialects import Prompt
from telechat_mindie.client.errors import ServiceError
from telechat_mindie.errors import InputError
from telechat_mindie.reading import BYTE_ORDER_MARK, read_text

MAX_FILE_BYTES = 256 << 20

# Everyday words that large Chinese vocabularies hold whole, so that a word is about a token.
_TEXT = (
    "我们 可以 没有 自己 现在 知道 时候 问题 因为 已经 所以 开始 一些 这样 工作 公司 中国 生活 发展 社会 "
    "技术 数据 系统 服务 网络 模型 学习 研究 方法 结果 时间 世界 国家 城市 学校 学生 老师 孩子 朋友 家庭 "
    "艺术 文化 历史 经济 市场 产品 企业 管理 政府 法律 教育 科学 健康 医院 环境 自然 动物 植物 天气 春天 "
    "今天 明天 昨天 早上 晚上 喜欢 希望 觉得 认为 需要 应该 重要 不同 简单 复杂 快速 安全 稳定 提高 增加"
)
_WORDS = _TEXT.split()
_SAMPLE_WORDS = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """One request: what is asked, and how many tokens its answer may have."""

    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Range:
    """Token counts, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, where: str) -> Range:
        """`128`, or `64:256`.

        Raises:
            InputError: neither of them.
        """
        low, colon, high = text.partition(":")
        try:
            made = cls(int(low), int(high if colon else low))
        except ValueError:
            made = cls(0, 0)
        if not 1 <= made.low <= made.high:
            raise InputError("is no length in tokens", where=where, expected="128, or 64:256", found=text)
        return made

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


async def measure_words(count_tokens: Callable[[str], Awaitable[int]], source: random.Random) -> float | None:
    """Tokens that the service makes of one of our words; None where it has no tokenizer route.

    Raises:
        ServiceError: it cannot be reached.
    """
    try:
        count = await count_tokens("".join(source.choices(_WORDS, k=_SAMPLE_WORDS)))
    except ServiceError as error:
        if error.status is None and error.kind != "bad answer":
            raise
        return None
    return max(count, 1) / _SAMPLE_WORDS


def random_items(prompts: Range, answers: Range, tokens_per_word: float, source: random.Random) -> Iterator[Item]:
    """Requests without an end. Every text is new, so that a prefix cache does not answer for the model."""
    while True:
        words = max(1, round(prompts.draw(source) / tokens_per_word))
        yield Item("".join(source.choices(_WORDS, k=words)), answers.draw(source))


def read_items(file: Path, answers: Range, source: random.Random) -> Iterator[Item]:
    """The prompts of a file, over and over: a text a line, or, in a .jsonl file, an object a line.

    An object has `prompt` (a text) or `messages` (a conversation), and may have `max_tokens`.

    Raises:
        ConfigError: the file cannot be read.
        InputError: it holds something else or nothing.
    """
    # newline=None: the line ends of all systems
    lines = io.StringIO(read_text(file, MAX_FILE_BYTES).removeprefix(BYTE_ORDER_MARK), newline=None)
    as_json = file.suffix == ".jsonl"
    requests = [
        _parse(line, f"{file}, line {number}") if as_json else (line.strip(), None)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not requests:
        raise InputError("holds no prompt", where=file)
    return (Item(prompt, most or answers.draw(source)) for prompt, most in itertools.cycle(requests))


def _parse(line: str, where: str) -> tuple[Prompt, int | None]:
    expected = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with "max_tokens" or without'
    wrong = InputError("is no request", where=where, expected=expected, found=line[:80])
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(data, dict):
        raise wrong
    prompt, messages, most = data.get("prompt"), data.get("messages"), data.get("max_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise wrong
    if isinstance(prompt, str) and prompt and messages is None:
        return prompt, most
    if prompt is None and isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages, most
    raise wrong


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
