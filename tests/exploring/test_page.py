"""The page in a real browser: two runs side by side, every tab, uploads, downloads, and no request to anybody else."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served_pages import served

from glf_fast.exploring.loading import open_run

pytest.importorskip("selenium", reason="no selenium: pip install 'glf_fast[test]'")
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="THE PAGE OF THE EXPLORER IS NOT TESTED: no chromium and chromedriver (apt-get install chromium chromium-driver)",
)
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1300,1100"
)


class Browser:
    """A browser at the page of two runs, 12 × 12 in colour and 8 × 8 in grey."""

    def __init__(self, driver: webdriver.Chrome, port: int, downloads: Path) -> None:
        self.driver, self.site, self.downloads = driver, f"http://127.0.0.1:{port}/", downloads

    def __call__(self, selector: str) -> list[WebElement]:
        """The elements of a selector, in the order of the page."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], object]) -> object:
        """The first true value of a condition within half a minute."""
        until = time.monotonic() + 30
        while not (value := condition()):
            assert time.monotonic() < until, f"nothing after 30 s; the page says {[e.text for e in self('.error')]}"
            time.sleep(0.02)
        return value

    def pictures(self, action: str) -> list[str]:
        """The pictures that are shown in an action's figures, as data URLs."""
        return [e.get_attribute("src") or "" for e in self(f"[data-action={action}] .picture:not([hidden]) img")]

    def changed(self, action: str, before: list[str]) -> list[str]:
        """The pictures once both are other ones than before."""

        def other() -> list[str]:
            now = self.pictures(action)
            return now if len(now) == 2 and all(new not in ("", *before) for new in now) else []

        return self.until(other)  # type: ignore[return-value]

    def open(self, tab: str) -> list[str]:
        """Go to a tab; returns its pictures."""
        self(f"#tab-{tab}")[0].click()
        return self.changed(tab, [])

    def set(self, selector: str, value: float) -> None:
        """Move a slider, as the keyboard and the mouse do."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.driver.execute_script(script, self(selector)[0], value)

    def log(self, kind: str) -> list[dict[str, object]]:
        return self.driver.get_log(kind)


@pytest.fixture(scope="module")
def started(smoke: Path, coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(option)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with served(*(open_run(run, torch.device("cpu")) for run in (coloured, smoke))) as port:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        try:
            yield Browser(driver, port, folder / "downloads")
        finally:
            driver.quit()


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """The browser at the freshly loaded page; afterwards all requests have gone to the page's own server."""
    started.driver.get(started.site)
    started.until(lambda: started("nav button"))  # the page's script makes them
    yield started
    messages = [json.loads(str(entry["message"]))["message"] for entry in started.log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = [url for url in urls if url.startswith(started.site)]
    assert len(own) > 5 and not [url for url in urls if not url.startswith((started.site, "data:", "chrome"))]


def test_samples_change_and_have_neighbours_and_can_be_downloaded(browser: Browser) -> None:
    first = browser.changed("sample", [])
    assert [tab.text for tab in browser("nav button")] == [
        "Sample",
        "Latent plane",
        "Interpolate",
        "Edit",
        "Reconstruct",
    ]
    captions = [caption.text for caption in browser("[data-action=sample] figcaption")]
    assert "coloured" in captions[0] and "12 × 12" in captions[0] and "smoke" in captions[1] and "8 × 8" in captions[1]
    assert all("ms on the server" in time.text for time in browser("[data-action=sample] .ms"))

    browser("[name=temperature]")[0].send_keys(*[Keys.ARROW_LEFT] * 30)
    browser.until(lambda: browser("#sample output")[0].text == "0.70")
    colder = browser.changed("sample", first)
    browser.set("[name=temperature]", 1)
    browser.until(lambda: browser.pictures("sample") == first)  # the same noise again
    browser("[name=another]")[0].click()
    browser.changed("sample", first + colder)

    image = browser("[data-action=sample] img")[1]
    ActionChains(browser.driver).move_to_element_with_offset(image, 60, -60).click().perform()
    browser.changed("nearest", [])
    assert "distances (root mean square" in browser("[data-action=nearest] .lines")[1].text

    link = browser("[data-action=sample] a")[1]
    link.click()
    file = browser.downloads / str(link.get_attribute("download"))
    browser.until(file.is_file)
    browser.until(lambda: file.stat().st_size)
    with Image.open(file) as picture:
        assert picture.size == (4 * 96, 4 * 96) and picture.mode == "L" and file.name.startswith("smoke-sample-seed-")
    assert browser.log("browser") == []


def test_the_plane_is_dragged(browser: Browser) -> None:
    before = browser.open("walk")
    pad = browser(".pad")[0]
    browser.until(lambda: all(e.get_property("naturalWidth") == 7 * 96 for e in browser(".pad img")))
    ActionChains(browser.driver).move_to_element(pad).click_and_hold().move_by_offset(40, 30).move_by_offset(
        30, 20
    ).perform()
    dragged = browser.changed("walk", before)
    left = [dot.value_of_css_property("left") for dot in browser(".dot")]
    assert left[0] == left[1] and float(left[0].removesuffix("px")) > pad.size["width"] / 2 + 60
    ActionChains(browser.driver).release().move_to_element(pad).perform()  # the mouse is up, and moves no more
    ActionChains(browser.driver).pause(0.1).perform()
    assert [dot.value_of_css_property("left") for dot in browser(".dot")] == left
    pad.send_keys(*[Keys.ARROW_LEFT] * 8)
    moved = browser.changed("walk", before + dragged)
    browser("[name=right] option")[2].click()
    moved = browser.changed("walk", moved)
    browser("[name=through] option[value=sample]")[0].click()
    through = browser.changed("walk", moved)
    browser("[name=through] option[value=image]")[0].click()
    browser.changed("walk", through)
    assert browser("#walk .picker")[0].is_displayed() and browser.log("browser") == []


def test_images_are_chosen_uploaded_and_refused(browser: Browser, tmp_path: Path) -> None:
    picture, text = tmp_path / "mine.png", tmp_path / "text.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)).save(picture)
    text.write_text("words")

    tests = browser.open("reconstruct")
    assert "bits per dimension" in browser("[data-action=reconstruct] .lines")[0].text
    assert "log-density of the code" in browser("[data-action=reconstruct] .lines")[1].text
    browser("#reconstruct input[type=file]")[0].send_keys(str(picture))
    mine = browser.changed("reconstruct", tests)
    assert browser.log("browser") == []

    browser("#reconstruct input[type=file]")[0].send_keys(str(text))
    error = browser("#reconstruct .picker .error")[0]
    browser.until(error.is_displayed)
    assert (
        error.text.startswith("text.png: this file is not a picture that can be read") and "Traceback" not in error.text
    )
    assert browser.pictures("reconstruct") == mine
    [refused] = browser.log("browser")  # the browser's own line about it
    assert "upload" in str(refused["message"]) and "400" in str(refused["message"])

    number = browser("#reconstruct [name=test]")[0]
    number.clear()
    number.send_keys("99999", Keys.TAB)
    browser.until(lambda: error.text == "Test images are 0 to 7.")
    number.clear()
    number.send_keys("1", Keys.TAB)
    browser.changed("reconstruct", mine + tests)
    assert not error.is_displayed()

    way = browser.open("interpolate")
    browser("#interpolate input[type=file]")[1].send_keys(str(picture))
    browser.changed("interpolate", way)
    assert browser.log("browser") == []


def test_labels_edit_an_image(browser: Browser) -> None:
    browser("#tab-edit")[0].click()
    browser.until(lambda: len(browser.pictures("edit")) == 1)  # the coloured images have no labels
    assert "cannot do this" in browser("[data-action=edit] .error")[0].text
    before = browser.pictures("edit")
    browser.set("#amounts [name='label 3']", 1.5)
    browser.until(lambda: browser.pictures("edit") != before)
    browser("[name=reset]")[0].click()
    browser.until(lambda: browser.pictures("edit") == before)
    assert browser.log("browser") == []
