"""Takes the pictures of pages in headless Chromium: web-chat.png and tensorboard.png.

    python images/screenshots.py web-chat
    python images/screenshots.py tensorboard output/pictured

It needs playwright (pip install -r requirements-dev.txt) and Chromium. What it shows is served by a
process of its own, at this machine only.
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Error, Page, expect, sync_playwright

IMAGES = Path(__file__).resolve().parent
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
TAGS = quote("train/[^e]|train/expert|train_experts/load$")
QUESTIONS = ("Who are you?", "Tell me about a king.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes the pictures of pages.")
    pictures = parser.add_subparsers(dest="picture", required=True)
    pictures.add_parser("web-chat")
    pictures.add_parser("tensorboard").add_argument("folder", help="--output_dir of finetune.py")
    args = parser.parse_args()
    port = str(free_port())
    if args.picture == "web-chat":
        take, size, path = take_web_chat, (1160, 1060), ""
        command = [str(IMAGES.parent / "examples" / "web_chat.py"), "--port", port]
    else:
        take, size, path = take_tensorboard, (1080, 1250), f"?tagFilter={TAGS}#timeseries"
        command = ["-m", "tensorboard.main", "--logdir", args.folder, "--port", port]
    process = subprocess.Popen([sys.executable, *command])
    try:
        with opened(f"http://127.0.0.1:{port}/{path}", *size) as page:
            take(page)
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.convert("RGB").save(IMAGES / f"{args.picture}.png", optimize=True)
    finally:
        process.terminate()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def opened(address: str, width: int, height: int) -> Iterator[Page]:
    """The page at this address, as soon as something answers there."""
    size = [f"--window-size={width},{height}", "--force-device-scale-factor=1.3"]
    expect.set_options(timeout=60_000)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=[*QUIET, *size]
        )
        page = browser.new_page(no_viewport=True)
        for _ in range(60):
            try:
                page.goto(address)
                break
            except Error:
                page.wait_for_timeout(1000)
        yield page
        browser.close()


def take_web_chat(page: Page) -> None:
    for count, question in enumerate(QUESTIONS, 1):
        page.get_by_label("Question").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".message")).to_have_count(2 * count)
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
    experts = page.frame_locator(".experts iframe")
    experts.locator(".token", has_text="king").last.click()
    experts.locator("html").evaluate("html => html.scrollTo(0, html.scrollHeight)")
    page.wait_for_timeout(500)


def take_tensorboard(page: Page) -> None:
    """Cards without tables, the panes for settings and runs closed."""
    page.get_by_text("Enable step selection and data table").click()
    page.get_by_role("button", name="Settings").click()
    page.add_style_tag(content="nav.sidebar { display: none !important; }")
    expect(page.get_by_text("Tags matching filter")).to_be_visible()
    expect(page.locator("img:visible")).to_have_count(1)
    page.wait_for_timeout(5000)  # Curves are drawn one after another.


if __name__ == "__main__":
    main()
