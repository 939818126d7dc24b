"""report.html: self-contained, escaped, and it opens in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slipcast_compiler import report
from slipcast_compiler.evaluate import Originals, Run

HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)> & "quotes"'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Page(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _dump(page: Path, profile: Path, *options: str) -> str:
    assert CHROMIUM
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, *options, page.resolve().as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def test_no_network_and_no_script(shapes_bundle: Path) -> None:
    text = (shapes_bundle / "report.html").read_text("utf-8")
    tags = _Page(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(sources) == 8 * (1 + 2 * 2)  # original, and for two targets picture and difference
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", text)


def test_prompts_are_escaped(shapes_bundle: Path, tmp_path: Path) -> None:
    import json

    record = json.loads((shapes_bundle / "report.json").read_text("utf-8"))
    record["name"] = record["family"]["held_out_prompts"][0] = record["recipe"]["name"] = HOSTILE
    images = np.zeros((1, 8, 8, 3), np.float32)
    run = Run(images, (1.0,), 0.1, 1.0, {})
    report.write(tmp_path, record, Originals((HOSTILE,), (1,), images, images, images), {"a": run})
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;document.title" in text
    tags = _Page(text).tags
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_opens_in_a_browser(shapes_bundle: Path, tmp_path: Path) -> None:
    page = shapes_bundle / "report.html"
    dom = _dump(page, tmp_path / "profile", "--dump-dom")
    assert "The gate holds on every target." in dom
    assert "<title>shapes-circles" in dom
    picture = tmp_path / "page.png"
    _dump(page, tmp_path / "profile2", "--window-size=1000,1400", f"--screenshot={picture}")
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (1400, 1000, 3)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 150) & (pixels[..., 2] < 90)
    assert yellow.sum() > 1000  # the first pictures are of yellow circles: they were decoded and laid out
