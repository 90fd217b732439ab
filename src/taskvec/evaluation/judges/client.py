"""One request to an OpenAI-compatible server: JSON there, JSON back, and what went wrong.

The key goes into a header and nowhere else: never over plain HTTP to another machine, never after a
redirection (none is followed), and never into a message.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from taskvec.errors import UsageError

KEY = "OPENAI_API_KEY"
MOST_BYTES = 4 << 20  # of a reply
LATER = (408, 409, 425, 429)  # besides 5xx: the same request may do later
THIS_ONE = (400, 413, 422)  # another request may do


class LaterError(Exception):
    """The server did not answer this time; `wait_s` is the least wait that it asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RefusedError(Exception):
    """The server will not answer: not this request, or (`all_of_them`) none."""

    def __init__(self, reason: str, all_of_them: bool) -> None:
        super().__init__(reason)
        self.all_of_them = all_of_them


class MalformedError(Exception):
    """The server answered something else than JSON."""


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post(url: str, body: dict[str, Any], *, key: str, timeout_s: float) -> Any:
    """The JSON that comes back.

    Args:
        url: Where to.
        body: What is sent.
        key: For the header `Authorization`; empty: none is sent.
        timeout_s: For the connection, for every pause of the server, and for the reply as a whole.

    Raises:
        LaterError: no connection, no reply in time, or a status that says so.
        RefusedError: any other status but 200.
        MalformedError: the reply is not JSON.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "taskvec"}
    if key and is_private(url):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirection)
    deadline = time.monotonic() + timeout_s
    try:
        with opener.open(request, timeout=timeout_s) as response:
            raw = _without(key, _read(response, deadline).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            raise _told(error, key) from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise LaterError(f"no reply within {timeout_s:g} s") from error
        raise LaterError(str(cause) or type(cause).__name__) from error
    try:
        return json.loads(raw)
    except ValueError as error:
        raise MalformedError(f"the server's reply is not JSON: {error}") from error


def read_key() -> str:
    """The key of the environment; empty: none.

    Raises:
        UsageError: it has a character that cannot be sent.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the environment variable {KEY} holds a character that no key has")
    return key


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    parts: list[bytes] = []
    while chunk := response.read1(1 << 16):
        parts.append(chunk)
        if time.monotonic() > deadline:  # a slow drip beats the time-out of a socket
            raise TimeoutError
        if sum(map(len, parts)) > MOST_BYTES:
            raise LaterError(f"the reply is longer than {MOST_BYTES >> 20} MiB")
    if response.length:
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _without(key: str, text: str) -> str:
    """A text of the server without the key, which it may repeat; short ones are no secret."""
    return text.replace(key, "…") if len(key) >= 12 else text


def _told(error: urllib.error.HTTPError, key: str) -> LaterError | RefusedError:
    """What a status means, with the server's own words, without the key that they may repeat."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    reason = f"HTTP {error.code}: {' '.join(_without(key, text).split())[:300] or error.reason}"
    if error.code in LATER or error.code >= 500:
        return LaterError(reason, _wait_s(error.headers.get("Retry-After", "")))
    return RefusedError(reason, all_of_them=error.code not in THIS_ONE)


def _wait_s(retry_after: str) -> float:
    """Seconds that a header `Retry-After` asks for, which has seconds or a date."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
