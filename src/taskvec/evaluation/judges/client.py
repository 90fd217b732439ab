"""What a judge's server may get and what may come from it: the key, its scrubbing, its failures.

The key goes into one header of one request and nowhere else: never over plain HTTP to another
machine, never after a redirect, never into a message or a file. `connection` sends the requests.
"""

from __future__ import annotations

import base64
import html
import ipaddress
import math
import os
import re
from functools import lru_cache
from urllib.parse import urlsplit

from taskvec.errors import UsageError

KEY = "OPENAI_API_KEY"
MIN_SECRET = 8  # shorter keys are placeholders that local servers ignore, such as "EMPTY"
REDACTED = "…"


class LaterError(Exception):
    """The server did not answer this time."""


class RefusedError(Exception):
    """The server will not answer: not this request, or (`all_of_them`) none."""

    def __init__(self, reason: str, all_of_them: bool) -> None:
        super().__init__(reason)
        self.all_of_them = all_of_them


class MalformedError(Exception):
    """The reply of the server is not a complete chat completion."""


def read_key() -> str:
    """The key from the environment; empty if there is none.

    Raises:
        UsageError: it has a character that cannot be sent.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the environment variable {KEY} holds a character that no key has")
    return key


def is_loopback(url: str) -> bool:
    """Whether an address is this machine by its name: nothing is looked up."""
    host = (urlsplit(url).hostname or "").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent: HTTPS, or this machine."""
    return urlsplit(url).scheme == "https" or is_loopback(url)


def clean(text: str, key: str) -> str:
    r"""Text of a server that can be stored and shown: without the key, and valid Unicode.

    >>> clean("bad key: sk%2Dsecret1 \ud800", "sk-secret1")
    'bad key: … �'
    """
    if len(key) >= MIN_SECRET:
        text = _encodings(key).sub(REDACTED, text)
    return valid(text)


def valid(text: str) -> str:
    """Text in which lone surrogates, which no file takes, are replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@lru_cache(maxsize=4)
def _encodings(key: str) -> re.Pattern[str]:
    """Matches the key, plain or encoded: URL, JSON and HTML escapes, hex, base64.

    Repetitions are bounded, so that no text makes the search slow.
    """
    forms = ["".join(map(_character, key)), f"(?i:{key.encode().hex()})", *_base64(key)]
    return re.compile("|".join(forms))


def _character(char: str) -> str:
    """One character, plain or escaped, by itself."""
    code = ord(char)
    backslashes = r"\\{1,8}"
    return (
        f"(?:\\\\{{0,8}}{re.escape(char)}|{re.escape(html.escape(char))}"
        f"|(?i:(?:%(?:25){{0,4}}|=|{backslashes}(?:x|u00)){code:02x}"
        f"|{backslashes}u\\{{0{{0,6}}{code:x}\\}}"
        f"|&#(?:0{{0,6}}{code}|x0{{0,6}}{code:x});)"
        f"|{backslashes}{code:03o})"
    )


def _base64(key: str) -> list[str]:
    """The key in base64, for each place at which it can start in what is encoded."""
    raw, forms = key.encode(), []
    signs = {"+": r"(?:[+-]|%2[Bb]|\\{1,8}u002[Bb])", "/": r"(?:\\{0,8}[/_]|%2[Ff])"}
    for start in range(3):
        text = base64.b64encode(b"\0" * start + raw).decode()
        first, last = math.ceil(8 * start / 6), 8 * (start + len(raw)) // 6
        forms.append("".join(signs.get(char, char) for char in text[first:last]))
    return forms
