"""The page of `make web`: what it refuses, and the page itself in a real browser, which may ask no other computer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import moving_films as films
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


def test_what_is_no_checkpoint_is_left_out_or_told_without_a_path(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint, tmp_path / "good.pth")
    for name in ("a.pth", "z.safetensors"):
        (tmp_path / name).write_text("no checkpoint")
    models = Models(tmp_path)
    assert models.names == ["good.pth", "z.safetensors"]
    assert f"left out: {tmp_path / 'a.pth'} is not a PyTorch checkpoint" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^z\.safetensors cannot be read as a checkpoint$"):
        models.describe("z.safetensors")
    (tmp_path / "good.pth").unlink()
    with pytest.raises(UserError, match="none of the checkpoints"):
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
    process.send_signal(signal.SIGTERM)
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

    return WebDriverWait(browser, 120).until(lambda b: b.execute_script(f"return {script}", *arguments))


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


def upload(browser, place, path):
    """Put a file into a place for files, in which another one may lie."""
    browser.execute_script(f"document.querySelector('#{place} button[aria-label]')?.click()")
    until(browser, f"document.querySelector('#{place} input[type=file]')")
    browser.find_element("css selector", f"#{place} input[type=file]").send_keys(str(path))
    until(browser, f"document.getElementById('{place}').textContent.includes(arguments[0])", path.suffix[1:])


def no_complaint_and_no_other_computer(browser):
    assert all(address.split("/")[2].startswith("127.0.0.1") for address in asked_for(browser))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


PLAYABLE = "document.querySelector('#heat video')?.readyState >= 2"
TEXT = "document.body.innerText"


def test_a_clip_plays_under_its_heat_map(server, browser, tmp_path):
    """The quick one of those in the browser."""
    browser.get(server)
    until(browser, "document.getElementById('run-clip')")
    upload(browser, "film", films.write_film(tmp_path / "film.mp4", 1))
    click(browser, "run-clip")
    until(browser, PLAYABLE)
    browser.execute_script("const v = document.querySelector('#heat video'); v.muted = true; v.play()")
    until(browser, "document.querySelector('#heat video').currentTime > 0.3")
    until(browser, "document.querySelector('#strip img')?.naturalWidth > 100")
    until(browser, "document.getElementById('clip-files').textContent.includes('csv')")
    assert "no threshold of its own" in browser.execute_script(f"return {TEXT}")
    no_complaint_and_no_other_computer(browser)


@pytest.mark.slow
def test_a_text_is_refused_and_a_name_that_is_html_stays_a_name(server, browser, tmp_path):
    browser.get(server)
    click(browser, "example-clip")
    until(browser, "document.getElementById('film').textContent.includes('mp4')")
    click(browser, "run-clip")
    until(browser, PLAYABLE)
    (tmp_path / "words.txt").write_text("no film")
    upload(browser, "film", tmp_path / "words.txt")
    click(browser, "run-clip")
    until(browser, f"{TEXT}.includes('cannot be opened')")
    assert str(tmp_path) not in browser.execute_script(f"return {TEXT}")
    name = "<img src=x onerror='window.injected=1'><b>bold<b>.mp4"
    upload(browser, "film", films.write_film(tmp_path / "film.mp4", 0.5).rename(tmp_path / name))
    click(browser, "run-clip")
    until(browser, PLAYABLE)
    until(browser, "document.getElementById('clip-files').textContent.includes('csv')")
    assert browser.execute_script("return window.injected === undefined && !document.querySelector('#film b')")
    no_complaint_and_no_other_computer(browser)


@pytest.mark.slow
def test_one_job_at_a_time_the_second_one_waits_and_both_can_be_cancelled(server, browser, tmp_path):
    """In two windows: the first one's film takes minutes, and is cancelled."""
    long = films.write_film(tmp_path / "long.mp4", 250, fps=2, size=(320, 240))
    short = films.write_film(tmp_path / "short.mp4", 0.5)
    browser.get(server)
    upload(browser, "film", long)
    click(browser, "run-clip")
    until(browser, "document.querySelector('#progress progress')")
    until(browser, "Number(document.querySelector('#progress progress').value) > 0")
    first = browser.current_window_handle
    browser.switch_to.new_window("window")
    second = browser.current_window_handle
    try:
        browser.get(server)
        upload(browser, "film", short)
        click(browser, "run-clip")
        until(browser, f"/queue/i.test({TEXT})")
        time.sleep(2)
        assert not browser.execute_script(f"return {PLAYABLE}")
        browser.switch_to.window(first)
        assert browser.execute_script("return document.querySelector('#progress progress').value") < 1
        click(browser, "cancel-clip")
        until(browser, "!document.querySelector('#progress progress')")
        browser.switch_to.window(second)
        until(browser, PLAYABLE)  # its turn has come, long before the first one would have ended
        no_complaint_and_no_other_computer(browser)
    finally:
        browser.switch_to.window(second)
        browser.close()
        browser.switch_to.window(first)
    assert not browser.execute_script(f"return {PLAYABLE}")


@pytest.mark.slow
def test_swapping_the_sound_changes_the_maps_in_both_themes_and_on_a_phone(server, browser):
    for theme in ("light", "dark"):
        browser.get(f"{server}?__theme={theme}")
        until(browser, "document.querySelectorAll('button[role=tab]').length >= 2")
        browser.execute_script("[...document.querySelectorAll('button[role=tab]')].at(-1).click()")
        until(browser, "document.querySelectorAll('[id^=sound-] button[aria-label=\"Record audio\"]').length == 2")
        click(browser, "example-image")
        until(browser, "document.querySelector('#image img') && document.querySelector('#sound-B')")
        time.sleep(3)  # both sounds arrive
        click(browser, "run-image")
        until(browser, "document.querySelectorAll('#maps img').length == 2")
        sources = "[...document.querySelectorAll('#maps img')].map((i) => i.src).join()"
        before = browser.execute_script(f"return {sources}")
        browser.execute_script("document.querySelectorAll('#which input')[1].click()")
        until(browser, f"{sources} !== arguments[0] && {sources}", before)
        contrast = browser.execute_script(CONTRAST)
        assert len(contrast) >= 3 and min(contrast) >= 4.5, (theme, contrast)
    try:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        for tab in range(2):
            browser.execute_script("document.querySelectorAll('button[role=tab]')[arguments[0]].click()", tab)
            until(browser, "document.documentElement.scrollWidth <= 390")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    no_complaint_and_no_other_computer(browser)


CONTRAST = """
const light = (text) => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255);
    const linear = parts.map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return /, 0\\)$/.test(colour) && element.parentElement ? behind(element.parentElement) : light(colour);
};
return [...document.querySelectorAll('#intro h1, #intro p, .note p')].map((element) => {
    const ink = light(getComputedStyle(element).color), ground = behind(element);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
});
"""  # of text over the page, as WCAG defines it
