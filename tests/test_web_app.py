"""The page of `make web`: what it refuses, and the page itself in a real browser, which may ask no other computer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from utils import UserError
from web.models import Models


@pytest.fixture(scope="module")
def model_dir(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("first.pth", "listen.pth", "run/best.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(checkpoint, folder / name)
    return folder


def test_models_are_reached_by_their_names_alone(model_dir, tmp_path):
    models = Models(model_dir)
    assert models.names == ["first.pth", "listen.pth", "run/best.pth"]
    assert models.load("listen.pth") is models.load("listen.pth")
    for name in ("../first.pth", str(model_dir / "first.pth"), "", "run"):
        with pytest.raises(UserError, match="no such model"):
            models.load(name)
    with pytest.raises(UserError, match="holds no checkpoint"):
        Models(tmp_path)


def test_without_models_the_page_ends_in_one_line(cli, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs Gradio: pip install -r requirements-web.txt")
    done = cli("web.app", "--model_dir", tmp_path, "--port", "0")
    assert done.returncode == 2 and "holds no checkpoint" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def page_module():
    pytest.importorskip("gradio", reason="needs Gradio: pip install -r requirements-web.txt")
    import web.page

    return web.page


def test_films_are_refused_with_words_that_name_no_path(page_module, film_root, tmp_path, monkeypatch):
    film = next((film_root / "clips").glob("*.mp4"))
    assert page_module.check_film(str(film)) == pytest.approx(10, abs=0.2)
    monkeypatch.setattr(page_module, "LONGEST", 5.0)
    with pytest.raises(UserError, match="at most 5 s"):
        page_module.check_film(str(film))
    (tmp_path / "words.txt").write_text("no film")
    soundfile.write(tmp_path / "sound.wav", np.zeros(16000), 16000)
    for name in ("words.txt", "sound.wav"):
        with pytest.raises(UserError) as refused:
            page_module.check_film(str(tmp_path / name))
        assert str(tmp_path) not in page_module.message(refused.value).message


def test_what_is_older_than_an_hour_is_removed(page_module, tmp_path):
    for name, age in (("old", 4000), ("new", 10)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    page_module.clear_old(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def server(page_module, model_dir, tmp_path_factory):
    """Address of a page that runs in a process of its own, without FFmpeg's programs on its PATH."""
    folder = tmp_path_factory.mktemp("served")
    log = (folder / "log").open("w+")
    environment = os.environ | {"PATH": str(Path(sys.executable).parent), "TMPDIR": str(folder)}
    command = [sys.executable, "-u", "-m", "web.app", "--port", "0", "--model_dir", str(model_dir)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    address = ""
    while not address and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        words = Path(log.name).read_text().split()
        address = next((word for word in words if word.startswith("http://127.0.0.1")), "")
    assert address, Path(log.name).read_text()
    yield address
    process.send_signal(signal.SIGINT)
    process.wait(timeout=120)
    assert not list(folder.glob("sound_source_*"))  # its files are gone


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver, log_output=subprocess.DEVNULL)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


def until(browser, script, *arguments):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 240).until(lambda b: b.execute_script(f"return {script}", *arguments))


def click(browser, name):
    until(browser, "document.getElementById(arguments[0])", name)
    browser.execute_script("document.getElementById(arguments[0]).click()", name)


def asked_for(browser):
    """Addresses of the network that the page asked for."""
    found = set()
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            found.add(event["params"]["request"]["url"])
    return {address for address in found if address.startswith(("http", "ws"))}


@pytest.mark.slow
def test_a_clip_plays_as_a_heat_map_and_a_text_is_refused(server, browser, tmp_path):
    browser.get(server)
    click(browser, "example-clip")
    until(browser, "document.getElementById('film').textContent.includes('mp4')")
    click(browser, "run-clip")
    until(browser, "document.querySelector('#heat video')?.readyState >= 2")
    browser.execute_script("const v = document.querySelector('#heat video'); v.muted = true; v.play()")
    until(browser, "document.querySelector('#heat video').currentTime > 0.3")
    until(browser, "document.querySelector('#strip img')?.naturalWidth > 100")
    until(browser, "document.getElementById('clip-files').textContent.includes('csv')")
    (tmp_path / "words.txt").write_text("no film")
    browser.execute_script("document.querySelector('#film button[aria-label]')?.click()")
    until(browser, "document.querySelector('#film input[type=file]')")
    browser.find_element("css selector", "#film input[type=file]").send_keys(str(tmp_path / "words.txt"))
    until(browser, "document.getElementById('film').textContent.includes('txt')")
    click(browser, "run-clip")
    until(browser, "document.body.innerText.includes('cannot be opened')")
    assert str(tmp_path) not in browser.execute_script("return document.body.innerText")
    assert all(address.split("/")[2].startswith("127.0.0.1") for address in asked_for(browser))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.slow
def test_swapping_the_sound_changes_the_maps_in_both_themes_and_on_a_phone(server, browser):
    for theme in ("light", "dark"):
        browser.get(f"{server}?__theme={theme}")
        until(browser, "document.querySelectorAll('button[role=tab]').length >= 2")
        browser.execute_script("[...document.querySelectorAll('button[role=tab]')].at(-1).click()")
        click(browser, "example-image")
        until(browser, "document.querySelector('#image img') && document.querySelector('#sound-B')")
        time.sleep(3)  # both sounds arrive
        click(browser, "run-image")
        until(browser, "document.querySelectorAll('#maps img').length >= 2")
        sources = "[...document.querySelectorAll('#maps img')].map((i) => i.src).join()"
        before = browser.execute_script(f"return {sources}")
        browser.execute_script("document.querySelectorAll('#which input')[1].click()")
        until(browser, f"{sources} !== arguments[0] && {sources}", before)
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    until(browser, "document.documentElement.scrollWidth <= 390")
    assert all(address.split("/")[2].startswith("127.0.0.1") for address in asked_for(browser))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
