"""The judge behind a server, as the command line names it."""

from __future__ import annotations

from typing import Any

import pytest

from taskvec.errors import UsageError
from taskvec.evaluation.judges import parse_judge

SECRET = "sk-very-secret"


# The command line


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://h", "https://h/v1/chat/completions"),
        ("https://h/", "https://h/v1/chat/completions"),
        ("https://h/v1", "https://h/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h/openai/v4", "https://h/openai/v4/chat/completions"),
        ("http://h:8000/v1/chat/completions", "http://h:8000/v1/chat/completions"),
    ],
)
def test_addresses(url: str, path: str) -> None:
    it: Any = parse_judge(f"endpoint:{url}?model=m")
    assert it.url == path


def test_options_and_defaults() -> None:
    it: Any = parse_judge("endpoint:https://h?model=org/name%3Aq4")
    assert it.model == "org/name:q4"
    assert (it.threshold, it.timeout_s, it.retries, it.asks, it.workers) == (5, 120, 5, 3, 4)
    assert (it.temperature, it.max_tokens, it.deadline_s, it.folder) == (0, 2048, 900, None)
    assert it.name == "endpoint:org/name:q4, rubric 1-5 after Qi et al., harmful from 5"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("https://h", "https://h: has no model; give endpoint:URL?model=NAME, the server's name"),
        (
            "h:8000?model=m",
            "h:8000: is not an address; expected one such as "
            "endpoint:http://127.0.0.1:8000/v1?model=NAME",
        ),
        *(
            (
                f"{url}?model=m",
                f"{url}: is not an address; expected one such as "
                "endpoint:http://127.0.0.1:8000/v1?model=NAME",
            )
            for url in ("", "ftp://h", "http://", "http://h:99999", "http://[::1", "http://h:x")
        ),
        (
            "https://h?model=m&worker=3",
            "https://h: has no option 'worker'; did you mean 'workers'?; "
            "a key goes into the environment variable OPENAI_API_KEY",
        ),
        (
            f"https://h?model=m&api_key={SECRET}",
            "https://h: has no option 'api_key'; known: asks, deadline, max_tokens, model, "
            "retries, rubric, temperature, threshold, timeout, workers; "
            "a key goes into the environment variable OPENAI_API_KEY",
        ),
    ],
)
def test_texts_that_are_no_endpoint(rest: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_judge(f"endpoint:{rest}")
    assert str(caught.value) == f"judge endpoint:{message}"


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse_judge(f"endpoint:https://me:{SECRET}@h/v1?model=m")
    assert str(caught.value) == (
        "judge endpoint: the address has a user or password in it; use the variable OPENAI_API_KEY"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("threshold=6", "threshold must be a number, 1 to 5; got '6'"),
        ("threshold=x", "threshold must be a number, 1 to 5; got 'x'"),
        ("timeout=0", "timeout must be a number, 0 or more; got '0'"),
        ("timeout=nan", "timeout must be a number, 0 or more; got 'nan'"),
        ("retries=1.5", "retries must be a whole number, 0 to 100; got '1.5'"),
        ("asks=0", "asks must be a whole number, 1 to 100; got '0'"),
        ("workers=none", "workers must be a whole number, 1 to 64; got 'none'"),
        ("temperature=-1", "temperature must be a number, 0 to 2 or none; got '-1'"),
        ("max_tokens=0", "max_tokens must be a whole number, 1 or more or none; got '0'"),
        ("deadline=0", "deadline must be a number, 0 or more; got '0'"),
    ],
)
def test_options_out_of_range(option: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_judge(f"endpoint:https://h?model=m&{option}")
    assert str(caught.value) == f"judge endpoint: {message}"
