"""Requests to an OpenAI-compatible server, through the `openai` package.

The package builds requests, retries and waits. What it sends and receives passes one door here:
out goes one request to one address with headers that are listed here, so that `OPENAI_*` variables
change neither where it goes nor what it carries; in comes a body that is bounded in time and size
and has no key in it. Proxies of the environment serve HTTPS to other machines only, where they
cannot read what passes.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from types import TracebackType
from typing import Any

import anyio
import httpx2
import openai

from taskvec.evaluation.judges.client import (
    LaterError,
    MalformedError,
    RefusedError,
    clean,
    is_loopback,
    is_private,
    valid,
)

MOST_BYTES = 4 << 20  # of a reply
LATER = (408, 409, 429)  # besides 5xx: the same request may succeed later
THIS_ONE = (400, 413, 422)  # another request may succeed
RETRY_HEADERS = ("retry-after", "retry-after-ms")
PATH = "/chat/completions"


class Connection:
    """A server that answers chats; an asynchronous context manager.

    Args:
        url: Of the chat completions.
        key: For the header `Authorization`; empty: none is sent.
        timeout_s: For one try, from connecting to the last byte of the reply.
        retries: Further tries of a request that fails.
    """

    def __init__(self, url: str, *, key: str, timeout_s: float, retries: int) -> None:
        self._key, self._timeout_s = key, timeout_s
        self._client = openai.AsyncOpenAI(
            api_key="sent by the door",
            base_url=url.removesuffix(PATH),
            timeout=timeout_s,
            max_retries=retries,
            http_client=_Door(url, key, timeout_s),
        )

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def complete(self, body: dict[str, Any]) -> str:
        """The text of a chat completion.

        Args:
            body: The request, as JSON.

        Raises:
            LaterError: no connection, no reply in time, or a status that says so, after all tries.
            RefusedError: any other status of failure.
            MalformedError: the reply is not a complete chat completion.
        """
        failure: Exception
        try:
            response = await self._client.post(PATH, cast_to=httpx2.Response, body=_valid(body))
        except openai.APIStatusError as error:
            failure = self._status(error)
        except openai.APITimeoutError:
            failure = LaterError(f"no reply within {self._timeout_s:g} s")
        except openai.OpenAIError as error:
            failure = LaterError(str(error.__cause__ or error))
        else:
            return self._content(response.text)
        raise failure  # outside the handler: without the library's errors, which hold the reply

    def _status(self, error: openai.APIStatusError) -> Exception:
        """What a status means, in the server's own words."""
        text = error.response.text
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(text)["error"]["message"])
        words = " ".join(clean(text, self._key).split())[:300]
        code = error.status_code
        reason = f"HTTP {code}: {words or error.response.reason_phrase}"
        if code in LATER or code >= 500:
            return LaterError(reason)
        return RefusedError(reason, all_of_them=code not in THIS_ONE)

    def _content(self, text: str) -> str:
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"the server's reply is not JSON: {error}") from None
        try:
            choice = reply["choices"][0]
            content, ended = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise MalformedError("the server's reply is not a chat completion") from None
        if not isinstance(content, str):
            raise MalformedError("the judge's reply has no text")
        if ended == "length":
            raise MalformedError("the judge's reply was cut; raise max_tokens")
        return clean(content, self._key)


class _Door(httpx2.AsyncClient):
    """All that goes to the server and comes from it."""

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        uses_proxy = url.startswith("https:") and not is_loopback(url)
        super().__init__(trust_env=uses_proxy, follow_redirects=False, timeout=timeout_s)
        self._address, self._secret, self._limit_s = url, key, timeout_s

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        """Send what `request` asks for; errors hold the request of the library, without the key."""
        sent = httpx2.Request(
            "POST", self._address, headers=self._to_send(), content=request.content
        )
        failure: httpx2.HTTPError
        try:
            with anyio.fail_after(self._limit_s):
                response = await super().send(sent, stream=True, auth=None, follow_redirects=False)
                try:
                    content = await _read(response)
                finally:
                    await response.aclose()
        except (TimeoutError, httpx2.TimeoutException):
            failure = httpx2.ReadTimeout("no reply in time", request=request)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            failure = httpx2.ReadError(clean(_cause(error), self._secret), request=request)
        else:
            text = clean(content.decode("utf-8", "replace"), self._secret)
            names = [name for name in RETRY_HEADERS if name in response.headers]
            return httpx2.Response(
                response.status_code,
                headers={name: response.headers[name] for name in names},
                content=text.encode(),
                request=request,
            )
        raise failure  # outside the handler, so that nothing leads back to the server's words

    def _to_send(self) -> dict[str, str]:
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a compressed reply has no bound
            "Content-Type": "application/json",
            "User-Agent": "taskvec",
        }
        if self._secret and is_private(self._address):
            headers["Authorization"] = f"Bearer {self._secret}"
        return headers


async def _read(response: httpx2.Response) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx2.DecodingError("the reply is compressed, which was not asked for")
    parts = bytearray()
    async for part in response.aiter_raw():
        parts += part
        if len(parts) > MOST_BYTES:
            raise httpx2.ReadError(f"the reply is longer than {MOST_BYTES >> 20} MiB")
    return bytes(parts)


def _cause(error: BaseException) -> str:
    """The words of the operating system, if it is behind an error; else the error's own."""
    words, cause = str(error) or type(error).__name__, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            words = os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return words


def _valid(body: Any) -> Any:
    """A request without lone surrogates, which cannot be sent."""
    if isinstance(body, str):
        return valid(body)
    if isinstance(body, dict):
        return {name: _valid(value) for name, value in body.items()}
    return [_valid(value) for value in body] if isinstance(body, list) else body
