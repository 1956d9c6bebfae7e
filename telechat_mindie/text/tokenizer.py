"""The tokenizer that MindIE, mindformers and the embedded engine call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telechat_mindie.errors import InputError, TokenizerError
from telechat_mindie.text import settings
from telechat_mindie.text.chat_template import default_template, render
from telechat_mindie.text.control_tokens import PUBLISHED_TOKENS, TURN_TOKENS, AddedToken, ControlTokens, Run
from telechat_mindie.text.conversation import check_text, read_conversation
from telechat_mindie.text.detokenizer import Detokenizer, StreamDecoder, to_ids
from telechat_mindie.text.masking import Mask, unmask
from telechat_mindie.text.vocabulary import UNKNOWN_ID, Vocabulary


class TelechatTokenizer:
    """TeleChat2's tokenizer, on sentencepiece alone, with the interface of a Hugging Face tokenizer.

    **Control tokens.** The published 115B files add only `<_start>`, `<_end>` and `<_pad>` to sentencepiece, the last
    two as "single words": in `"<_user>hi<_bot>"` nothing becomes a control id, in `"a<_end>b"` neither; the model sees
    the tokens spelt out in letters. `model.chat()` of the published code does not notice, since it inserts the ids 4
    and 5 itself, but a server that is handed a rendered prompt does. Here `<_start> <_end> <_pad> <_user> <_bot>
    <_system>` in a prompt become the ids 1 to 6 (`control_tokens="ids"`). `"published"` splits as the published files
    do. `<_unk>` is id 0 in both (the published config names `<_end>` there); with byte fallback no text needs it.

    **Added tokens.** The files of 3B and 7B name tokens in `added_tokens_decoder`, among them `<tool_call>` (9) to
    `</tool_response>` (12) over other names in tokenizer.model. Where there is such a list it says which strings are
    tokens, and how (single_word, lstrip, rstrip), as in transformers; the six count besides, unless `control_tokens` is
    "published". Ids without an embedding are skipped. What a template writes counts as a token in any case.

    **Text between control tokens** is encoded run by run, so each run begins with sentencepiece's dummy space. That is
    what the model was trained on: Tele-AI/TeleChat2 deepspeed/train.py and mindformers' telechat_preprocess.py join
    `[user] + tokenizer(question) + [bot] + tokenizer(answer) + [end]`. `decode` drops that space again where a text
    begins (text/detokenizer.py says where), and so from the answer's first word. Without added tokens it does so behind
    each control token, and `decode(encode(text)) == text` for every text without U+2581, which is sentencepiece's own
    sign for a space.

    **Injection.** `apply_chat_template` makes control ids only of what the template wrote (text/masking.py has
    the argument), and `encode(text, allow_control=False)` of nothing.

    **Bare prompts.** MindIE's TGI, vLLM and native routes and /v1/completions hand over plain text and know no
    template. With `bare_prompt="chat"` a text without control tokens becomes one user turn of the chat template, ready
    for the bot to answer; a text with a control token is a prompt already, and left as it is. `"raw"`, the published
    behaviour and what a plain completion needs, leaves all texts as they are.

    **Answers.** MindIE's HTTP routes decode with `skip_special_tokens=False` unless a request says otherwise, and count
    the stop token as part of the answer, which is how `<_bot>` and `<_end>` come into the answers of a plain set-up.
    With `turn_tokens="hide"` `decode` prints neither a `<_bot>` at the very beginning nor `<_end>` and `<_pad>` at the
    very end; "show" prints them. Control tokens elsewhere are printed, unless they are skipped.

    Instances can be pickled, and share nothing with other processes.

    Args:
        vocab_file: the `tokenizer.model`.
        vocab_size: rows of the model's embedding. No id that is returned reaches it.
        added_tokens_decoder: tokens by id, as in a tokenizer_config.json.
        chat_template: Jinja source, or several by name: `default`, and `tool_use` for conversations with tools; None
            for the package's own.
        control_tokens: "ids" or "published".
        bare_prompt: "chat" or "raw".
        turn_tokens: "hide" or "show"; None hides them where bare prompts become chat prompts.
        add_bos_token: put `<_start>` before a text (not before a chat prompt).
        add_eos_token: put `<_end>` behind a text (not behind a chat prompt).
        bos_token: must be `<_start>`; also as an AddedToken, or as its JSON.
        eos_token: must be `<_end>`.
        pad_token: must be `<_pad>`.
        unk_token: for templates alone.
        additional_special_tokens: for templates alone.
        model_max_length: kept for callers, never enforced.
        clean_up_tokenization_spaces: must be false: it would change the text.
        sp_model_kwargs: must be empty: sampling would make prompts irreproducible.
        **ignored: arguments that any Hugging Face or mindformers tokenizer accepts.

    Raises:
        TokenizerError: an unusable `tokenizer.model` or setting, or an argument that no tokenizer has.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  a class attribute in mindformers
    model_input_names = ("input_ids", "attention_mask")

    bos_token, eos_token, pad_token, unk_token = "<_start>", "<_end>", "<_pad>", "<_unk>"
    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 1, 2, 3, UNKNOWN_ID

    def __init__(
        self,
        vocab_file: str | PathLike[str],
        *,
        vocab_size: int | None = None,
        added_tokens_decoder: object = None,
        chat_template: object = None,
        control_tokens: str = "ids",
        bare_prompt: str = "raw",
        turn_tokens: str | None = None,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        bos_token: object = "<_start>",
        eos_token: object = "<_end>",
        pad_token: object = "<_pad>",
        unk_token: object = None,
        additional_special_tokens: object = (),
        model_max_length: int | None = None,
        clean_up_tokenization_spaces: bool | None = False,
        sp_model_kwargs: dict[str, Any] | None = None,
        **ignored: object,
    ) -> None:
        settings.refuse_unknown(ignored)
        settings.check_token("bos_token", bos_token, self.bos_token)
        settings.check_token("eos_token", eos_token, self.eos_token)
        settings.check_token("pad_token", pad_token, self.pad_token)
        if not isinstance(additional_special_tokens, (list, tuple)):
            found = type(additional_special_tokens).__name__
            raise TokenizerError("is not a list of tokens", where="additional_special_tokens", found=found)
        settings.check_exact(clean_up_tokenization_spaces, sp_model_kwargs)
        settings.check_choice("control_tokens", control_tokens, settings.CONTROL_TOKEN_MODES)
        self._bare_prompt = settings.check_choice("bare_prompt", bare_prompt, settings.BARE_PROMPT_MODES)
        turn_tokens = turn_tokens or ("hide" if bare_prompt == "chat" else "show")
        settings.check_choice("turn_tokens", turn_tokens, settings.TURN_TOKEN_MODES)
        self.add_bos_token = settings.check_choice("add_bos_token", add_bos_token, settings.FLAG)
        self.add_eos_token = settings.check_choice("add_eos_token", add_eos_token, settings.FLAG)
        if not isinstance(vocab_file, (str, PathLike)):
            raise TokenizerError("is not a path", where="vocab_file", found=repr(vocab_file))
        self._vocabulary = Vocabulary(Path(vocab_file), vocab_size, added_tokens_decoder)
        is_published = control_tokens == "published"
        if from_files := added_tokens_decoder is not None:
            tokens = {token.id: token for token in (() if is_published else TURN_TOKENS)} | self._vocabulary.added
        else:
            tokens = {token.id: token for token in (PUBLISHED_TOKENS if is_published else TURN_TOKENS)}
        self._tokens = ControlTokens(tokens.values())
        # What a template may write counts whatever a bare text may hold.
        written = {token.id: token for token in TURN_TOKENS} | tokens
        self._template_tokens = ControlTokens(written.values())
        self._mask = Mask(self._template_tokens.characters)
        special = {index for index, token in tokens.items() if token.special}
        special_ids = frozenset(special) if is_published else self._vocabulary.control_ids()
        self.all_special_ids = sorted(special_ids)
        self._detokenizer = Detokenizer(
            self._vocabulary, special_ids, hide_turn=turn_tokens == "hide", as_transformers=from_files
        )
        self._templates = settings.named_templates(chat_template or default_template(), "chat_template")
        self._constants = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            # transformers' name for it where no file gives one, which is no piece
            "unk_token": settings.token_text(unk_token) or "<unk>",
            "additional_special_tokens": [settings.token_text(token) for token in additional_special_tokens],
        }
        self.model_max_length = model_max_length
        self.name_or_path = str(Path(vocab_file).parent)

    @classmethod
    def from_pretrained(cls, model_dir: str | PathLike[str], **options: Any) -> TelechatTokenizer:
        """The tokenizer of a directory: tokenizer.model, tokenizer_config.json, and vocab_size of config.json.

        Args:
            model_dir: a checkpoint or a built model directory; only tokenizer.model must be there.
            **options: arguments of the constructor; they win over the files.

        Raises:
            TokenizerError: not a directory, or no usable tokenizer in it.
            ConfigError: a JSON file that cannot be read.
        """
        directory = Path(model_dir)
        if not directory.is_dir():
            raise TokenizerError("is not a directory", where=directory, advice="Name the folder of tokenizer.model.")
        return cls(directory / "tokenizer.model", **{**settings.read_settings(directory), **options})

    @property
    def chat_template(self) -> str:
        """The Jinja source for a conversation without tools."""
        return self._templates[settings.DEFAULT]

    def template_for(self, tools: object) -> str:
        """The Jinja source for a conversation that offers these tools."""
        return self._templates.get(settings.WITH_TOOLS, self.chat_template) if tools else self.chat_template

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer.model; the model's embedding may have more rows."""
        return self._vocabulary.num_pieces

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """The tokens that a rendered prompt may hold beside text."""
        return self._template_tokens.tokens

    def pieces(self) -> tuple[list[str], list[float]]:
        """Every piece of the tokenizer.model, as sentencepiece writes it, and its score."""
        return self._vocabulary.pieces()

    def __call__(
        self, text: str | Sequence[str], *, return_tensors: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Encode one text or several.

        Args:
            text: a text, or a list of texts.
            return_tensors: "np" for int64 arrays [texts, length], which must then be equally long; None for lists.
            **options: as for `encode`.

        Returns:
            `input_ids` and `attention_mask` (all ones): a list for one text, a list of lists for several.

        Raises:
            InputError: not text, invalid text, or texts of different lengths for one array.
        """
        single = isinstance(text, str)
        if not single and not isinstance(text, (list, tuple)):
            raise InputError("is not a text or a list of texts", where="text", found=type(text).__name__)
        rows = [self.encode(item, **options) for item in ([text] if single else text)]
        masks = [[1] * len(row) for row in rows]
        if return_tensors is not None:
            return {"input_ids": _as_array(rows, return_tensors), "attention_mask": _as_array(masks, return_tensors)}
        return {"input_ids": rows[0] if single else rows, "attention_mask": masks[0] if single else masks}

    def encode(
        self,
        text: object,
        *,
        add_special_tokens: bool = True,
        allow_control: bool = True,
        bare_prompt: str | None = None,
    ) -> list[int]:
        """The ids of one text.

        Args:
            text: a prompt.
            add_special_tokens: whether `add_bos_token` and `add_eos_token` apply.
            allow_control: False encodes the text as the content of a message: no control ids, never a chat prompt.
            bare_prompt: "chat" or "raw" in place of the tokenizer's own setting.

        Raises:
            InputError: not a string, or one that UTF-8 cannot carry.
        """
        text = check_text(text, "text")
        if bare_prompt is None:
            bare_prompt = self._bare_prompt
        settings.check_choice("bare_prompt", bare_prompt, settings.BARE_PROMPT_MODES)
        if not allow_control:
            ids = self._vocabulary.encode(text)
        elif bare_prompt == "chat" and not self._template_tokens.frames(text):
            return self._encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)
        else:
            ids = self._encode_runs(self._tokens.split(text))
        before = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        after = [self.eos_token_id] if add_special_tokens and self.add_eos_token else []
        return before + ids + after

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """The pieces of a text, as sentencepiece writes them; options as for `encode`."""
        return [self._vocabulary.name_of(index) for index in self.encode(text, **options)]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of ids; `Detokenizer.decode` says how a slice of an array is read, and why.

        Args:
            token_ids: an id, a sequence of ids, or a one-dimensional integer array.
            skip_special_tokens: leave control tokens out; else they are printed by name.
            clean_up_tokenization_spaces: accepted for compatibility; the text is never changed.

        Raises:
            InputError: not ids, or an id outside the vocabulary.
        """
        return self._detokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each sequence, as a whole text."""
        return [self._detokenizer.decode(to_ids(sequence), skip_special_tokens) for sequence in sequences]

    def stream_decoder(self, skip_special_tokens: bool = True, keep: Iterable[str] = ()) -> StreamDecoder:
        """A decoder for one answer that grows token by token.

        Args:
            skip_special_tokens: as for `decode`.
            keep: special tokens that are never skipped, such as the tags of a tool call; names that are none here do
                not matter.
        """
        kept = frozenset(map(self._vocabulary.id_of, keep)) - {UNKNOWN_ID}
        return StreamDecoder(self._detokenizer, skip_special_tokens, kept)

    def convert_ids_to_tokens(self, ids: Any) -> str | list[str]:
        """The piece of an id, or the pieces of several."""
        names = [self._vocabulary.name_of(index) for index in to_ids(ids)]
        return names[0] if isinstance(ids, (int, np.integer)) else names

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a piece, or the ids of several; 0 for what is not a piece."""
        if isinstance(tokens, str):
            return self._vocabulary.id_of(tokens)
        return [self._vocabulary.id_of(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: object,
        tools: object = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = False,
        chat_template_kwargs: dict[str, object] | None = None,
        **variables: object,
    ) -> Any:
        """The prompt of a conversation; `telechat_mindie.text.chat_template.render` says what a conversation may hold.

        Control tokens that the template wrote become ids, whatever `control_tokens` is; those in a message, a tool or
        a variable stay text.

        Args:
            conversation: messages with `role` and `content`; a last one of the role `tools_call` holds the tools.
            tools: function descriptions.
            chat_template: Jinja source in place of the tokenizer's, or the name of one of these.
            add_generation_prompt: end with `<_bot>`.
            tokenize: False for the text.
            return_tensors: "np" for an int64 array [1, length].
            return_dict: a dictionary with `input_ids` and `attention_mask`.
            chat_template_kwargs: variables for the template, as MindIE passes them.
            **variables: more variables for the template.

        Raises:
            InputError: a conversation that is malformed, or that the template rejects.
            TokenizerError: a template that is not valid Jinja.
        """
        more = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(more, dict):
            raise InputError("is not an object", where="chat_template_kwargs", found=type(more).__name__)
        options: dict[str, Any] = {
            "tools": tools,
            "template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "variables": {**more, **variables},
        }
        if not tokenize:
            return unmask(self._render(conversation, **options))
        ids: Any = self._encode_chat(conversation, **options)
        mask: Any = [1] * len(ids)
        if return_tensors is not None:
            ids, mask = _as_array([ids], return_tensors), _as_array([mask], return_tensors)
        return {"input_ids": ids, "attention_mask": mask} if return_dict else ids

    def _render(self, conversation: object, template: str | None = None, tools: object = None, **options: Any) -> str:
        if template is None:
            template = self.template_for(read_conversation(conversation)[1] if tools is None else tools)
        elif isinstance(template, str):  # a name, as transformers takes it, or source
            template = self._templates.get(template, template)
        return render(template, conversation, tools, constants=self._constants, mask=self._mask, **options)

    def _encode_chat(self, conversation: object, **options: Any) -> list[int]:
        masked = self._template_tokens.split(self._render(conversation, **options), single_words=False)
        return self._encode_runs(Run(unmask(run.text), run.token_id) for run in masked)

    def _encode_runs(self, runs: Iterable[Run]) -> list[int]:
        ids: list[int] = []
        for run in runs:
            ids += self._vocabulary.encode(run.text) if run.token_id is None else [run.token_id]
        return ids


def _as_array(rows: list[list[int]], return_tensors: str) -> NDArray[np.int64]:
    if return_tensors != "np":
        raise InputError(
            "is not supported", where="return_tensors", expected="'np' or None", found=repr(return_tensors)
        )
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InputError(
            "cannot put texts of different lengths into one array",
            where="return_tensors",
            found=f"{min(lengths)} to {max(lengths)} tokens",
            advice="Encode them one by one, or without return_tensors.",
        )
    return np.array(rows, np.int64).reshape(len(rows), max(lengths, default=0))
