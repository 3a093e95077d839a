"""The server in operation: who may come in, what happens when things go wrong, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.server.keys import is_key, read_keys
from rl_mlx.server.settings import ServerSettings, seconds

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def body(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HI, **more}


class Endless:
    """A model that says ``a`` for ever; ``ended`` once its request was cancelled."""

    def __init__(self, tokenizer: Any, pause: float = 0.005) -> None:
        self.token = tokenizer.encode("a", add_special=False)[0]
        self.pause = pause
        self.running = 0
        self.ended = 0

    def __call__(self, request: Any) -> Iterator[int]:
        self.running += 1
        try:
            while True:
                time.sleep(self.pause)
                yield self.token
        finally:
            self.ended += 1


def test_health_ready_and_hello(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready", "loaded": ["demo"]}
    assert client.get("/").status_code == 200
    assert client.head("/").status_code == 200


def test_the_page(client: httpx.Client) -> None:
    """Browsers get a page that loads nothing from elsewhere and runs nothing of an answer's."""
    reply = client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("page.css", "page.js"):
        assert f'"{name}"' in reply.text
        part = client.get(f"/{name}")
        assert part.status_code == 200
        assert part.headers["x-content-type-options"] == "nosniff"
        assert "http" not in part.text.replace("http-equiv", "")
    assert "innerHTML" not in client.get("/page.js").text
    assert client.get("/", headers={"accept": "*/*"}).text == "rl-mlx is running\n"


@pytest.mark.parametrize(
    ("path", "at"),
    [("/v1/nothing", ("error", "message")), ("/api/nothing", ("error",)),
     ("/v1/messages/x", ("error", "message"))],
)  # fmt: skip
def test_unknown_paths_in_the_shape_of_the_api(
    client: httpx.Client, path: str, at: tuple[str, ...]
) -> None:
    reply = client.get(path)
    assert reply.status_code == 404
    value = reply.json()
    for name in at:
        value = value[name]
    assert isinstance(value, str)
    assert value.startswith("there is nothing at")
    reply = client.get(CHAT)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["error"]["message"] == f"{CHAT} takes POST"


def test_a_client_that_leaves_a_stream_is_cancelled(fake: Any, client: httpx.Client) -> None:
    fake.reply = endless = Endless(fake.tokenizer)
    with client.stream("POST", CHAT, json=body(stream=True)) as reply:
        next(reply.iter_lines())
    fake.wait(lambda: endless.ended == 1)
    fake.wait(lambda: fake.state.gate.active == 0)


def test_a_client_that_leaves_a_whole_answer_is_cancelled(fake: Any) -> None:
    fake.reply = endless = Endless(fake.tokenizer)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(fake.url + CHAT, json=body(), timeout=0.3)
    fake.wait(lambda: endless.ended == 1)
    fake.wait(lambda: fake.state.gate.active == 0)


def test_a_failure_before_the_stream_has_its_status(fake: Any, client: httpx.Client) -> None:
    def fail(request: Any) -> Iterator[int]:
        raise EngineError("the device is gone")
        yield 0

    fake.reply = fail
    reply = client.post(CHAT, json=body(stream=True))
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "the device is gone"
    fake.reply = None
    assert client.post(CHAT, json=body()).status_code == 200, "the next one gets its answer"


def test_a_failure_in_the_stream_is_its_last_event(fake: Any, client: httpx.Client) -> None:
    def fail(request: Any) -> Iterator[int]:
        yield fake.tokenizer.encode("a")[0]
        time.sleep(0.05)
        raise EngineError("the device is gone")

    fake.reply = fail
    reply = client.post(CHAT, json=body(stream=True))
    assert reply.status_code == 200
    events = [line for line in reply.text.split("\n\n") if line]
    assert json.loads(events[-1][6:])["error"]["message"] == "the device is gone"
    assert "[DONE]" not in reply.text


def test_comments_keep_a_quiet_stream_alive(fake: Any, client: httpx.Client) -> None:
    def slowly(request: Any) -> Iterator[int]:
        time.sleep(0.9)
        yield from fake.tokenizer.encode("done")

    fake.reply = slowly
    with client.stream("POST", CHAT, json=body(stream=True)) as reply:
        lines = list(reply.iter_lines())
    assert lines[0].startswith(":"), "the quiet time of this server is 0.2 s"
    assert lines[-2] == "data: [DONE]"


def test_too_many_requests(start_fake: Any) -> None:
    small = start_fake(queue=2, quiet=0.1)
    small.reply = endless = Endless(small.tokenizer)
    with httpx.Client(base_url=small.url) as client:
        streams = [client.stream("POST", CHAT, json=body(stream=True)) for _ in range(2)]
        for stream in streams:
            stream.__enter__()
        reply = client.post(CHAT, json=body())
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert client.get("/v1/models").status_code == 200, "what makes no model work is let in"
        for stream in streams:
            stream.__exit__(None, None, None)
        small.wait(lambda: small.state.gate.active == 0)
        small.reply = None
        assert client.post(CHAT, json=body()).status_code == 200
    assert endless.running >= 1


def test_bodies_too_large_and_too_slow(start_fake: Any) -> None:
    small = start_fake(body_limit=1000, body_time=0.3, head_time=0.3)
    with httpx.Client(base_url=small.url) as client:
        for size in (2000, 3_000_000):
            reply = client.post(CHAT, content=b"x" * size)
            assert reply.status_code == 413, size
            assert "1000" in reply.json()["error"]["message"]
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx"
        )
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection((host, int(port)), 5) as loris:
        loris.sendall(b"POST /v1/comp")
        assert loris.recv(1000) == b"", "a head that does not come ends the connection"


def test_a_client_that_never_reads_holds_no_slot(start_fake: Any) -> None:
    small = start_fake(stall_time=0.4)
    small.reply = endless = Endless(small.tokenizer, pause=0)
    host, port = small.url.removeprefix("http://").split(":")
    content = json.dumps(body(stream=True)).encode()
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        silent.sendall(head.encode() + content)
        small.wait(lambda: small.state.gate.active == 1)
        small.wait(lambda: small.state.gate.active == 0, 20)
    small.wait(lambda: endless.ended == 1)


def test_keys(start_fake: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"second-key-of-16-or-more").hexdigest()
    file.write_text(f"# ours\nfirst-key-of-16-or-more  # Ann\n\nsha256:{digest}\n")
    keyed = start_fake(keys=read_keys(file))
    with httpx.Client(base_url=keyed.url) as client:
        for path in ("/v1/models", "/metrics", "/api/tags", "/v1/messages"):
            assert client.get(path).status_code == 401, path
        for path in ("/health", "/ready", "/", "/page.js"):
            assert client.get(path).status_code == 200, path
        for headers in (
            {"authorization": "Bearer first-key-of-16-or-more"},
            {"x-api-key": "second-key-of-16-or-more"},
        ):
            assert client.get("/v1/models", headers=headers).status_code == 200
        wrong = client.get("/v1/models", headers={"authorization": "Bearer nonsense"})
        assert wrong.status_code == 401
        assert wrong.json()["error"]["code"] == "invalid_api_key"


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for text, words in (("# none", "no API key"), ("short", "shorter")):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=words):
            read_keys(file)
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_keys(tmp_path / "none")
    assert not is_key("", [])


def test_another_address_needs_a_key_or_insecure() -> None:
    with pytest.raises(InvalidRequest, match="--insecure"):
        ServerSettings(host="0.0.0.0")
    with pytest.raises(InvalidRequest, match="--insecure"):
        ServerSettings(host="example.org")
    ServerSettings(host="0.0.0.0", insecure=True)
    ServerSettings(host="0.0.0.0", keys=frozenset([b"x"]))
    for loopback in ("127.0.0.1", "::1", "localhost"):
        ServerSettings(host=loopback)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8642"}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "127.0.0.1:1"}, 200),
        ({"host": "[::1]:1"}, 200),
        ({"host": "app.localhost"}, 200),
        ({"host": "["}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:5", "origin": "http://localhost:5"}, 200),
        ({"host": "localhost:5", "origin": "http://localhost:6"}, 403),
    ],
)
def test_host_and_origin(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    assert client.get("/v1/models", headers=headers).status_code == status


def test_cors_is_off_unless_named(start_fake: Any, client: httpx.Client) -> None:
    page = {"origin": "https://page.example"}
    asks = {**page, "access-control-request-method": "POST"}
    assert client.options(CHAT, headers=asks).status_code == 403
    named = start_fake(origins=("https://page.example",), hosts=("models.lan",))
    with httpx.Client(base_url=named.url) as other:
        reply = other.options(CHAT, headers=asks)
        assert reply.headers["access-control-allow-origin"] == page["origin"]
        reply = other.get("/v1/models", headers={**page, "host": "models.lan"})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == page["origin"]
        assert other.get("/v1/models", headers={"origin": "https://x.example"}).status_code == 403


def test_connections_are_kept_and_requests_have_ids(client: httpx.Client) -> None:
    reply = client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == reply.headers["request-id"] == "mine-1"
    reply = client.get("/v1/models", headers={"x-request-id": "two words"})
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.headers.get("connection") != "close"


def test_metrics(fake: Any, client: httpx.Client) -> None:
    def read() -> dict[str, str]:
        text = client.get("/metrics").text
        return dict(li.rsplit(" ", 1) for li in text.splitlines() if not li.startswith("#"))

    client.post(CHAT, json=body())
    name = 'rl_mlx_requests_total{model="demo",path="/v1/chat/completions",status="200"}'
    fake.wait(lambda: name in read())
    lines = read()
    assert float(lines[name]) >= 1
    assert float(lines['rl_mlx_generated_tokens_total{model="demo"}']) >= 1
    assert float(lines['rl_mlx_time_to_first_token_seconds_count{model="demo"}']) >= 1
    assert lines['rl_mlx_batch_size{model="demo"}'] == "0.0"
    assert lines["rl_mlx_requests_active"] == "0.0"


def test_durations() -> None:
    assert seconds(5, "t") == 5
    assert seconds("1h30m", "t") == 5400
    assert seconds("250ms", "t") == 0.25
    assert seconds(-1, "t") is None
    assert seconds("-1", "t") is None
    for bad in ("soon", "", "5x", None, True):
        with pytest.raises(InvalidRequest):
            seconds(bad, "t")


def test_a_model_is_told_to_stop_in_the_middle(start_fake: Any) -> None:
    going = start_fake(grace=0.3)
    going.reply = endless = Endless(going.tokenizer)
    with httpx.Client(base_url=going.url) as client:
        with client.stream("POST", CHAT, json=body(stream=True)) as reply:
            lines = reply.iter_lines()
            next(lines)
            stopper = threading.Thread(target=going.stop)
            stopper.start()
            rest = [line for line in lines if line]
        stopper.join()
    assert "going down" in json.loads(rest[-1][6:])["error"]["message"]
    assert endless.ended == 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(going.url + "/health")


def test_sigterm_finishes_what_runs(start_program: Any) -> None:
    program = start_program("demo", "--log-json", "--grace", "20s", "--alias", "gpt=demo")
    secret = "the raven flies at midnight"
    asked = {"model": "gpt", "messages": [{"role": "user", "content": secret}], "max_tokens": 12}
    with httpx.Client(base_url=program.url, timeout=30) as client:
        with client.stream("POST", CHAT, json={**asked, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(program.pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "what ran was finished"
    assert program.stop() == 0
    logged = [json.loads(line) for line in program.lines if line.startswith("{")]
    (entry,) = [e for e in logged if e["message"] == f"POST {CHAT}"]
    assert entry["status"] == 200
    assert entry["model"] == "demo"
    assert entry["request"].startswith("req_")
    assert secret not in "".join(program.lines)


def test_a_prompt_over_the_context(program: Any) -> None:
    long = body(messages=[{"role": "user", "content": "fox " * 40_000}])
    reply = httpx.post(program.url + CHAT, json=long, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_the_program_says_what_is_wrong(start_program: Any, program: Any) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "rl_mlx.cli.main", *arguments],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    port = program.url.rpartition(":")[2]
    code, words = run("serve", "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in words
    code, words = run("serve", "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "--insecure" in words
    code, words = run("serve", "./no-such.gguf", "--port", "0")
    assert code == 1
    assert "no-such.gguf" in words
    assert len(words.strip().splitlines()) == 1
    code, words = run("ps", "--url", program.url)
    assert code == 0
    assert words.startswith("demo")
    assert "for ever" in words
    code, words = run("ps", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert "rl-mlx serve" in words


def test_unix_socket(start_program: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = start_program("--socket", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://anything.example/ready").json()["status"] == "ready"
    assert program.stop(signal.SIGINT) == 0
    assert not path.exists()
