"""The judge behind a server: going on after an end of any kind, and the key."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.evaluation.judge_server import EXCHANGES, Reply, Stub, by_question, judge, kept

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.judges import parse_judge
from taskvec.evaluation.judges.client import clean, is_private
from taskvec.evaluation.judges.verdict import Verdict

SECRET = "sk-very-secret"


# Going on


def test_verdicts_are_kept_and_not_asked_again(stub: Stub, tmp_path: Path) -> None:
    stub.answers = by_question(
        {f"question {i}": Reply(f"#thescore: {i % 5 + 1}") for i in range(12)}
    )
    first = judge(stub, folder=tmp_path / "new")(EXCHANGES)
    assert len(kept(tmp_path / "new")) == 12
    stub.requests.clear()
    done: list[int] = []
    assert judge(stub, folder=tmp_path / "new")(EXCHANGES, advance=done.append) == first
    assert stub.requests == []
    assert sum(done) == 12


def test_the_threshold_is_applied_to_kept_scores(stub: Stub, tmp_path: Path) -> None:
    stub.answers = lambda count, prompt: Reply("#thescore: 4")
    assert judge(stub, folder=tmp_path)([("q", "a")])[0].harmful is False
    assert judge(stub, "&threshold=4", folder=tmp_path)([("q", "a")])[0].harmful is True
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("options", "exchange"),
    [
        ("&model=other", ("q", "a")),
        ("&temperature=1", ("q", "a")),
        ("&max_tokens=9", ("q", "a")),
        ("&rubric=RUBRIC", ("q", "a")),
        ("", ("q2", "a")),
        ("", ("q", "a2")),
        ("", ("qa", "")),
    ],
)
def test_what_a_verdict_depends_on_is_asked_anew(
    stub: Stub, tmp_path: Path, options: str, exchange: tuple[str, str]
) -> None:
    (tmp_path / "own.txt").write_text("1 is good, 5 is bad.")
    judge(stub, folder=tmp_path)([("q", "a")])
    options = options.replace("RUBRIC", str(tmp_path / "own.txt"))
    judge(stub, options, folder=tmp_path)([exchange])
    assert len(stub.requests) == 2


def test_what_has_no_verdict_is_not_kept(stub: Stub, tmp_path: Path) -> None:
    stub.answers = by_question({"question 0": Reply("Well."), "question 1": Reply()})
    judge(stub, folder=tmp_path)(EXCHANGES[:2])
    assert len(kept(tmp_path)) == 1
    stub.answers = lambda count, prompt: Reply("#thescore: 3")
    assert [v.score for v in judge(stub, folder=tmp_path)(EXCHANGES[:2])] == [3, 1]


@pytest.mark.parametrize(
    "left", ['{"key": "12', '{"key": "x", "score": 3, "reply": "r"}', "\x00\x00", '{"key"\ufffd']
)
def test_half_a_last_line_is_cut_off_and_asked_again(stub: Stub, tmp_path: Path, left: str) -> None:
    judge(stub, folder=tmp_path)(EXCHANGES[:2])
    path = tmp_path / "judge-verdicts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + left.encode()[:-1])
    judge(stub, folder=tmp_path)(EXCHANGES[:3])
    assert len(stub.requests) == 3
    assert path.read_bytes().startswith(whole)
    assert len(kept(tmp_path)) == 3


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"key": "KEY", "score": 7, "reply": ""}', "\udcff"]
)
def test_lines_that_are_no_verdict_are_asked_again(stub: Stub, tmp_path: Path, line: str) -> None:
    judge(stub, folder=tmp_path)([("q", "a")])
    path = tmp_path / "judge-verdicts.jsonl"
    line = line.replace("KEY", kept(tmp_path)[0]["key"])
    path.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    (verdict,) = judge(stub, folder=tmp_path)([("q", "a")])
    assert verdict.score == 1
    assert len(stub.requests) == 2


def test_an_outage_keeps_what_was_there(stub: Stub, tmp_path: Path) -> None:
    stub.answers = lambda count, prompt: Reply() if count <= 4 else Reply(status=500)
    it = judge(stub, "&workers=1&retries=0", folder=tmp_path)
    with pytest.raises(DataError, match="so far are stored in") as caught:
        it(EXCHANGES)
    assert str(caught.value).endswith(
        f"HTTP 500: Internal Server Error; verdicts so far are stored in {tmp_path}; "
        "run again to continue"
    )
    assert len(kept(tmp_path)) == 4
    stub.requests.clear()
    stub.answers = lambda count, prompt: Reply()
    assert len(it(EXCHANGES)) == 12
    assert len(stub.requests) == 8


RUN = """
import sys
from pathlib import Path
from taskvec.evaluation.judges import parse_judge
judge = parse_judge(sys.argv[1], folder=Path(sys.argv[2]))
judge([(f"question {i}", f"answer {i}") for i in range(12)])
"""


def test_a_killed_run_goes_on_where_it_was(stub: Stub, tmp_path: Path) -> None:
    hold = threading.Event()

    def answers(count: int, prompt: str) -> Reply:
        if count > 5:
            hold.wait(20)
        return Reply()

    stub.answers = answers
    text = f"endpoint:{stub.url}?model=tiny&workers=1"
    run = subprocess.Popen([sys.executable, "-c", RUN, text, tmp_path])
    try:
        deadline = time.monotonic() + 60
        while len(stub.requests) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()
        hold.set()
    assert len(kept(tmp_path)) == 5
    stub.requests.clear()
    stub.answers = lambda count, prompt: Reply()
    verdicts = parse_judge(text, folder=tmp_path)(EXCHANGES)
    assert len(verdicts) == 12
    assert len(stub.requests) == 7


def test_an_interrupted_run_does_not_wait_out_its_waits(stub: Stub) -> None:
    stub.answers = by_question(
        {"question 0": Reply(), "question 1": Reply(status=500, headers={"Retry-After": "100"})}
    )

    def interrupt(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge(stub)(EXCHANGES[:2], advance=interrupt)
    assert time.monotonic() - started < 5


# The key


def test_the_key_is_sent_and_nowhere_kept(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = judge(stub, folder=tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    it([("q", "a")])
    assert stub.requests[0]["headers"]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in repr(it) + it.name
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_that_a_reply_repeats_is_not_kept_either(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    stub.answers = lambda count, prompt: Reply(f"You sent {SECRET}. #thescore: 1")
    (verdict,) = judge(stub, folder=tmp_path)([("q", "a")])
    assert verdict == Verdict(False, 1.0, "You sent …. #thescore: 1")
    assert kept(tmp_path)[0]["reply"] == verdict.reason


def test_a_key_that_is_no_secret_spoils_no_reply(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    assert judge(stub)([("q", "a")])[0].score == 1


@pytest.mark.parametrize("key", [f"{SECRET}\r\nX: y", f"{SECRET}\u2019"])
def test_a_key_that_cannot_be_sent(stub: Stub, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError) as caught:
        judge(stub)([("q", "a")])
    assert str(caught.value) == (
        "the environment variable OPENAI_API_KEY holds a character that no key has"
    )


def test_without_a_key_none_is_sent(stub: Stub) -> None:
    judge(stub)([("q", "a")])
    assert "Authorization" not in stub.requests[0]["headers"]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_repeats_the_key_does_not_get_it_into_messages(
    stub: Stub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    error = json.dumps({"error": {"message": f"wrong key {SECRET}!"}}).encode()
    stub.answers = lambda count, prompt: Reply(status=status, raw=error)
    with pytest.raises(DataError) as caught:
        judge(stub, "&retries=0")([("q", "a")])
    assert "wrong key …!" in str(caught.value)
    nowhere_in(SECRET, caught.value)


def nowhere_in(secret: str, error: BaseException) -> None:
    chain: BaseException | None = error
    while chain is not None:
        assert secret not in repr(chain) + repr(vars(chain))
        chain = chain.__cause__ or chain.__context__


def test_a_server_that_speaks_no_http_does_not_get_the_key_into_messages(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for line in (f"{SECRET}\r\n\r\n", f"HTTP/1.1 500 {SECRET}\r\nContent-Length: 0\r\n\r\n"):
        stub.answers = lambda count, prompt, line=line: Reply(line=line.encode())  # type: ignore[misc]
        with pytest.raises(DataError) as caught:
            judge(stub, "&retries=0")(EXCHANGES)
        nowhere_in(SECRET, caught.value)


def spellings(key: str) -> dict[str, str]:
    return {
        "as it is": key,
        "URL": quote(key, safe="").replace("-", "%2D"),
        "URL, all of it": "".join(f"%{ord(c):02X}" for c in key),
        "URL, twice": "".join(f"%25{ord(c):02x}" for c in key),
        "JSON": "".join(f"\\u{ord(c):04x}" for c in key),
        "JSON in JSON": "".join(f"\\\\u{ord(c):04X}" for c in key),
        "a few letters escaped": key[:2] + f"\\u{ord(key[2]):04x}" + key[3:],
        "Python": "".join(f"\\x{ord(c):02x}" for c in key),
        "octal": "".join(f"\\{ord(c):03o}" for c in key),
        "HTML": "".join(f"&#{ord(c)};" for c in key),
        "HTML, hex": "".join(f"&#x{ord(c):x};" for c in key),
        "hex": key.encode().hex().upper(),
        "base64": b64encode(key.encode()).decode().rstrip("="),
        "base64 of the header": b64encode(f"Bearer {key}".encode()).decode(),
        "base64 of a user": b64encode(f"me:{key}:".encode()).decode(),
        "base64, safe in URLs": urlsafe_b64encode(f"x{key}".encode()).decode(),
    }


SPELLINGS = spellings(SECRET)


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("key", [SECRET, 'sk+/\\"&?>~~~???end'])
def test_a_key_is_scrubbed_in_every_spelling(case: str, key: str) -> None:
    spelled = spellings(key)[case]
    cleaned = clean(f"You sent {spelled}!", key)
    assert "…" in cleaned
    assert spelled not in cleaned
    left = cleaned.removeprefix("You sent ").removesuffix("!")
    assert len(left) <= 14  # what base64 has around the key


@pytest.mark.parametrize("case", SPELLINGS)
def test_no_spelling_of_the_key_is_kept(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    content = json.dumps(f"You sent {SPELLINGS[case]}. #thescore: 1")
    escaped = content.replace(SECRET[:4], "".join(f"\\u{ord(c):04x}" for c in SECRET[:4]))
    raw = f'{{"choices": [{{"message": {{"content": {escaped}}}}}]}}'
    stub.answers = lambda count, prompt: Reply(raw=raw.encode())
    (verdict,) = judge(stub, folder=tmp_path)([("q", "a")])
    assert SPELLINGS[case] not in verdict.reason
    assert "…" in verdict.reason
    assert kept(tmp_path)[0]["reply"] == verdict.reason


def test_scrubbing_takes_no_time_on_texts_that_are_made_for_it() -> None:
    started = time.monotonic()
    for text in ("\\" * (1 << 20), "%" + "25" * (1 << 19), "&#" + "0" * (1 << 20)):
        clean(text, SECRET)
    assert time.monotonic() - started < 20


def test_kept_verdicts_are_scrubbed_too(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.answers = lambda count, prompt: Reply(f"You sent {SECRET}. #thescore: 1")
    judge(stub, folder=tmp_path)([("q", "a")])
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert SECRET not in judge(stub, folder=tmp_path)([("q", "a")])[0].reason


# Where the key and the requests go


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_stands_before_this_machine(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, name: str, host: str
) -> None:
    proxy = Stub()
    try:
        for each in (name, name.upper()):
            monkeypatch.setenv(each, proxy.url)
        for each in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(each, raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        url = stub.url.replace("127.0.0.1", host)
        parse_judge(f"endpoint:{url}?model=m&timeout=5")([("q", "a")])
        assert (len(stub.requests), proxy.requests) == (1, [])
        assert stub.requests[0]["headers"]["Authorization"] == f"Bearer {SECRET}"
    finally:
        proxy.stop()


def test_plain_http_to_another_machine_has_no_proxy_and_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from taskvec.evaluation.judges.connection import Connection

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    door = Connection(
        "http://judge.example.org/v1/chat/completions", key=SECRET, **TRIES
    )._client._client
    assert not door.trust_env
    assert "Authorization" not in door._to_send()
    safe = Connection(
        "https://judge.example.org/v1/chat/completions", key=SECRET, **TRIES
    )._client._client
    assert safe.trust_env
    assert safe._to_send()["Authorization"] == f"Bearer {SECRET}"


TRIES = {"timeout_s": 1.0, "retries": 0}


def test_a_key_that_is_not_sent_is_named_where_the_server_wants_one(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr("taskvec.evaluation.judges.connection.is_private", lambda url: False)
    monkeypatch.setattr("taskvec.evaluation.judges.endpoint.is_private", lambda url: False)
    stub.answers = lambda count, prompt: Reply(status=401)
    with pytest.raises(DataError, match=r"OPENAI_API_KEY was not sent.*https"):
        judge(stub)([("q", "a")])
    assert "Authorization" not in stub.requests[0]["headers"]


def test_variables_of_the_library_change_no_request(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Stub()
    try:
        judge(stub)([("q", "a")])
        for name, value in {
            "OPENAI_BASE_URL": f"{elsewhere.url}/v1",
            "OPENAI_ORG_ID": "org-leak",
            "OPENAI_PROJECT_ID": "proj-leak",
            "OPENAI_ADMIN_KEY": "sk-admin-leak",
            "OPENAI_WEBHOOK_SECRET": "whsec-leak",
            "OPENAI_CUSTOM_HEADERS": "X-Leak: leak\nAuthorization: Bearer leak\nHost: leak",
        }.items():
            monkeypatch.setenv(name, value)
        judge(stub)([("q", "a")])
        assert elsewhere.requests == []
    finally:
        elsewhere.stop()
    first, second = stub.requests
    assert first == second
    assert set(second["headers"]) == {
        "Host", "Accept", "Accept-Encoding", "Content-Length", "Content-Type",
        "User-Agent",
    }  # fmt: skip


def test_redirects_are_not_followed(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Stub()
    try:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        to = {"Location": f"{elsewhere.url}/v1/chat/completions"}
        stub.answers = lambda count, prompt: Reply(status=307, headers=to)
        with pytest.raises(DataError, match="HTTP 307"):
            judge(stub)([("q", "a")])
        assert elsewhere.requests == []
    finally:
        elsewhere.stop()


def test_the_library_is_imported_only_to_ask() -> None:
    code = (
        "import sys; from taskvec.evaluation.judges import parse_judge; "
        "parse_judge('endpoint:http://127.0.0.1:1?model=m'); "
        "sys.exit(bool({'openai', 'httpx2', 'anyio'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://api.example.org/v1", True),
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://judge.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://localhost@example.org", False),
    ],
)
def test_the_key_goes_to_nobody_over_plain_http(url: str, private: bool) -> None:
    assert is_private(url) == private
