"""A picture of TensorBoard's page for a folder of runs: starts it on loopback and opens it in a headless Chromium.

python scripts/screenshot_tensorboard.py RUNS OUT.png [--page custom_scalars|timeseries|scalars]
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)
START_LIMIT_S, PAGE_LIMIT_S = 30, 90
RENDER_MS = 40_000  # virtual time given to the page's scripts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--page", choices=("custom_scalars", "timeseries", "scalars"), default="custom_scalars")
    parser.add_argument("--size", default="1500,1400", metavar="WIDTH,HEIGHT", help="pixels (default %(default)s)")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return _refuse(f"no browser found ({', '.join(BROWSERS)}); install one: apt-get install chromium")
    if not any(args.runs.rglob("*tfevents*")):
        return _refuse(f"{args.runs}: no TensorBoard event file in it; give a folder that holds runs")
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--logdir",
        str(args.runs),
    ]
    board = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/data/runs", board)
        with tempfile.TemporaryDirectory() as profile:
            shot = Path(profile, "page.png")
            subprocess.run(
                [
                    browser,
                    *FLAGS,
                    f"--user-data-dir={profile}/profile",
                    f"--window-size={args.size}",
                    f"--virtual-time-budget={RENDER_MS}",
                    f"--screenshot={shot}",
                    f"http://127.0.0.1:{port}/?smoothing=0#{args.page}&_smoothingWeight=0",
                ],
                check=True,
                timeout=PAGE_LIMIT_S,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            shutil.copyfile(shot, args.out)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no picture of {args.runs}: {error}", file=sys.stderr)
        return 1
    finally:
        board.terminate()
        board.wait(10)
    print(args.out)
    return 0


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, board: subprocess.Popen) -> None:
    """Until the server lists at least one run."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and board.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.read().strip() != b"[]":
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise OSError(f"TensorBoard showed no run at {url} within {START_LIMIT_S} s")


if __name__ == "__main__":
    sys.exit(main())
