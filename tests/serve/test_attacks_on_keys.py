"""Attacks on who may ask: keys, pages of other origins, and paths that lead out of the page's folder.

Each test is an attack that works on a server written without it in mind; docs/security.md names them one by one.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.datastructures import Headers

from litchi.serve.guard import Guard, is_open
from litchi.serve.run import ServeConfig, uvicorn_config
from tests.serve.test_attacks import ASK, CHAT, HERE, exceptions, get, send, world_of

# ---- keys ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(served_by) -> Iterator[object]:
    with served_by(api_key="open sesame") as served:
        yield served


def endpoints(painter, white_tile) -> set[tuple[str, str]]:
    """(method, path) of every route that the application has."""
    app = uvicorn_config(ServeConfig(port=0), painter(), lambda name, seed: white_tile()).app
    left, found = list(app.routes), set()
    while left:
        route = left.pop()
        inner = getattr(route, "original_router", None)
        left += inner.routes if inner is not None else []
        for method in getattr(route, "methods", None) or ():
            found.add((method, route.path.replace("{name}", "tiny").replace("{id}", "resp_1")))
    return found


def test_every_endpoint_but_the_page_asks_for_the_key(locked, painter, white_tile) -> None:
    known = endpoints(painter, white_tile)
    assert {("GET", "/metrics"), ("POST", CHAT), ("POST", "/tokenize"), ("GET", "/openapi.json")} <= known
    with httpx.Client(base_url=locked.url) as client:
        for method, path in known:
            answer = client.request(method, path)
            assert (answer.status_code == 401) != is_open(path), (method, path, answer.status_code)


OTHERS = "invocations pause resume load score rerank pooling classify sleep wake_up collective_rpc reset_prefix_cache "
OTHERS += "update_weights start_profile stop_profile slots props server_info flush_cache get_model_info ping version "
OTHERS += "docs redoc admin debug v1/load_lora_adapter v1/audio/transcriptions v2/embed inference/v1/generate"


def test_paths_that_other_servers_leave_open_are_closed(locked) -> None:
    with httpx.Client(base_url=locked.url) as client:
        for path in OTHERS.split():
            for method in ("GET", "POST"):
                assert client.request(method, f"/{path}").status_code == 401, (method, path)


def test_no_spelling_of_a_path_goes_round_the_key(locked) -> None:
    tricks = ["//v1/models", "/./v1/models", "/web/../v1/models", "/web/%2e%2e/v1/models", "/web/..%2fv1%2fmodels"]
    tricks += ["/health/../v1/models", "/health%00/../v1/models", "/v1/models/", "/V1/models", "/v1/models;/health"]
    tricks += ["/v1/models?/web/", "/v1/models#/health", "/%76%31/models", "/v1%2fmodels", "/health%3f/../v1/models"]
    tricks += ["http://x/health/../v1/models", "/web/%2e%2e%2fmetrics", "/favicon.ico/../metrics", "/web//../metrics"]
    for target in tricks:
        status, answer = get(locked.url, target)
        assert status >= 300 and b"litchi_" not in answer and b'"owned_by"' not in answer, (target, answer)


def test_no_spelling_of_a_key_is_taken_for_it(locked) -> None:
    right = "open sesame"
    wrong = ["", "Bearer", "Bearer ", "Bearer open", f"Bearer {right}x", f"Basic {right}", f"Bearer {right.upper()}"]
    wrong += [f"Bearer {right}\x00", "Bearer null", "Bearer undefined", f"Bearer x {right}", f"{right}", "Bearer *"]
    for value in wrong:
        line = f"Authorization: {value}"
        assert get(locked.url, "/v1/models", line)[0] in (400, 401), value
    for line in ("X-Api-Key: open sesame", "Sec-WebSocket-Protocol: litchi-key.!!", "Cookie: key=open sesame"):
        assert get(locked.url, "/v1/models", line)[0] == 401, line
    assert get(locked.url, f"/v1/models?key={right.replace(' ', '%20')}")[0] == 401
    assert get(locked.url, "/v1/models", f"Authorization: Bearer {right}")[0] == 200


def test_how_long_a_refusal_takes_does_not_tell_how_much_of_the_key_was_right(monkeypatch) -> None:
    """With a key of a million bytes `==` takes 15 % longer for a wrong end than for a wrong beginning (measured)."""
    key = "k" * 1_000_000
    guard = Guard(None, key, ())  # type: ignore[arg-type]
    begins, ends = (Headers({"authorization": f"Bearer {each}"}) for each in ("x" + key[1:], key[:-1] + "x"))
    least = {"begins": 1.0, "ends": 1.0}
    for count in range(2000):
        if count >= 40 and 0.93 < least["ends"] / least["begins"] < 1.07:
            break  # on a busy machine it takes longer until both have been undisturbed once
        for name, headers in (("begins", begins), ("ends", ends)):
            began = time.perf_counter()
            assert not guard._knows(headers)
            least[name] = min(least[name], time.perf_counter() - began)
    assert 0.93 < least["ends"] / least["begins"] < 1.07, least
    seen: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(seen.append((a, b))))
    assert not guard._knows(begins) and len(seen) == 1


# ---- pages of others ----------------------------------------------------------------------------------------------


def test_a_name_that_a_stranger_points_at_loopback_is_not_answered(door) -> None:
    """DNS rebinding: the page's own origin is then evil.example, and only the Host header says so."""
    port = urlsplit(door.url).port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "[::",
        "0x7f000001",
        "2130706433",
    ):
        assert get(door.url, "/v1/models", f"Host: {host}")[0] in (400, 403), host
    for host in (f"127.0.0.1@evil.example:{port}", "localhost.", "127.0.0.1\tevil.example"):
        assert get(door.url, "/v1/models", f"Host: {host}")[0] in (400, 403), host
    assert get(door.url, "/v1/models", "Host: 127.0.0.1", "Host: evil.example")[0] == 400
    assert get(door.url, "http://127.0.0.1/v1/models", "Host: evil.example")[0] == 403
    assert send(door.url, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403")


def test_a_page_of_another_origin_can_neither_ask_nor_read(door) -> None:
    body = json.dumps(ASK)
    at = urlsplit(door.url)
    for origin in ("https://evil.example", "null", "http://[", f"http://localhost:{at.port}", f"http://127.0.0.1:{1}"):
        # A form or a fetch without preflight: its body is text/plain.
        answer = httpx.post(door.url + CHAT, content=body, headers={"Origin": origin, "Content-Type": "text/plain"})
        assert answer.status_code == 403, origin
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "*"}
        answer = httpx.options(door.url + CHAT, headers=asked)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")], origin
    answer = httpx.post(door.url + CHAT, json=ASK, headers={"Origin": door.url, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_picture_tag_of_another_page_sets_no_simulator_going(door) -> None:
    """It names no Origin, but what browsers say of every request since 2023."""
    for site in ("cross-site", "same-site"):
        for path in ("/v1/rooms?seed=1", "/metrics", "/openapi.json"):
            assert httpx.get(door.url + path, headers={"Sec-Fetch-Site": site}).status_code == 403
        assert httpx.get(door.url, headers={"Sec-Fetch-Site": site}).status_code == 200, "a link to the page works"
    assert httpx.get(f"{door.url}/v1/rooms?seed=1", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_nobody_may_frame_the_page(door) -> None:
    headers = httpx.get(door.url).headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"] and "server" not in headers


def test_a_world_opens_neither_without_the_key_nor_to_another_page(locked, door) -> None:
    key = {"Authorization": "Bearer open sesame"}
    tries = [{}, {"additional_headers": {"Authorization": "Bearer x"}}, {"subprotocols": ["litchi", "litchi-key.AAAA"]}]
    tries += [{"additional_headers": key, "origin": o} for o in ("https://evil.example", "null", "http://[")]
    for refused in tries:
        with pytest.raises(exceptions.InvalidStatus) as found, world_of(locked.url, **refused):
            pass
        assert found.value.response.status_code == 403, refused
    with pytest.raises(exceptions.InvalidStatus), world_of(door.url, origin="https://evil.example"):
        pass
    with world_of(locked.url, additional_headers=key) as socket:
        socket.send('{"type": "start", "seed": 0}')
        assert json.loads(socket.recv(timeout=60))["type"] == "frame"


# ---- files --------------------------------------------------------------------------------------------------------


def test_no_path_leads_out_of_the_pages_folder(door) -> None:
    secret = (HERE / "guard.py").read_bytes()[:60]
    targets = ["/web/../guard.py", "/web/%2e%2e/guard.py", "/web/..%2fguard.py", "/web/%2e%2e%2fguard.py"]
    targets += ["/web/..%5cguard.py", "/web/....//guard.py", f"/web/{HERE}/guard.py", f"/web//{HERE}/guard.py"]
    targets += ["/web/%252e%252e/guard.py", "/web/", "/web", "/web/.", "/web/%00", "/web/index.html%00.png"]
    targets += ["/web//etc/passwd", f"/web/{'../' * 20}etc/passwd", "/web/" + "a" * 5000, "/web/%ff%fe", "/web/~root"]
    targets += ["/v1/models/..%2f..%2fetc%2fpasswd", "/v1/responses/..%2f..%2fetc%2fpasswd", "/file:///etc/passwd"]
    for target in targets:
        status, answer = get(door.url, target)
        assert 300 <= status < 500, (target, status)
        assert (
            secret not in answer and b"root:" not in answer and str(HERE).encode() not in answer.split(b"\r\n\r\n")[1]
        )
