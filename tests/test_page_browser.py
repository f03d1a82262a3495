"""Tests the pages in a real browser: clicks on filters, a phone, dark colours, no network, a run that trains."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.report import write_run_report
from tests.browser import ELEMENT, MISSING, Browser, browser
from tests.sample_runs import usage, write_judged_evaluation, write_run
from tests.test_following import lines, served
from tests.test_report import EVIL

pytestmark = [pytest.mark.launches, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

QUESTIONS = 1000  # each of which has two answers
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as session:
        yield session


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run with its page: 300 logged steps, 2,000 answers of some 64 words, and a question that is an attack."""
    folder = tmp_path_factory.mktemp("page") / "mine"
    write_run(folder, usage())
    write_judged_evaluation(folder, copies=QUESTIONS // 5, words=32)
    with (folder / "answers.jsonl").open("a") as file:
        for model in ("base", "tuned"):
            evil = {"instruction": EVIL, "expected": "", "answer": f"</script>{EVIL}", "right": False, "reason": EVIL}
            file.write(json.dumps({"model": model, "row": -1, "turn": 1, "score": 0.0} | evil) + "\n")
    metrics = [{"step": step, "train/loss": 9.0 / step + step % 3 / 10, "train/lr": 0.1} for step in range(1, 301)]
    metrics[149]["val/loss"], metrics[299]["val/loss"] = 0.5, 0.4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    write_run_report([folder], folder)
    return folder


@pytest.fixture
def page(chromium: Browser, written: Path) -> Browser:
    """Opens the page anew, on a desktop and in light colours."""
    chromium.protocol("Emulation.setDeviceMetricsOverride", **DESKTOP)
    chromium.protocol("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    chromium.open((written / "report.html").as_uri())
    return chromium


def first_cells(page: Browser) -> list[str]:
    cells: list[str] = page.run(
        '[...document.querySelectorAll(".answers tbody tr")].map(row => row.cells[0].textContent)'
    )
    return cells


def said(page: Browser) -> str:
    return page.texts(".said")[0]


def test_2000_answers_are_less_than_2_mb(written: Path) -> None:
    assert (written / "report.html").stat().st_size < 2_000_000


def test_a_click_on_a_filter_shows_only_such_answers(page: Browser) -> None:
    assert page.texts(".filters button") == ["all 1001", "better 600", "worse 200", "wrong both 201", "right both 0"]
    assert said(page) == "1 to 50 of 1001"
    page.click('.filters button[data-filter="worse"]')
    assert first_cells(page) == ["worse"] * 50
    assert said(page) == "1 to 50 of 200"
    assert page.texts('.filters button[aria-pressed="true"]') == ["worse 200"]
    page.click(".pages button:last-child")
    assert said(page) == "51 to 100 of 200"
    page.click('.filters button[data-filter="right both"]')
    assert first_cells(page) == []
    assert said(page) == "no answer is like that"


def test_a_search_and_a_reason_narrow_the_answers(page: Browser) -> None:
    page.type(".filters input", "Question 77")
    assert said(page) == "1 to 11 of 11", "77 and 770 to 779"
    page.click('.filters select[aria-label="reason"] option:nth-child(2)')
    chosen = page.run('document.querySelector(".filters select").selectedOptions[0].textContent')
    assert chosen == "N is not expected"
    assert 0 < len(first_cells(page)) < 11


def test_what_differs_from_the_expected_answer_is_marked(page: Browser) -> None:
    page.type(".filters input", "question 7")
    marks = page.run('[...document.querySelector(".answers tbody tr").querySelectorAll("td")].map(cell => '
                     '[...cell.querySelectorAll("mark")].map(mark => mark.textContent))')  # fmt: skip
    assert marks[:3] == [[], [], []], "what it is, the prompt, the expected answer"
    assert marks[3] == ["base"] * 32
    assert marks[4] == ["tuned"] * 32


def test_answers_are_text_whatever_they_say(page: Browser) -> None:
    page.type(".filters input", "<script>alert")
    assert said(page) == "1 to 1 of 1"
    assert page.run('document.querySelectorAll("img").length') == 0
    assert page.run('document.querySelector(".answers tbody td:nth-child(4)").textContent').startswith("✗ </script>")
    assert page.run("document.scripts.length") == 3


def test_nothing_is_asked_of_a_network(page: Browser, written: Path) -> None:
    page.click('.filters button[data-filter="better"]')
    assert page.requests() == [(written / "report.html").as_uri()]
    assert page.errors() == []


def test_the_first_screen_has_the_three_answers(page: Browser) -> None:
    assert page.texts(".card h2") == ["Did it get better?", "What did it cost?", "Is anything wrong?"]
    assert page.texts(".card .big")[:2] == ["20.0 % → 60.0 %", "1 min 10 s"]
    ends = page.run('[...document.querySelectorAll(".card")].map(card => card.getBoundingClientRect().bottom)')
    assert max(ends) < DESKTOP["height"]


def test_curves_are_drawn_with_a_tooltip_and_a_log_scale(page: Browser) -> None:
    figure = 'figure[data-curve="loss"]'
    assert page.run(f"getComputedStyle(document.querySelector(`{figure} > svg`)).display") == "none"
    assert page.texts(f"{figure} .legend button") == ["training", "validation"]
    (over,) = page.elements(f"{figure} .u-over")
    move = {
        "type": "pointerMove",
        "duration": 0,
        "origin": {ELEMENT: over},
        "x": 0,
        "y": 0,
    }
    page.ask("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})
    (tip,) = page.texts(f"{figure} .tip")
    assert tip.startswith("optimizer step 15")
    assert "validation 0.5" in tip, "that of step 150, which is the nearest"
    ticks = f"document.querySelector(`{figure} input[type=checkbox]`).checked"
    assert page.run(ticks) is True, "the loss falls by more than ten times"
    page.click(f"{figure} input[type=checkbox]")
    assert page.run(ticks) is False
    page.click(f"{figure} .legend button:first-child")
    assert page.texts(f'{figure} .legend button[aria-pressed="false"]') == ["training"]
    assert page.errors() == []


def test_a_smoothed_line_is_a_weighted_mean_to_both_sides(page: Browser) -> None:
    """The reference is the sum over all places, with the weight 0.8 ** distance; a missing value has no distance."""
    values = [5.0, None, 3.0, 9.0, None, 1.0, 2.0]
    there = [value for value in values if value is not None]
    weights = [[0.8 ** abs(i - j) for j in range(len(there))] for i in range(len(there))]
    means = iter(sum(w * v for w, v in zip(row, there, strict=True)) / sum(row) for row in weights)
    expected = [None if value is None else next(means) for value in values]
    found = page.run(f"smoothed({json.dumps(values)}, 0.8)")
    assert [value is None for value in found] == [value is None for value in expected]
    assert [value for value in found if value is not None] == pytest.approx([v for v in expected if v is not None])


def test_a_phone_scrolls_the_page_in_one_direction_only(page: Browser) -> None:
    page.protocol("Emulation.setDeviceMetricsOverride", **PHONE)
    assert page.run("innerWidth") == PHONE["width"]
    assert page.run("document.documentElement.scrollWidth") == PHONE["width"]
    page.click('.filters button[data-filter="worse"]')
    assert first_cells(page) == ["worse"] * 50
    assert page.run("document.documentElement.scrollWidth") == PHONE["width"]


def test_dark_mode_is_dark(page: Browser) -> None:
    brightness = (
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).reduce((sum, part) => sum + +part, 0)"
    )
    assert page.run(brightness) == 3 * 255
    page.protocol("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.run(brightness) < 3 * 50
    assert page.run(brightness.replace("backgroundColor", "color")) > 3 * 200


def test_without_scripts_the_first_screen_and_the_charts_are_there(page: Browser, written: Path) -> None:
    page.protocol("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open((written / "report.html").as_uri())
        assert len(page.texts(".card .big")) == 3
        assert page.ask(f"/element/{page.elements('figure svg')[0]}/displayed", method="GET") is True
        assert any("report.md has those that failed" in text for text in page.texts("noscript p"))
    finally:
        page.protocol("Emulation.setScriptExecutionDisabled", value=False)


def test_a_run_is_followed_while_it_trains(chromium: Browser, tmp_path: Path) -> None:
    chromium.protocol("Emulation.setDeviceMetricsOverride", **DESKTOP)

    def facts() -> dict[str, str]:
        return dict(zip(chromium.texts(".card h2"), chromium.texts(".card p"), strict=True))

    def wait_for(script: str) -> None:
        wait = f"const look = () => {script} ? arguments[0](true) : setTimeout(look, 100); look()"
        chromium.ask("/timeouts", {"script": 30_000})
        assert chromium.ask("/execute/async", {"script": wait, "args": []}) is True

    with served(tmp_path / "run") as address:
        chromium.open(f"{address}/")
        wait_for('document.getElementById("status").textContent.startsWith("waiting: there is no folder")')
        (tmp_path / "run").mkdir()
        file = tmp_path / "run" / "metrics.jsonl"
        file.write_text(lines(1, 2, 3, **{"val/loss": 2.5}))
        wait_for('document.querySelectorAll(".card").length === 6')
        assert facts()["last validation"] == "2.5 (step 3)"
        assert facts()["step"].startswith("3, of how many")
        assert chromium.elements("#loss canvas")
        file.write_text(lines(1))  # the run goes on from an earlier checkpoint
        wait_for('document.querySelector(".card p").textContent.startsWith("1,")')
        assert chromium.run("told.lines.length") == 1
        assert {url.split("?")[0] for url in chromium.requests()} <= {f"{address}/", f"{address}/metrics", "data:,"}
        assert chromium.errors() == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
