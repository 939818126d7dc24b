"""`slipcast serve` on the reference bundle, with OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import slipcast
from conftest import call_cli

PROMPT = "a small red circle on a white background"
KEYS = ("first key", "second")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Server:
    """A `slipcast serve` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "slipcast.cli", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.said))
        threading.Thread(target=lambda: self.said.extend(self.process.stderr or ()), daemon=True).start()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def get(self, path: str, data: Any = None, timeout: float = 60, **headers: str) -> tuple[int, bytes]:
        body = None if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(shapes_bundle: Path) -> Iterator[Server]:
    made = Server(str(shapes_bundle), "--target", "onnxruntime-cpu-fp32")
    yield made
    made.stop()


def _picture(data: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))))


def test_pictures_are_the_bundles_own_whoever_else_asks(server: Server, shapes_bundle: Path) -> None:
    client = server.client()

    def ask(seed: int) -> Any:
        made = client.images.generate(prompt=PROMPT, response_format="b64_json", extra_body={"seed": seed})
        return _picture(made.data[0])

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(ask, range(6)))
    with slipcast.load(shapes_bundle, target="onnxruntime-cpu-fp32") as pipe:
        for seed, picture in enumerate(found):
            np.testing.assert_array_equal(picture, np.asarray(pipe(PROMPT, seed=seed).images[0]))
    _, metrics = server.get("/metrics")
    images = re.search(rb'slipcast_images_total\{model="shapes-circles"\} (\S+)', metrics)
    calls = re.search(rb'slipcast_call_images_count\{model="shapes-circles"\} (\S+)', metrics)
    assert images and calls and float(images[1]) >= 6 and float(calls[1]) < float(images[1])


def test_what_openais_client_may_say(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["shapes-circles"]
    made = client.images.generate(
        model="shapes-circles", prompt=PROMPT, n=2, size="64x64", response_format="url", output_format="webp",
        extra_body={"seed": 3, "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blue"},
    )  # fmt: skip
    assert made.size == "64x64" and made.data and len(made.data) == 2
    pictures = [Image.open(io.BytesIO(urllib.request.urlopen(str(each.url)).read())) for each in made.data]
    assert [picture.format for picture in pictures] == ["WEBP"] * 2 and pictures[0].tobytes() != pictures[1].tobytes()
    assert server.get("/images/nothing.png")[0] == 404


REFUSED = {
    "size": ({"size": "128x128"}, 400, "width is fixed in this bundle"),
    "no size": ({"size": "large"}, 400, "size: "),
    "quality": ({"quality": "hd"}, 400, "quality: "),
    "model": ({"model": "other"}, 404, "there are shapes-circles"),
    "n": ({"n": 17}, 400, "n: "),
    "steps": ({"extra_body": {"num_inference_steps": 100_000}}, 400, "num_inference_steps: "),
    "legal steps": ({"extra_body": {"num_inference_steps": 9000}}, 400, "num_inference_steps"),
    "unknown": ({"extra_body": {"sede": 1}}, 400, "sede: "),
    "stream": ({"stream": True}, 400, "stream: "),
    "number": ({"extra_body": {"guidance_scale": float("1e400")}}, 400, ""),
}


@pytest.mark.parametrize(("given", "status", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(server: Server, given: dict[str, Any], status: int, problem: str) -> None:
    if problem:
        with pytest.raises(openai.APIStatusError) as refused:
            server.client().images.generate(prompt="x", **given)
        assert refused.value.status_code == status and problem in str(refused.value.body)
    else:  # which the client does not send
        body = b'{"prompt": "x", "guidance_scale": 1e400}'
        assert server.get("/v1/images/generations", body)[0] == status


def test_hostile_bodies(server: Server) -> None:
    for body, status in (
        (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"prompt": ' + b"[" * 5000, 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400), (b'{"prompt": "' + b"x" * 2_000_000 + b'"}', 413),
        (b'{"prompt": "x", "arguments": {"latents": 1}}', 400), (b'{"prompt": "x", "arguments": {"self": 1}}', 400),
        (b'{"prompt": "x", "arguments": {"guard": "warn"}}', 400), (b'{"prompt": "x", "arguments": {"nope": 1}}', 400),
        (b'{"seed": 1}', 400),
    ):  # fmt: skip
        found, answer = server.get("/generate", body)
        assert found == status and json.loads(answer)["error"]["message"], body
    assert server.get("/health") == (200, b'{"status":"ok"}')
    assert json.loads(server.get("/ready")[1])["status"] == "ready"
    for path, status in (("/nothing", 404), ("/v1/models/other", 404), ("/generate", 405), ("/openapi.json", 404)):
        found, answer = server.get(path)
        assert found == status and json.loads(answer)["error"]["message"], path
    assert server.client().models.retrieve("shapes-circles").id == "shapes-circles"


def test_who_goes_away_is_not_waited_for(server: Server) -> None:
    steps = {"num_inference_steps": 500}
    with pytest.raises(TimeoutError):
        server.get("/v1/images/generations", {"prompt": PROMPT, "n": 8, **steps}, timeout=1.0)
    body = json.dumps({"prompt": PROMPT, "n": 8, "arguments": steps}).encode()
    request = urllib.request.Request(f"{server.url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline() == b"event: progress\n"
    begin = time.monotonic()
    assert server.get("/v1/images/generations", {"prompt": PROMPT})[0] == 200
    assert time.monotonic() - begin < 10
    assert json.loads(server.get("/ready")[1])["waiting"] == 0


def test_progress_and_the_picture_come_as_events(server: Server) -> None:
    status, body = server.get("/generate", {"prompt": PROMPT, "seed": 5, "arguments": {"num_inference_steps": 3}})
    events = [part.split("\n") for part in body.decode().strip().split("\n\n")]
    assert status == 200 and [name for name, _ in events] == [
        *["event: progress"] * 3, "event: picture", "event: done",
    ]  # fmt: skip
    steps = [json.loads(data.removeprefix("data: ")) for _, data in events[:3]]
    assert steps == [{"step": step, "steps": 3} for step in (1, 2, 3)]


def test_only_who_has_a_key_is_drawn_for_and_a_signal_ends_it(shapes_bundle: Path) -> None:
    options = [word for key in KEYS for word in ("--api-key", key)]
    server = Server(str(shapes_bundle), *options)
    assert server.get("/health")[0] == server.get("/")[0] == 200
    for key in ("none", "first", "first key!", "", "ſecond"):
        status, _ = server.get("/v1/models", Authorization=f"Bearer {key}".encode().decode("latin-1"))
        assert status == 401, key
    assert [server.client(key).models.list().data[0].id for key in KEYS] == ["shapes-circles"] * 2
    assert server.get("/generate", b"{")[0] == 401  # before anything of it is read
    answers: list[Any] = []
    body = {"prompt": PROMPT, "n": 8, "num_inference_steps": 500}
    asking = threading.Thread(
        target=lambda: answers.append(server.get("/v1/images/generations", body, Authorization=f"Bearer {KEYS[0]}"))
    )
    asking.start()
    time.sleep(1)
    assert server.stop() in (0, 130, 143)
    asking.join(10)
    ((status, answer),) = answers
    assert status == 503 and "closing" in json.loads(answer)["error"]["message"]
    assert not any("Traceback" in line for line in server.said), server.said


def test_what_cannot_be_served(shapes_bundle: Path) -> None:
    twice = call_cli("serve", str(shapes_bundle), str(shapes_bundle))
    assert twice.returncode == 2 and "another bundle is called 'shapes-circles' too" in twice.stderr
    for keys in (["--api-key", ""], ["--api-key", "one", "--api-key", " "]):
        empty = call_cli("serve", str(shapes_bundle), *keys)
        assert empty.returncode == 2 and "an API key is empty" in empty.stderr
    there = call_cli("serve", str(shapes_bundle), "--host", "203.0.113.1")
    assert there.returncode == 3 and "cannot listen on 203.0.113.1" in there.stderr


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_is_filled_in(server: Server, tmp_path: Path) -> None:
    address = f"{server.url}/?prompt={PROMPT.replace(' ', '+')}&seed=3"
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", "--dump-dom", address,
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<option" in dom and "shapes-circles" in dom
