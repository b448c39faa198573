"""The page of web_chat.py in headless Chromium, as a user has it.

It needs gradio, playwright (pip install -r requirements-dev.txt) and Chromium.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import psutil
import pytest
from example_fixtures import ENVIRONMENT, EXAMPLES
from page_fixtures import EVIL
from text_fixtures import BUNDLED, ROOT

pytestmark = pytest.mark.slow
for name in ("gradio", "playwright"):
    pytest.importorskip(name, reason=f"{name} is not here: pip install -r requirements-dev.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("Chromium is not here: apt install chromium", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += [f"--disable-{name}" for name in ("background-networking", "component-update", "sync")]
# Greedy, the base model never ends: an answer of 700 tokens takes seconds.
OPTIONS = ["--model", str(BUNDLED), "--max_new_tokens", "700"]
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """The address of the page, and the process that serves it."""
    errors = tmp_path_factory.mktemp("web") / "stderr"
    command = [sys.executable, str(EXAMPLES / "web_chat.py"), *OPTIONS]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT, cwd=ROOT
        )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), errors.read_text()
        yield address, psutil.Process(process.pid)
        assert process.poll() is None and "Traceback" not in errors.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and not process.stdout.read()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def tab(server: tuple[str, psutil.Process], browser: Browser) -> Iterator[Callable[[], Page]]:
    """Opens tabs, which may ask no other host for anything."""
    opened, hosts, dialogs = [], set(), []

    def tab() -> Page:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(server[0])
        expect(button(page, "Send")).to_be_enabled()
        opened.append(page)
        return page

    yield tab
    for page in opened:
        page.close()
    assert hosts - {""} == {urlsplit(server[0]).netloc}
    assert not dialogs


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")


def wait_for(page: Page, count: int) -> list[str]:
    """The questions and answers, `count` together, when the last answer is complete."""
    expect(page.locator(".message")).to_have_count(count)
    expect(button(page, "Send")).to_be_enabled()
    return page.locator(".message").all_text_contents()


def set_length(page: Page, tokens: int) -> None:
    field = page.get_by_label("number input for Max new tokens")
    if not field.is_visible():
        page.get_by_role("button", name="Settings").click()
    field.fill(str(tokens))
    page.keyboard.press("Tab")


def test_an_answer_streams_stops_and_is_followed_by_its_experts(tab):
    page = tab()
    ask(page, "Who is there?")
    expect(page.locator(".message")).to_have_count(2)
    first = page.locator(".message").last.inner_text()
    page.wait_for_function(
        "length => document.querySelectorAll('.message')[1].innerText.length > length",
        arg=len(first) + 40,
    )
    button(page, "Stop").click()
    question, answer = wait_for(page, 2)
    expect(page.locator(".prose.said")).to_have_text("(stopped)")
    assert question == "Who is there?" and answer.startswith(first.rstrip("…"))

    experts = page.frame_locator(".experts iframe")
    told, tokens = experts.locator(".told"), experts.locator(".token")
    shown = "".join(tokens.all_inner_texts()).replace("↵", "")
    assert "User: Who is there?" in shown and answer[:40] in shown
    tokens.nth(3).hover()
    expect(told).to_contain_text("its experts by layer")
    pointed = told.inner_text()
    tokens.nth(5).click()
    rows = [row.split() for row in told.locator("tr").all_inner_texts()]
    assert told.inner_text() != pointed
    assert [row[:2] for row in rows] == [["layer", str(n)] for n in range(1, 6)]
    for row in rows:
        numbers, weights = list(map(int, row[2::2])), list(map(float, row[3::2]))
        assert len(set(numbers)) == 6 and set(numbers) <= set(range(24))
        assert weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1.03
    kept = told.inner_text()
    tokens.nth(3).hover()
    assert told.inner_text() == kept
    experts.locator("#map td").nth(30).click()
    expect(experts.locator("#details")).to_contain_text("layer 2, expert 6")


def test_retry_clear_and_settings(tab):
    page = tab()
    set_length(page, 8)
    ask(page, "Who is there?")
    before = wait_for(page, 2)
    expect(page.locator(".prose.said")).to_have_text("(cut after --max_new_tokens 8)")
    set_length(page, 300)
    button(page, "Retry").click()
    expect(button(page, "Stop")).to_be_enabled()
    after = wait_for(page, 2)
    assert after[1].startswith(before[1]) and len(after[1]) > len(before[1])
    button(page, "Clear").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator(".experts iframe")).to_have_count(0)
    ask(page, "Who is there?")
    assert wait_for(page, 2) == after  # It has forgotten the first time.


def test_texts_are_not_html_and_errors_are_one_line(tab):
    page = tab()
    set_length(page, 4)
    evil = EVIL + " ${1+1} {{value}} **bold** <b>b</b>"
    ask(page, evil)
    assert wait_for(page, 2)[0] == evil
    assert not page.locator("img[src='x'], .message b").count()
    tokens = page.frame_locator(".experts iframe").locator(".token")
    assert evil in "".join(tokens.all_text_contents())
    ask(page, "word " * 2000)
    expect(page.locator(".prose.said")).to_contain_text("error: the prompt has")
    wait_for(page, 2)
    expect(page.get_by_label("Question")).to_have_value("word " * 2000)
    ask(page, "Still there?")
    wait_for(page, 4)


def test_two_tabs_take_turns_and_one_that_leaves_holds_up_nobody(tab):
    first, second, third = tab(), tab(), tab()
    ask(third, "The third?")
    expect(third.locator(".message")).to_have_count(2)
    for page, name in ((first, "first"), (second, "second")):
        set_length(page, 20)
        ask(page, f"The {name}?")
    expect(second.locator(".message")).to_have_count(1)  # It waits.
    third.close()
    for page, name in ((first, "first"), (second, "second")):
        question, answer = wait_for(page, 2)
        assert question == f"The {name}?" and answer
        tokens = page.frame_locator(".experts iframe").locator(".token").all_text_contents()
        assert "".join(tokens).startswith(f"<BOS>User: The {name}?")
    button(first, "Clear").click()
    expect(first.locator(".message")).to_have_count(0)
    assert len(wait_for(second, 2)) == 2


def test_it_is_served_to_this_machine_only(server, tab):
    tab()
    connections = server[1].net_connections("inet")
    assert {at.laddr.ip for at in connections if at.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert {at.raddr.ip for at in connections if at.raddr} <= {"127.0.0.1"}
