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
            prompt ends in a tag such as `<think>`, that comes first.
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


# What opens and closes a block of reasoning, in the words of several families of models: most, and
# Seed; Mistral; Kimi; Cohere; Sky-T1 and OpenThinker; gpt-oss, whose channel `final` is the answer.
_TAGS = ("think", "thought", "thinking", "reasoning", "seed:think")
_BLOCKS = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
# Tokens that tokenizers call special, and that must be kept to tell reasoning from the answer.
MARKS = frozenset({"<|channel|>", "<|message|>"} | {tag for block in _BLOCKS[:-1] for tag in block})
_OPEN = re.compile("|".join(re.escape(opening) for opening, _ in _BLOCKS))
_CLOSE = re.compile("|".join(re.escape(closing) for _, closing in _BLOCKS))
_WHOLE = re.compile(
    "|".join(f"{re.escape(a)}.*?(?:{re.escape(b)}|\\Z)" for a, b in _BLOCKS), re.DOTALL
)


def without_reasoning(text: str) -> str:
    r"""An answer without the blocks in which a model reasons.

    A block that is not closed was cut off, and nothing follows it. Text before a tag that closes a
    block which was not opened is reasoning too: some chat templates open it in the prompt.

    >>> without_reasoning("<think>2 or 3?</think>\n\n4"), without_reasoning("2?</think>4")
    ('4', '4')
    >>> without_reasoning("<thought>2 or"), without_reasoning(" 4")
    ('', ' 4')
    """
    if not _OPEN.search(text) and not _CLOSE.search(text):
        return text
    return after_reasoning(_WHOLE.sub("", text)).lstrip()


def after_reasoning(text: str) -> str:
    """What follows the last tag that closes a block of reasoning; all, if there is none."""
    return text[end_of_reasoning(text) :]


def end_of_reasoning(text: str) -> int:
    """Where the last tag that closes a block of reasoning ends; 0 if there is none."""
    return max((found.end() for found in _CLOSE.finditer(text)), default=0)


def is_reasoning(text: str) -> bool:
    """Whether a block in which a model reasons is open at the end of a text."""
    last = max((found.start() for found in _OPEN.finditer(text)), default=-1)
    return last >= end_of_reasoning(text)


def opened_at_end(text: str) -> str:
    """The tag that opens a block of reasoning at the end of a text; empty if there is none."""
    text = text.rstrip()
    return next((opening for opening, _ in _BLOCKS if text.endswith(opening)), "")
