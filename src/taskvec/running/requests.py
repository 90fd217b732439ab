"""What a model is asked, and what it replies; nothing here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

Message = tuple[str, str]  # role (system, user, assistant) and content
Text = str | tuple[Message, ...]  # plain, or a conversation for the model's chat template


@dataclass(frozen=True, slots=True)
class Continuation:
    """Asks for log p(text | context).

    Attributes:
        context: What comes before; may be empty.
        text: What is scored, with the space in front of it where one belongs there.
    """

    context: Text
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Asks the model to go on.

    Attributes:
        text: What to go on from.
        max_new_tokens: Most tokens that are generated.
        stop: Texts at which the answer is cut, without them.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        draw: Which of several answers to the same prompt; draws differ between them.
    """

    text: Text
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    draw: int = 0


@dataclass(frozen=True, slots=True)
class WholeText:
    """Asks for log p(text), every token predicted once from what comes before it in its window."""

    text: str


Request = Continuation | Prompt | WholeText


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Reply to a `Continuation` or a `WholeText`.

    Attributes:
        log_likelihood: Sum over the tokens, in nats.
        tokens: How many were predicted.
        is_greedy: Whether each was the most likely one.
    """

    log_likelihood: float
    tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Reply to a `Prompt`.

    Attributes:
        raw: All that was generated, up to the first stop text or end-of-sequence token. Where the
            prompt ends in `<think>`, that tag comes first.
        tokens: How many were generated.
        ended: `end` (end-of-sequence token), `stop` (a stop text) or `length`.
    """

    raw: str
    tokens: int
    ended: str

    @property
    def text(self) -> str:
        """The answer itself, without reasoning: what is scored."""
        return without_reasoning(self.raw)


Reply = Likelihood | Answer


OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(f"{OPEN}.*?(?:{CLOSE}|\\Z)", re.DOTALL)


def without_reasoning(text: str) -> str:
    r"""An answer without the blocks in which a model reasons.

    A block that is not closed was cut off, and nothing follows it. Text before a tag that closes a
    block which was not opened is reasoning too: some chat templates open it in the prompt.

    >>> without_reasoning("<think>2 or 3?</think>\n\n4"), without_reasoning("2?</think>4")
    ('4', '4')
    >>> without_reasoning("<think>2 or"), without_reasoning(" 4")
    ('', ' 4')
    """
    if OPEN not in text and CLOSE not in text:
        return text
    return _BLOCK.sub("", text).rpartition(CLOSE)[2].lstrip()


def is_reasoning(text: str) -> bool:
    """Whether a block in which a model reasons is open at the end of a text."""
    return text.rfind(OPEN) > text.rfind(CLOSE)
