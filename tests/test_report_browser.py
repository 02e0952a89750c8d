"""The page in a real headless Chromium: curves, filters, keyboard, hostile completions, phone, theme, no network."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlme.report.compare import write_comparison
from rlme.report.page_data import write_report
from tests.synthetic_run import HOSTILE, write_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
selenium = pytest.importorskip("selenium", reason="needs selenium to drive Chromium")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "collapse", steps=60, prompts=4))


@pytest.fixture
def opened(driver: Any, page: Path) -> Iterator[Any]:
    """The page, freshly opened; afterwards: nothing in the console, nothing asked of the network, nothing executed."""
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(page.as_uri())
    yield driver
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in urls if url.startswith("file://")]) == 1
    assert driver.execute_script("return window.pwned") is None


def css(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements("css selector", selector))


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def value(driver: Any, name: str) -> str:
    return str(driver.execute_script(f"return document.getElementById('{name}').value"))


def eventually(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.03)


def test_curves_are_drawn(opened: Any) -> None:
    charts = css(opened, "#charts .chart")
    assert [c.find_element("css selector", "h3").text for c in charts][:2] == ["Reward", "Gold accuracy"]
    for chart in charts:
        paths = chart.find_elements("css selector", "svg[role=img] path.smooth")
        assert paths
        assert all("NaN" not in path.get_attribute("d") for path in paths)
        assert chart.find_elements("css selector", ".alarm-line")
    assert "Alarm" in css(opened, ".findings .bad")[0].text
    assert len(css(opened, ".tile")) == 8


def test_a_name_in_the_legend_hides_its_curve(opened: Any) -> None:
    chart = css(opened, "#charts .chart")[1]
    before = len(chart.find_elements("css selector", "path.smooth"))
    button = chart.find_elements("css selector", ".legend button")[0]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert len(chart.find_elements("css selector", "path.smooth")) == before - 1


def test_pointing_at_a_curve_reads_it_and_clicking_opens_the_step(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    svg = css(opened, "#charts .chart svg[role=img]")[1]
    ActionChains(opened).move_to_element_with_offset(svg, 0, 0).perform()
    tip = css(opened, "#tip")[0]
    assert tip.is_displayed() and tip.text.startswith("step ")
    step = tip.text.splitlines()[0].removeprefix("step ")
    svg.click()
    assert value(opened, "step") == step


def test_a_chart_is_read_with_the_keyboard(opened: Any) -> None:
    opened.execute_script("document.querySelectorAll('#charts svg[role=img]')[0].focus()")
    press(opened, "\ue012", "\ue012")  # left, left
    assert css(opened, "#tip b")[0].text == "step 58"
    press(opened, "\ue007")  # enter
    assert value(opened, "step") == "58"


def test_samples_of_a_group_are_ordered_and_marked(opened: Any) -> None:
    assert value(opened, "step") == opened.execute_script(
        "return String(JSON.parse(document.getElementById('data').textContent).marks[0].step)"
    )  # opens at the alarm
    cards = css(opened, ".sample")
    assert len(cards) == 6
    rewards = [
        float(card.find_element("css selector", ".reward").text) for card in cards if "no reward" not in card.text
    ]
    assert rewards == sorted(rewards, reverse=True)
    assert "best" in cards[0].get_attribute("class")
    assert css(opened, ".chip.right, .chip.wrong")
    assert len(cards[0].find_elements("css selector", ".judged tbody tr")) == 6
    assert "to the group's mean" in cards[0].text


def test_keys_walk_through_steps_and_prompts(opened: Any) -> None:
    press(opened, "\ue00c")
    step, prompt = int(value(opened, "step")), value(opened, "prompt")
    press(opened, "\ue012")  # left
    assert int(value(opened, "step")) == step - 1
    press(opened, "\ue014")  # right
    assert int(value(opened, "step")) == step
    press(opened, "j")
    assert value(opened, "prompt") != prompt
    press(opened, "k")
    assert value(opened, "prompt") == prompt
    press(opened, "?")
    assert css(opened, "#help")[0].is_displayed()
    press(opened, "\ue00c")
    eventually(lambda: not css(opened, "#help")[0].is_displayed())


@pytest.mark.parametrize("mark", ["wrong", "disagree", "failed", "clipped", "addresses"])
def test_filters_find_what_they_name(opened: Any, mark: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(css(opened, "#filter")[0]).select_by_value(mark)
    name = opened.execute_script("return JSON.parse(document.getElementById('data').textContent).mark_names")[mark]
    cards = css(opened, ".sample")
    assert cards
    assert all(name in [chip.text for chip in card.find_elements("css selector", ".chip.mark")] for card in cards)
    expected = opened.execute_script(
        "return JSON.parse(document.getElementById('data').textContent).groups.filter(g => !g.heldout)"
        f".flatMap(g => g.rows).filter(r => r.marks.includes('{mark}')).length"
    )
    assert css(opened, "#found")[0].text.startswith(f"{expected:,} answer")
    if mark == "failed":
        assert all("failed: timeout – no answer within 30 s" in card.text for card in cards)
    press(opened, "\ue00c")
    assert value(opened, "filter") == ""


def test_search_finds_and_leads_back_to_the_group(opened: Any) -> None:
    press(opened, "/")
    press(opened, *"only LOGICAL")
    eventually(lambda: bool(css(opened, ".sample mark")))
    assert {mark.text.lower() for mark in css(opened, ".sample mark")} == {"only logical"}
    shown = css(opened, ".sample")[0].get_attribute("aria-label")
    button = next(b for b in css(opened, "#browser button") if b.text.startswith("Its whole group"))
    opened.execute_script("arguments[0].click()", button)
    assert f"step {value(opened, 'step')}, prompt {value(opened, 'prompt')}" in shown
    assert len(css(opened, ".sample")) == 6
    press(opened, "/")
    press(opened, *"no such words anywhere")
    eventually(lambda: css(opened, "#found")[0].text == "Nothing found.")


def test_hostile_completions_are_shown_and_never_run(opened: Any) -> None:
    first = "return document.querySelector('.sample .text')?.textContent ?? ''"
    for hostile in HOSTILE:
        word = next(line for line in hostile.split("\n") if line)[:24]
        opened.execute_script(
            "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            word,
        )
        eventually(lambda word=word: word in opened.execute_script(first))  # type: ignore[misc]
    assert css(opened, ".sample .text script, .sample img, .sample iframe, .sample a, .sample style, .sample b") == []
    time.sleep(0.2)  # anything that was to run has had its chance


def test_control_characters_are_shown_by_name(opened: Any) -> None:
    opened.execute_script(
        "const s = document.getElementById('search'); s.value = 'right to left'; s.dispatchEvent(new Event('input'))"
    )
    shown = "return [...document.querySelectorAll('.sample .text')].map(e => e.textContent).join()"
    eventually(lambda: "[U+202E] right to left ␀ ␛[31mred␛[0m" in opened.execute_script(shown))


def test_held_out_answers_are_their_own_set(opened: Any) -> None:
    from selenium.webdriver.support.ui import Select

    Select(css(opened, "#set")[0]).select_by_visible_text("held-out prompts")
    assert "held out" in css(opened, ".prompt summary")[0].text
    assert len(css(opened, ".sample")) == 1


def test_theme_goes_round_and_changes_the_page(opened: Any) -> None:
    def background() -> str:
        return str(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))

    button = css(opened, "#theme")[0]
    button.click()
    light = background()
    button.click()
    assert background() != light
    button.click()
    assert button.text == "Theme: system"


def test_text_has_enough_contrast_in_both_themes(opened: Any) -> None:
    """WCAG AA: 4.5 for text on the surfaces it stands on."""
    script = """
    const style = getComputedStyle(document.documentElement), read = n => style.getPropertyValue(n).trim();
    return Object.fromEntries(arguments[0].map(n => [n, read(n)]));
    """
    pairs = [
        *((text, surface) for text in ("--text", "--quiet") for surface in ("--page", "--card", "--soft")),
        *((f"--{k}", f"--{k}-soft") for k in ("bad", "warn", "good", "info")),
    ]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for theme in ("light", "dark"):
        opened.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
        colours = opened.execute_script(script, sorted({name for pair in pairs for name in pair}))
        for text, surface in pairs:
            high, low = sorted((luminance(colours[text]), luminance(colours[surface])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, text, surface)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_needs_no_sideways_scrolling(opened: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened.refresh()
        opened.get_log("performance")  # a second load of the same file is meant here
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        assert opened.find_element("css selector", "#charts .chart svg[role=img]").size["width"] > 200
        opened.get(opened.current_url)
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_on_light_paper_without_controls(opened: Any) -> None:
    opened.execute_script("document.documentElement.dataset.theme = 'dark'")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not css(opened, "#controls")[0].is_displayed()
        assert css(opened, "#charts .chart")[0].is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_an_empty_run_opens(driver: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run_info: {format: 1}\n")
    driver.get_log("browser")
    driver.get(write_report(tmp_path).as_uri())
    assert "No training step has been recorded yet" in driver.find_element("css selector", ".findings").text
    assert not driver.find_element("id", "samples").is_displayed()
    assert driver.get_log("browser") == []


def test_a_comparison_opens_with_bands_and_tables(driver: Any, tmp_path: Path) -> None:
    folders = []
    for rate in (2e-6, 1e-6):
        for seed in range(2):
            folder = tmp_path / f"{rate}-{seed}"
            write_run(folder, steps=10, prompts=2, eval_every=5, eval_prompts=4, seed=seed, learning_rate=rate)
            folders.append(folder)
    write_comparison(folders, tmp_path / "compare.html")
    driver.get_log("browser")
    driver.get((tmp_path / "compare.html").as_uri())
    assert driver.get_log("browser") == []
    assert len(css(driver, "#charts .chart")[0].find_elements("css selector", "path.band")) == 2
    assert [h.text for h in css(driver, "#tables h2")] == ["Results", "Runs", "Settings that differ"]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_comparison_of_many_is_readable_and_scrolls_in_its_own_box(driver: Any, tmp_path: Path, width: int) -> None:
    folders = []
    for i in range(7):
        (tmp_path / f"r{i}").mkdir()
        (tmp_path / f"r{i}" / "metrics.jsonl").write_text('{"step": 1, "reward": -0.123, "time/step": 1234.5}\n')
        (tmp_path / f"r{i}" / "config.yaml").write_text(f"train: {{learning_rate: {i + 1}.0e-6}}\n")
        folders.append(tmp_path / f"r{i}")
    write_comparison(folders, tmp_path / "compare.html")
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.get((tmp_path / "compare.html").as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        for table in css(driver, "#tables table"):
            cells = table.find_elements("css selector", "td")
            assert cells[0].size["width"] >= 130
            assert all(cell.size["height"] < 130 for cell in cells)
        box = css(driver, "#tables .scroll")[0]
        assert driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_legend_breaks_no_number(driver: Any, tmp_path: Path) -> None:
    name = "mistral-nemo-base-2407-some-finetune-v12"
    record = {
        "step": 1,
        "reward": -1.0,
        f"judge/{name}/q/probability": 0.98765,
        f"eval/judge/{name}/q/probability": 0.987,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    driver.get(write_report(tmp_path).as_uri())
    values = css(driver, ".legend .now")
    assert any(value.text == "0.988" for value in values)
    assert all(value.size["height"] < 25 for value in values)


@pytest.mark.slow
def test_a_run_of_500_steps_x_96_completions_stays_below_ten_megabytes(driver: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "big", steps=500, prompts=16, eval_every=50, eval_prompts=20)
    started = time.monotonic()
    page = write_report(folder)
    assert time.monotonic() - started < 60
    assert page.stat().st_size < 10_000_000
    driver.get(page.as_uri())
    assert len(css(driver, ".sample")) == 6
