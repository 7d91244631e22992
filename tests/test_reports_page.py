"""The HTML report: its pictures and sounds, its data, and the page itself in a real browser."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from conftest import files_up_to
from PIL import Image

import reports.page as page_module
import scoring.metrics as metrics
from audio_io import SAMPLE_RATE
from reports.page import Gallery, page_data, sample_strip, shown_maps, success_curve, write_page
from reports.pictures import TRUTH_COLOUR
from scoring.summary import ratios_of
from utils import UserError

ODD_IDS = [
    "plain",
    "../../up",
    "a/b\\c",
    "</script><script>alert(1)</script>",
    "tab\tand\nline",
    "rtl\u202ex",
    "\ud800",
]


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    truth = np.zeros((224, 224), dtype=np.float32)
    truth[40:120, 60:160] = 1
    maps = {name: rng.random((224, 224), dtype=np.float32) for name in ("AUD", "AUD_wrong", "IQR")}
    return rng.integers(0, 255, (90, 160, 3), dtype=np.uint8), truth, maps


@pytest.fixture
def sound(tmp_path):
    """Two channels of 44.1 kHz, 4 s, rising from 200 Hz: no two moments sound alike."""
    time = np.arange(4 * 44100) / 44100
    wave = 0.5 * np.sin(2 * np.pi * (200 * time + 100 * time**2))
    soundfile.write(tmp_path / "sound.wav", np.stack([wave, wave], 1), 44100)
    return tmp_path / "sound.wav"


def row_of(name, iou=0.5, **more):
    return {"id": name, "class": "", "area": 8000, "confidence": 0.5, "AUD_iou": iou, "AUD_pointing": True} | more


def results_of(**maps):
    return {"testset": "tiny", "maps": maps or {"AUD": {"cIoU": 1.0, "AUC": 0.5}}}


def data_in(page):
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(script[1])


def make(folder, sample, ids, iou=0.5):
    gallery = Gallery(folder)
    for name in ids:
        gallery.add(name, *sample, None)
    return gallery.finish(results_of(), [row_of(name, iou) for name in ids])


def test_a_strip_shows_the_picture_and_every_map_with_the_outline(sample):
    picture, truth, maps = sample
    strip = sample_strip(picture, truth, {"AUD": maps["AUD"], "IQR": maps["IQR"]})
    assert strip.shape == (224, 3 * 224, 3) and strip.dtype == np.uint8
    tiles = np.split(strip, 3, axis=1)
    for tile in tiles:
        assert (tile[40, 60:160] == TRUTH_COLOUR).all() and (tile[40:120, 159] == TRUTH_COLOUR).all()
    outside = np.s_[130:, :]
    assert not (tiles[0][outside] == tiles[1][outside]).all() and not (tiles[1][outside] == tiles[2][outside]).all()
    squeezed = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC))
    assert (tiles[0][outside] == squeezed[outside]).all()


def test_maps_are_chosen_by_name_and_a_missing_one_is_named():
    given = dict.fromkeys(("other", "IQR", "AUD", "OGL"))
    assert shown_maps(given) == ["AUD", "IQR"]
    assert shown_maps({"IQR": None, "x": None}) == ["IQR"]
    assert shown_maps({"x": None, "y": None, "z": None}) == ["x", "y"]
    assert shown_maps(given, ["OGL", "AUD"]) == ["OGL", "AUD"]
    with pytest.raises(ValueError, match="no map nowhere to draw: there are other, IQR"):
        shown_maps(given, ["OGL", "nowhere"])


@pytest.mark.parametrize("kind", ["MP3", "WAV"])
@pytest.mark.parametrize("seconds", [1.0, 10.0])
def test_the_sound_is_what_the_model_hears(sample, sound, tmp_path, monkeypatch, kind, seconds):
    if kind not in soundfile.available_formats():
        pytest.skip("this libsndfile writes no MP3")
    monkeypatch.setattr(page_module, "audio_format", lambda: kind)
    gallery = Gallery(tmp_path / "out", seconds=seconds)
    gallery.add("a", *sample, sound)
    gallery.finish(results_of(), [row_of("a")])
    heard, rate = soundfile.read(tmp_path / "out" / "report_files" / f"00000.{kind.lower()}", always_2d=True)
    assert rate == SAMPLE_RATE and heard.shape[1] == 1 and abs(len(heard) / rate - seconds) < 0.1

    def pitch(start):  # of 0.1 s
        return np.abs(np.fft.rfft(heard[int(start * rate) :][: rate // 10, 0])).argmax() * 10

    start = 1.5 if seconds == 1 else 0  # the middle second of four, or all of it again and again
    assert all(abs(pitch(at) - (200 + 200 * ((start + at) % 4 + 0.05))) < 25 for at in (0.1, 0.4, 0.8))
    assert seconds == 1 or abs(pitch(8.4) - 290) < 25


def test_without_a_playable_sound_there_is_no_player_and_a_broken_one_stops_with_its_name(sample, tmp_path):
    gallery = Gallery(tmp_path / "out")
    gallery.add("stored", *sample, tmp_path / "power.npy")
    gallery.add("none", *sample, None)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"broken\.wav"):
        gallery.add("broken", *sample, tmp_path / "broken.wav")
    assert [sound for _, sound in gallery.files.values()] == [None, None]


def test_any_id_is_a_safe_file_name_and_a_safe_text(sample, tmp_path):
    page = make(tmp_path / "out", sample, ODD_IDS)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report_files"]
    pictures = sorted(path.name for path in (tmp_path / "out" / "report_files").iterdir())
    data = data_in(page)
    assert data["samples"]["picture"] == pictures and len(pictures) == len(ODD_IDS)
    assert data["samples"]["id"] == ODD_IDS
    template = page_module.TEMPLATE.read_text("utf-8")
    assert page.read_text("utf-8").count("</script") == template.count("</script")


def test_a_rerun_replaces_everything_and_a_broken_one_leaves_the_old_page_whole(sample, tmp_path):
    page = make(tmp_path, sample, ["a", "b", "c"])
    assert make(tmp_path, sample, ["d"]) == page == tmp_path / "report.html"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path.name for path in before] == ["report.html", "00000.jpg"] and data_in(page)["samples"]["id"] == ["d"]

    gallery = Gallery(tmp_path)
    gallery.add("e", sample[0] // 2, *sample[1:], None)
    with pytest.raises(ValueError, match="2 samples have a row or an image, but not both, 'e' among them"):
        gallery.finish(results_of(), [row_of("f")])
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items()
    make(tmp_path, sample, ["g"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report_files"]


def test_nothing_that_breaks_off_leaves_a_page_of_two_runs(sample, tmp_path, monkeypatch):
    page = make(tmp_path, sample, ["a"])
    calls = iter([page_module.os.replace])  # the page's own write; the next move fails

    def replace(*paths):
        next(calls, lambda *_: (_ for _ in ()).throw(OSError("disk")))(*paths)

    monkeypatch.setattr(page_module.os, "replace", replace)
    with pytest.raises(OSError, match="disk"):
        make(tmp_path, sample, ["b"])
    assert not page.exists()


def test_a_full_disk_is_one_line_that_names_the_file(sample, tmp_path):
    with files_up_to(2000), pytest.raises(UserError, match=r"00000\.\w+ cannot be written \(File too large\)"):
        Gallery(tmp_path).add("a", *sample, np.random.default_rng(0).uniform(-0.5, 0.5, 80000))


def test_two_samples_of_one_id_or_none_at_all_are_refused(sample, tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add("a", *sample, None)
    with pytest.raises(ValueError, match="a is in the gallery already"):
        gallery.add("a", *sample, None)
    with pytest.raises(ValueError, match="no sample"):
        Gallery(tmp_path).finish(results_of(), [])


def test_rounding_never_turns_a_failure_into_a_success_and_undefined_is_null():
    values = {"a": 0.49999, "b": 0.5, "c": math.nan, "d": 0.123456}
    rows = [row_of(name, iou, AUD_average_precision=None) for name, iou in values.items()]
    data = page_data(results_of(), rows, ["AUD"], {name: (f"{name}.jpg", None) for name in values})
    assert data["samples"]["maps"]["AUD"]["iou"] == [4999, 5000, None, 1234]
    assert data["samples"]["maps"]["AUD"]["average_precision"] == [None] * 4
    assert data["samples"]["maps"]["AUD"]["pointing"] == [10000] * 4


def test_the_area_under_the_drawn_curve_is_the_auc():
    ious = np.append(np.random.default_rng(0).random(200), [0.5, 0.05, 1.0])
    curve = success_curve(ious)
    ratios = ratios_of({"iou": ious}, np.zeros(len(ious), dtype=bool))
    assert len(curve) == 21 and curve[10] == ratios["cIoU"].value()
    assert (sum(curve) - (curve[0] + curve[-1]) / 2) / 20 == pytest.approx(ratios["AUC"].value(), abs=1e-12)
    assert success_curve(np.array([0.9, math.nan]))[10] == 0.5  # an undefined one counts


def test_the_page_asks_for_nothing_from_elsewhere():
    template = page_module.TEMPLATE.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not a place
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|\.innerHTML|fetch\(|<link(?! rel=\"icon\" href=\"data:,\")", template
    )


# ---------------------------------------------------------------- in a browser

ROWS, CLASSES = 5158, 220
MAPS = ("AUD", "AUD_wrong", "IMG_QUERY", "IQR", "OBJ_PRIOR", "OGL", "IQR_OGL")
FIGURES = [f"{name}{suffix}" for suffix in metrics.RULES.values() for name in ("cIoU", "AUC", "mean_iou")]
HOSTILE = "<b>bold</b> & </script>"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven through selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver, log_output=subprocess.DEVNULL)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def big_page(tmp_path_factory):
    """A page as large as VGG-SS's, whose samples share four pictures and one sound."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("big")
    (folder / page_module.FILES).mkdir()
    for i in range(4):
        Image.new("RGB", (3 * 224, 224), (60 * i, 80, 120)).save(folder / page_module.FILES / f"{i}.jpg")
    soundfile.write(folder / page_module.FILES / "s.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    names = [HOSTILE, *(f"class {i}" for i in range(1, CLASSES))]
    rows, scores = [], rng.random((ROWS, len(MAPS), 4))
    for i in range(ROWS):
        row = {"id": f"video_{i:06d}", "class": names[i % CLASSES], "area": i, "confidence": rng.random()}
        for name, (*ious, precision) in zip(MAPS, scores[i]):
            row |= {f"{name}_iou{suffix}": iou for suffix, iou in zip(metrics.RULES.values(), ious)}
            row |= {f"{name}_average_precision": precision, f"{name}_pointing": ious[0] > 0.3}
        rows.append(row)
    figures = dict.fromkeys((*FIGURES, "mAP", "pointing"), 0.612345678)
    ends = {name: [0.512345678, 0.712345678] for name in figures}
    group = {"samples": 23, "maps": dict.fromkeys(MAPS, figures), "intervals": dict.fromkeys(MAPS, ends)}
    results = group | {"testset": "vggss", "by_class": dict.fromkeys(names, group), "by_size": {"larger": group}}
    results["maps"] = group["maps"] | {"AUD": figures | {"listening": 0.0825}}
    files = {row["id"]: (f"{i % 4}.jpg", "s.wav") for i, row in enumerate(rows)}
    write_page(results, rows, folder / page_module.PAGE, ["AUD", "IQR"], files)
    return folder / page_module.PAGE, rows


@pytest.fixture
def page(browser, big_page):
    """The page, freshly loaded, scrolled to its gallery, and its rows; nothing may be said on the console."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(big_page[0].as_uri())
    scroll_to_gallery(browser)
    yield browser, big_page[1]
    assert browser.get_log("browser") == []


def scroll_to_gallery(browser):
    browser.execute_script("document.getElementById('gallery-title').scrollIntoView()")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")


def choose(browser, control, value):
    """Set a control as a user would, and wait for the next frame."""
    browser.execute_async_script(
        """const [id, value, done] = arguments, node = document.getElementById(id);
        if (node.type === "checkbox") node.checked = value; else node.value = value;
        node.dispatchEvent(new Event(node.type === "search" ? "input" : "change"));
        requestAnimationFrame(() => setTimeout(done));""",
        control,
        value,
    )


def first_ids(browser, count=6):
    script = "return [...document.querySelectorAll('.card .id')].slice(0, arguments[0]).map((n) => n.textContent)"
    return browser.execute_script(script, count)


def test_the_page_of_5158_samples_draws_only_what_is_in_sight(page):
    browser, rows = page
    assert first_ids(browser) == [row["id"] for row in rows[:6]]
    assert 6 < browser.execute_script("return document.querySelectorAll('.card').length") < 100
    assert browser.execute_script("return document.querySelector('#listening .figure').textContent") == "+8.2"
    assert browser.execute_script("return document.querySelectorAll('#class-bars li').length") == CLASSES
    assert browser.execute_script("return document.querySelectorAll('#curve path').length") == len(MAPS)


@pytest.mark.parametrize("order, sign", [("worst", 1), ("best", -1)])
def test_sorting_by_iou_changes_the_order(page, order, sign):
    browser, rows = page
    choose(browser, "sort", order)
    by_iqr = sorted(rows, key=lambda row: sign * math.floor(1e4 * row["IQR_iou"]))
    assert first_ids(browser) == [row["id"] for row in by_iqr[:6]]
    choose(browser, "map", "AUD")
    choose(browser, "rule", "_half")
    by_half = sorted(rows, key=lambda row: sign * math.floor(1e4 * row["AUD_iou_half"]))
    assert first_ids(browser) == [row["id"] for row in by_half[:6]]


def test_filters_hide_what_does_not_fit_and_count_what_does(page):
    browser, rows = page

    def shown():
        return browser.execute_script("return document.getElementById('count').textContent")

    choose(browser, "failures", True)
    failed = [row for row in rows if row["IQR_iou"] < 0.5]
    assert shown() == f"{len(failed):,} of 5,158 samples" and first_ids(browser) == [r["id"] for r in failed[:6]]
    choose(browser, "missed", True)
    missed = [row for row in failed if not row["IQR_pointing"]]
    assert shown() == f"{len(missed):,} of 5,158 samples"
    browser.find_element("css selector", f"#class-bars button[title^='{HOSTILE}']").click()
    own = [row["id"] for row in missed if row["class"] == HOSTILE]
    assert 0 < len(own) < 24 and shown() == f"{len(own)} of 5,158 samples" and first_ids(browser, 99) == own
    choose(browser, "find", own[-1][2:])
    assert first_ids(browser) == [own[-1]]
    choose(browser, "find", "nothing like it")
    assert first_ids(browser) == [] and browser.find_element("id", "none").is_displayed()
    browser.find_element("id", "reset").click()
    assert shown() == "5,158 of 5,158 samples"


def test_the_keyboard_moves_plays_and_enlarges(page):
    browser, rows = page
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()
        focus = "return document.activeElement.closest('.card')?.querySelector('.id').textContent"
        return browser.execute_script(focus)

    browser.execute_script("document.querySelector('.card').focus()")
    assert press(Keys.ARROW_RIGHT) == rows[1]["id"]
    assert press(Keys.ARROW_DOWN) == rows[4]["id"]  # three columns
    assert press(Keys.END) == rows[-1]["id"]
    assert press(Keys.HOME) == rows[0]["id"]
    press(Keys.SPACE)
    assert browser.execute_script("return new URL(audio.src).pathname.endsWith('s.wav') && !audio.paused")
    press(Keys.SPACE)
    assert browser.execute_script("return audio.paused")
    press(Keys.ENTER, Keys.ARROW_RIGHT)
    assert browser.find_element("id", "large").is_displayed()
    assert browser.find_element("id", "large-id").text == rows[1]["id"]
    assert len(browser.find_elements("css selector", "#views img")) == 3
    assert press(Keys.ESCAPE) == rows[1]["id"]


def test_names_are_shown_as_they_are_and_never_run(page):
    browser, _ = page
    assert browser.execute_script("return document.querySelector('.card .who bdi').textContent") == HOSTILE
    assert not browser.find_elements("css selector", "main b")


CONTRASTS = """
const style = (node) => getComputedStyle(node), channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const light = (colour) => channels(colour).slice(0, 3)
  .reduce((sum, c, i) => sum + linear(c / 255) * [0.2126, 0.7152, 0.0722][i], 0.05);
const paper = (node) => (channels(style(node).backgroundColor)[3] === 0 ? paper(node.parentElement)
  : style(node).backgroundColor);
const ratio = (a, b) => Math.max(a / b, b / a);
const leaf = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
return [...document.body.querySelectorAll(":not(script, style, option, text)")]
  .filter((node) => node.checkVisibility() && leaf(node))
  .map((node) => [ratio(light(style(node).color), light(paper(node))), node.outerHTML])
  .sort((a, b) => a[0] - b[0]).slice(0, 3);"""


def test_both_themes_are_legible_and_the_button_changes_between_them(page):
    browser, _ = page
    papers = set()
    for _ in range(2):
        lowest = browser.execute_script(CONTRASTS)
        assert lowest[0][0] >= 4.5, lowest
        papers.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        browser.find_element("id", "theme").click()
    assert len(papers) == 2


def test_a_phone_shows_one_column_and_nothing_sticks_out(page):
    browser, rows = page
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.refresh()
    scroll_to_gallery(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert (
        browser.execute_script("return new Set([...document.querySelectorAll('.card')].map((c) => c.style.left)).size")
        == 1
    )
    browser.execute_script("document.querySelectorAll('.strip')[1].click()")
    assert browser.find_element("id", "large-id").text == rows[1]["id"]
    assert browser.execute_script("return large.scrollWidth <= 390")
    assert all(browser.find_element("id", name).size["height"] > 100 for name in ("views", "large-scores"))


def test_a_page_without_its_folder_says_so_once(browser, big_page, tmp_path):
    shutil.copy(big_page[0], tmp_path / "alone.html")
    browser.get((tmp_path / "alone.html").as_uri())
    browser.execute_script("document.getElementById('gallery').scrollIntoView()")
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 10).until(lambda b: b.find_element("id", "apart").is_displayed())
    before = len(browser.get_log("browser"))  # the browser's own words about the files that it was asked for
    browser.execute_script("scrollTo(0, 1e6)")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert 0 < before < 100 and browser.get_log("browser") == []
    assert "report_files" in browser.find_element("id", "apart").text
    assert not browser.find_elements("css selector", ".card img, .play")
