"""Pictures of TensorBoard's pages for a folder of runs: starts it on loopback and opens it in a headless Chromium.

python scripts/screenshot_tensorboard.py RUNS OUT [--run NAME]

OUT gets tensorboard.png (the charts of both clocks), tensorboard_text.png (a run on one page, in words) and
tensorboard_images.png (its picture and the verdict's, where launch.verdict has written one). The browser is steered
over its DevTools, since the pages' own addresses can't say all that is to be seen.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update
--disable-sync --no-first-run --hide-scrollbars --remote-debugging-port=0""".split()
START_LIMIT_S, PAGE_LIMIT_S, SETTLE_S = 60, 120, 4.0
ALL = """
const all = (root, selector) => [...root.querySelectorAll(selector),
  ...[...root.querySelectorAll('*')].filter(it => it.shadowRoot).flatMap(it => all(it.shadowRoot, selector))];
"""
"""Elements of a page, also those inside components."""


class Page(NamedTuple):
    """What to open, which runs (a regular expression of {run}), what is there once drawn, what to click then."""

    file: str
    address: str
    runs: str
    drawn: str
    click: str = ""
    size: tuple[int, int] = (1500, 1000)
    scale: float = 1.0


PAGES = (
    Page("tensorboard.png", "custom_scalars", "^({run}/tb/(emulated|measured)|reference/)", "vz-line-chart2"),
    Page("tensorboard_text.png", "text&tagFilter=one_minute", "^{run}/tb/page", "table", size=(1900, 1500), scale=0.75),
    Page("tensorboard_images.png", "images", "^({run}/tb/page|verdict)", "img", "actual image size", (2020, 1750), 0.7),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--run", metavar="NAME", help="the run to show (default: the newest one that has a page)")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return _refuse(f"no browser found ({', '.join(BROWSERS)}); install one: apt-get install chromium")
    if not any(args.runs.rglob("*tfevents*")):
        return _refuse(f"{args.runs}: no TensorBoard event file in it; give a folder that holds runs")
    pages = sorted(args.runs.glob("*/tb/page"), key=lambda path: path.stat().st_mtime)
    found = [path.parents[1].name for path in pages]
    run = args.run or (found[-1] if found else None)
    if run not in found:
        return _refuse(f"{args.runs / (run or '*')}/tb/page: is not there; give a run that ended (one of {found})")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with served(args.runs) as address, tempfile.TemporaryDirectory() as profile:
            for shot in asyncio.run(pictures(browser, Path(profile), address, run, args.out)):
                print(shot)
    except (OSError, TimeoutError) as error:
        print(f"no picture of {args.runs}: {error}", file=sys.stderr)
        return 1
    return 0


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


@contextlib.contextmanager
def served(runs: Path) -> Iterator[str]:
    """TensorBoard's address while it serves the folder, with every run read."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--logdir", runs.resolve().name]
    board = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words],
        cwd=runs.resolve().parent,  # the page shows the folder as it is given
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wanted = {str(path.parent.relative_to(runs)) for path in runs.rglob("*tfevents*")}
        deadline = time.monotonic() + START_LIMIT_S
        while board.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs") as answer:
                if wanted <= set(json.load(answer)):
                    break
            time.sleep(0.2)
        else:
            raise OSError(f"TensorBoard did not show its {len(wanted)} runs within {START_LIMIT_S} s")
        yield f"http://127.0.0.1:{port}/"
    finally:
        board.terminate()
        board.wait(10)


async def pictures(browser: str, profile: Path, address: str, run: str, out: Path) -> list[Path]:
    """Opens every page in one browser; writes and returns the pictures."""
    import aiohttp

    process = subprocess.Popen(
        [browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = await _port(profile / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tab = next(one for one in await answer.json(content_type=None) if one["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket_:
                devtools = DevTools(socket_)
                return [await _picture(devtools, page, address, run, out) for page in PAGES]
    finally:
        process.terminate()
        process.wait(10)


async def _port(file: Path) -> int:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if file.exists() and file.read_text():
            return int(file.read_text().split()[0])
        await asyncio.sleep(0.1)
    raise TimeoutError(f"the browser did not start within {START_LIMIT_S} s")


async def _picture(devtools: "DevTools", page: Page, address: str, run: str, out: Path) -> Path:
    width, height = page.size
    await devtools.call("Page.bringToFront")
    await devtools.call("Emulation.setFocusEmulationEnabled", enabled=True)
    metrics = {"width": width, "height": height, "deviceScaleFactor": page.scale, "mobile": False}
    await devtools.call("Emulation.setDeviceMetricsOverride", **metrics)
    runs = urllib.parse.quote(page.runs.format(run=run))
    await devtools.call("Page.navigate", url="about:blank")  # else a new fragment alone would reload nothing
    await devtools.call("Page.navigate", url=f"{address}#{page.address}&regexInput={runs}&_smoothingWeight=0")
    deadline = time.monotonic() + PAGE_LIMIT_S
    while not await devtools.value(f"{ALL} return all(document, {json.dumps(page.drawn)}).length"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"page {page.address} showed nothing within {PAGE_LIMIT_S} s")
        await asyncio.sleep(0.5)
    if page.click:
        named = f"it => it.textContent.includes({json.dumps(page.click)})"
        await devtools.value(f"{ALL} all(document, 'paper-checkbox').filter({named}).forEach(it => it.click())")
    await asyncio.sleep(SETTLE_S)
    await devtools.call("Emulation.setDeviceMetricsOverride", **metrics | {"width": width - 1})
    await asyncio.sleep(1)
    await devtools.call("Emulation.setDeviceMetricsOverride", **metrics)
    await asyncio.sleep(SETTLE_S)
    shot = await devtools.call("Page.captureScreenshot", format="png")
    path = out / page.file
    path.write_bytes(_smaller(base64.b64decode(shot["data"])))
    return path


def _smaller(png: bytes) -> bytes:
    """With a palette of 256 colours: a page has few."""
    from PIL import Image

    packed = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


class DevTools:
    """Commands to a page of the browser, one at a time, over its websocket."""

    def __init__(self, socket_: Any) -> None:
        self._socket, self._number = socket_, 0

    async def call(self, method: str, **params: Any) -> dict:
        """OSError where the browser refuses it."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json(timeout=PAGE_LIMIT_S)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise OSError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]

    async def value(self, script: str) -> Any:
        """What a script gives in the page."""
        found = await self.call("Runtime.evaluate", expression=f"(() => {{ {script} }})()", returnByValue=True)
        if "exceptionDetails" in found:
            raise OSError(f"the page: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")


if __name__ == "__main__":
    sys.exit(main())
