"""Chat templates: messages in, the prompt text that the model was trained on out.

A GGUF file carries its template as Jinja source, written by whoever made the file. It runs in a
sandbox with a budget of work and time (`_tok_sandbox.py`), so that a bad one is an error and not a
hang. Tokenization of the result is the caller's: ``tokenizer.tokenize(text, special=True)``, and
without BOS where the text already begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError

from ._tok_budget import TemplateLimitError, plain_size
from ._tok_filters import RefusedError
from ._tok_sandbox import Sandbox
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate", "ChatTemplateError"]

KEY = "tokenizer.chat_template"
MAX_SOURCE = 256 * 1024  # characters; the longest in use have about 30,000
BASE_WORK = 8_000_000  # characters a run may make or move, apart from
WORK_PER_INPUT = 64  # so many for each character of the messages
TIME_LIMIT = 5.0  # seconds


class ChatTemplateError(ValueError):
    """The template is malformed, refuses the messages, or exceeds its limits."""


class ChatTemplate:
    """A compiled chat template; threads may share it.

    Parameters
    ----------
    source : str
        Jinja source.
    special_tokens : mapping of str to str
        Names the template may use, as ``bos_token`` and ``eos_token``, and their texts.
    time_limit : float
        Seconds that one `render` may take.

    Raises
    ------
    ChatTemplateError
        The source is too long, or not a template that chat models use.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        if not isinstance(source, str):
            raise ChatTemplateError(f"{KEY} must be a string, found {type(source).__name__}")
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, above {MAX_SOURCE}"
            )
        self.source = source
        self._given = {"bos_token": "", "eos_token": "", **(special_tokens or {})}
        self._time_limit = time_limit
        self._sandbox = Sandbox()
        with self._sandbox.limits(BASE_WORK, time_limit):
            self._template = _explained(self._sandbox.load, source)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tokenizer: Tokenizer
    ) -> ChatTemplate | None:
        """The template of a GGUF file's metadata, or None where it has none."""
        source = metadata.get(KEY)
        if source is None or source == "":
            return None
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unknown_id}
        texts = {
            f"{name}_token": tokenizer.token_bytes(id, special=True).decode("utf-8", "replace")
            for name, id in ids.items()
            if id is not None
        }
        return cls(source, texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`.

        Parameters
        ----------
        messages : sequence of mappings
            Usually with ``role`` and ``content``.
        add_generation_prompt : bool
            End with what opens the assistant's reply.
        **extra
            Further names for the template, as ``tools``, ``documents`` or ``enable_thinking``.

        Raises
        ------
        ChatTemplateError
            The template raises an error of its own (roles out of order, say), cannot work with
            the messages, or runs into a limit.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise ChatTemplateError(
                    f"message {index} must be a mapping, found {type(message).__name__}"
                )
        values = {
            **self._given,
            "tools": None,
            "documents": None,
            **extra,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        work = BASE_WORK + WORK_PER_INPUT * _explained(plain_size, values)
        with self._sandbox.limits(work, self._time_limit):
            return _explained(lambda: "".join(self._template.generate(values)))


def _explained(function: Any, *args: Any) -> Any:
    """Call `function`, with every error it may raise turned into `ChatTemplateError`."""
    try:
        return function(*args)
    except RefusedError as error:
        raise ChatTemplateError(f"the chat template refuses the messages: {error}") from None
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template is malformed at line {error.lineno}: {error.message}"
        ) from error
    except TemplateLimitError as error:
        raise ChatTemplateError(f"the chat template exceeds its limits: {error}") from error
    except SecurityError as error:
        raise ChatTemplateError(f"the chat template is not allowed: {error}") from error
    except UndefinedError as error:
        raise ChatTemplateError(f"the chat template misses a value: {error}") from error
    except RecursionError:
        raise ChatTemplateError("the chat template nests or recurses too deep") from None
    except Exception as error:
        raise ChatTemplateError(
            f"the chat template failed: {type(error).__name__}: {error}"
        ) from error
