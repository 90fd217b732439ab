"""A server on this machine that misbehaves as told, for the tests of the judge behind one."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from taskvec.evaluation.judges import parse_judge

EXCHANGES = [(f"question {i}", f"answer {i}") for i in range(12)]


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    text: str | None = "#thescore: 1"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # instead of a completion
    ended: str = "stop"
    stall_s: float = 0.0
    drip_s: float = 0.0  # between bytes
    drips_headers: bool = False
    reset: bool = False
    cut: bool = False  # fewer bytes than announced
    line: bytes | None = None  # all that is sent, from the status line on

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return b""
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.ended}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


class Stub:
    """A server on this machine; `answers` says what it does."""

    def __init__(self) -> None:
        self.answers: Callable[[int, str], Reply] = lambda count, prompt: Reply()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.requests.append(
                        {"path": self.path, "headers": dict(self.headers), "body": body}
                    )
                    stub.times.append(time.monotonic())
                    count = len(stub.requests)
                    stub.at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub.at_once)
                answer = stub.answers(count, body["messages"][0]["content"])
                time.sleep(answer.stall_s)
                with lock:  # before the judge can see the answer and ask again
                    stub.at_once -= 1
                with suppress(OSError):  # the judge did not wait
                    self.reply(answer)

            def reply(self, reply: Reply) -> None:
                if reply.reset:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
                    return
                if reply.line is not None or (reply.drip_s and reply.drips_headers):
                    for byte in reply.line or b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(reply.drip_s)
                    return
                raw = reply.body()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw) + 10 * reply.cut))
                self.end_headers()
                for byte in raw if reply.drip_s else ():
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(reply.drip_s)
                if not reply.drip_s:
                    self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def prompts(self) -> list[str]:
        return [request["body"]["messages"][0]["content"] for request in self.requests]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def judge(stub: Stub, options: str = "", **more: Any) -> Any:
    text = f"endpoint:{stub.url}/v1?model=tiny&timeout=5{options}"
    return parse_judge(text, **more)


def by_question(scores: dict[str, Reply]) -> Callable[[int, str], Reply]:
    """What the server does, by a word of the prompt."""

    def answers(count: int, prompt: str) -> Reply:
        (found,) = [reply for word, reply in scores.items() if word + "\n" in prompt]
        return found

    return answers


def kept(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "judge-verdicts.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]
