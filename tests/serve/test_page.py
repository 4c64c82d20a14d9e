"""The page as it is served, in a real browser: ask, draw, and walk through the dream with the keys."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")

playwright.expect.set_options(timeout=60_000)
CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny"
KEYS = (
    "ArrowRight",
    "ArrowUp",
    "ArrowUp",
    "ArrowLeft",
    "ArrowUp",
    "ArrowRight",
    "ArrowRight",
    "ArrowUp",
    "p",
    "ArrowLeft",
)


@pytest.fixture
def page(browser, served, tmp_path) -> Iterator[object]:
    """A page of the running server; a script error or a failed load on it fails the test."""
    faults: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB")
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto(served.url)
    page.wait_for_selector("body[data-ready]")
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    page.close()
    assert not faults, faults


@pytest.fixture(scope="module")
def served(served_by) -> Iterator[object]:
    """The shipped checkpoint where there is one, else the painter."""
    if not CHECKPOINT.is_dir():
        with served_by() as served:
            yield served
        return
    from litchi.cli import load_sampler
    from litchi.envs.minigrid import Room

    with served_by(load_sampler("tiny"), lambda name, seed: Room(name)) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        # Chromium has no sandbox for root, which is who runs tests in a container.
        flags = ["--no-sandbox"] if sys.platform == "linux" and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def expect(locator):
    return playwright.expect(locator)


def source(page, name: str) -> str:
    return page.get_attribute(name, "src") or ""


def test_a_question_about_a_room_is_answered(page):
    first = source(page, "#talk-picture")
    assert first.startswith("data:image/png;base64,")
    page.fill("#talk-input", "What do you see?")
    page.click("#talk-send")
    page.wait_for_selector(".bubble.model:not(.writing)")
    assert page.inner_text(".bubble.model").strip() and page.locator(".fault").count() == 0
    page.click("#talk-chips button >> nth=0")
    expect(page.locator(".bubble.model:not(.writing)")).to_have_count(2)
    page.click("#talk-room")
    expect(page.locator(".bubble")).to_have_count(0)
    assert source(page, "#talk-picture") != first


def test_a_picture_of_ones_own_is_talked_about(page, tmp_path):
    from PIL import Image

    Image.new("RGB", (200, 120), (0, 0, 250)).save(tmp_path / "own.png")
    page.set_input_files("#talk-file", tmp_path / "own.png")
    expect(page.locator("#talk-caption")).to_contain_text("64×64")
    page.click("#talk-chips button >> nth=0")
    page.wait_for_selector(".bubble.model:not(.writing)")
    assert page.locator(".fault").count() == 0
    page.click("#talk-enter")
    expect(page.locator("#play-badge")).to_have_text("dreamed from a picture")
    expect(page.locator("#play-real-box")).to_be_hidden()


def test_a_picture_is_drawn(page):
    page.click("#tab-draw")
    page.fill("#draw-prompt", "Draw a room with a red ball.")
    page.click("#draw-go")
    page.wait_for_selector("#draw-gallery img")
    expect(page.locator("#draw-plan")).not_to_be_empty()
    assert source(page, "#draw-picture").startswith("data:image/png;base64,")
    assert page.locator("#draw-picture").evaluate("e => [e.naturalWidth, getComputedStyle(e).imageRendering]") == [
        64,
        "pixelated",
    ]


def test_ten_keys_walk_through_the_dream(page):
    page.click("#tab-play")
    expect(page.locator("#play-badge")).to_have_text("same as the real room")
    dreams = [source(page, "#play-dream")]
    for step, key in enumerate(KEYS, 1):
        page.keyboard.press(key)
        expect(page.locator("#play-step")).to_have_text(str(step))
        dreams.append(source(page, "#play-dream"))
    assert dreams[1] != dreams[0] and len(set(dreams)) >= 4
    expect(page.locator("#play-line button")).to_have_count(11)
    page.click("#play-line button >> nth=3")
    expect(page.locator("#play-step")).to_have_text("3")
    assert source(page, "#play-dream") == dreams[3]
    page.click("#play-rewind")
    expect(page.locator("#play-step")).to_have_text("2")
    page.click("#play-reset")
    expect(page.locator("#play-step")).to_have_text("0")
    assert source(page, "#play-dream") == dreams[0]


def test_a_forked_world_goes_its_own_way(page, tmp_path):
    page.click("#tab-play")
    expect(page.locator("#play-badge")).to_have_text("same as the real room")
    expect(page.locator("#play-forks")).to_be_hidden()
    for step, key in enumerate(("ArrowRight", "ArrowUp", "ArrowUp"), 1):
        page.keyboard.press(key)
        expect(page.locator("#play-step")).to_have_text(str(step))
    before = [source(page, name) for name in ("#play-dream", "#play-real")]
    page.click("#play-fork")
    expect(page.locator("#play-forks button.primary")).to_have_text("World 2")
    expect(page.locator("#play-line button")).to_have_count(4)
    assert [source(page, name) for name in ("#play-dream", "#play-real")] == before
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#play-step")).to_have_text("4")
    assert source(page, "#play-real") != before[1]
    page.screenshot(path=tmp_path / "fork.png", full_page=True)
    page.click("#play-forks button >> nth=0")
    expect(page.locator("#play-step")).to_have_text("3")
    assert [source(page, name) for name in ("#play-dream", "#play-real")] == before
    page.click("#play-rewind")
    expect(page.locator("#play-step")).to_have_text("2")
    page.click("#play-forks button >> nth=1")
    expect(page.locator("#play-step")).to_have_text("4")


def test_the_model_plays_until_it_is_stopped(page):
    page.click("#tab-play")
    expect(page.locator("#play-badge")).to_have_text("same as the real room")
    page.click("#play-policy")
    expect(page.locator("#play-step")).not_to_have_text("0")
    page.click("#play-reset")
    expect(page.locator("#play-step")).to_have_text("0")


def test_the_page_speaks_chinese_and_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.click("#language")
    expect(page.locator("#tab-draw")).to_have_text("画图")
    for tab in ("#tab-talk", "#tab-draw", "#tab-play"):
        page.click(tab)
        assert page.locator("html").evaluate("e => e.scrollWidth") <= 390
    page.click("#language")
    expect(page.locator("#tab-draw")).to_have_text("Draw")


def test_a_model_without_pictures_is_only_talked_with(browser, served_by, tmp_path):
    """What /v1/models does not name is not shown: no tabs, no picture, and no words about one."""
    faults: list[str] = []
    with served_by(abilities=()) as served:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB")
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(served.url)
        page.wait_for_selector("body[data-ready]")
        for hidden in (".tabs", "#tab-draw", "#tab-play", "#talk-picture", "#talk-file", "#panel-draw", "#panel-play"):
            expect(page.locator(hidden)).to_be_hidden()
        expect(page.locator(".hello")).to_have_text("Say something. This model reads text only.")
        assert "draws no pictures" in page.inner_text("header") and "picture" not in page.inner_text("main")
        page.fill("#talk-input", "hello")
        page.keyboard.press("Enter")
        expect(page.locator(".bubble.model:not(.writing)")).to_have_text("I see no picture in turn 1 . ")
        page.click("#talk-chips button >> nth=0")
        expect(page.locator(".bubble.model:not(.writing) >> nth=1")).to_have_text("I see no picture in turn 2 . ")
        page.screenshot(path=tmp_path / "plain.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 844})
        page.click("#language")
        expect(page.locator("#talk-input")).to_have_attribute("placeholder", "说点什么")
        assert page.locator("html").evaluate("e => e.scrollWidth") <= 390
        page.close()
    assert not faults, faults
