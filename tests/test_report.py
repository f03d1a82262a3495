"""Tests what stands on the pages, that they need no other file, and that they are complete or not written."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from eval.report import main, write_comparison_report, write_run_report
from eval.reporting.markdown import markdown_table
from tests.distributed.launching import ROOT
from tests.sample_runs import (
    CONFIGURATIONS,
    SAMPLES,
    usage,
    write_comparison,
    write_configuration,
    write_evaluation,
    write_judged_evaluation,
    write_run,
)

EVIL = '<script>alert("x")</script> | `b` 王\n![i](http://x.org/i.png)'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects texts, attributes and the rows of the tables, and asserts that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.said: list[str] = []
        self.said_in: dict[str, str] = {}  # texts of the scripts that have an id
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.attributes[-1][0] == "id":
                self.said_in.setdefault(self.attributes[-1][1], data)
            return
        self.said.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def row(self, head: str, cells: int | None = None) -> list[str]:
        """Returns the cells after `head` of the first row that begins with it, and that has so many cells."""
        found = [row[1:] for row in self.rows if row and row[0] == head and cells in (None, len(row) - 1)]
        assert found, f"no row {head!r} in {[row[0] for row in self.rows if row]}"
        return found[0]

    @property
    def text(self) -> str:
        return "".join(self.said)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def answers_of(page: Page) -> dict[str, Any]:
    """Returns the data from which the page's script fills the table of answers."""
    answers: dict[str, Any] = json.loads(page.said_in["answers-data"])
    return answers


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def make_comparison(folder: Path) -> None:
    """Writes a comparison of seven configurations: one_process failed, zero3 is under way, zero2 has not begun."""
    write_comparison(folder)
    write_configuration(folder / "one_process", None, 3.0, status="failed", reason="out of memory: 1 GB")
    for number, name in enumerate(CONFIGURATIONS[1:5]):
        write_configuration(folder / name, usage(), 100.0 + 50 * number)
    write_evaluation(folder / "reference-stage0" / "run")
    write_evaluation(folder / "reference-stage1" / "run", base=False)
    write_configuration(folder / "zero3", None, 1.0)
    (folder / "zero3" / "result.json").unlink()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a comparison with its report, which tests must not change."""
    folder = tmp_path_factory.mktemp("written") / "stages"
    make_comparison(folder)
    write_comparison_report(folder)
    return folder


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    make_comparison(tmp_path / "stages")
    return tmp_path / "stages"


def test_the_references_table_has_its_figures_beside_ours(written: Path) -> None:
    page = page_of(written)
    assert page.row("reference-stage0") == ["114", "100.0", "1.02", "0.67", "7.6", "50.0", "2431 / 28623", "400 / 360"]
    assert page.row("reference-stage1") == ["112", "150.0", "1.00", "1.00", "8.5", "50.0", "2421 / 27810", "400 / 360"]
    assert page.row("reference-stage2_offload")[::2] == ["114", "1.02", "9.0", "2679 / 25693"]
    assert page.row("reference-stage3_offload")[::2] == ["720", "6.43", "11.5", "27213 / 49028"]
    assert page.row("reference-stage3_offload")[1] == "250.0"
    assert page.row("zero2") == ["–", "not measured here"] * 4
    assert page.row("accuracy") == ["0.000", "1.000", "0.000", "0.975", "0.975"]
    assert page.row("prefix right")[:3] == ["–", "–", "1.000"]


def test_the_figures_of_each_configuration(written: Path) -> None:
    page, nothing = page_of(written), "not measured here"
    assert page.row("state") == [
        *("failed: out of memory: 1 GB", "finished", "finished", "finished", "finished"),
        *("not known to have ended", "not known to have ended"),
    ]
    expected = {
        "processes x rows x accumulated": ("2 x 16 x 1", "–"),
        "wall time, s": ("100.0", nothing),
        "steady step time, s: median": ("2.0000", nothing),
        "steady step time, s: lower quartile": ("1.0000", nothing),
        "steady step time, s: upper quartile": ("4.0000", nothing),
        "samples a second": ("8.0", nothing),
        "tokens a second": ("160.0", nothing),
        "model FLOPs utilisation, %": ("25.00", nothing),
        "GPU utilisation, mean %": (nothing, nothing),
        "peak memory of a rank, MB: rank 1": ("800.0", nothing),
        "peak memory of a rank by phase, MB: load": ("500.0", nothing),
        "peak memory of a rank by phase, MB: backward": (nothing, nothing),
        "resident host memory of all processes, peak MB": ("900.0", nothing),
        "swap of all processes, peak MB": (nothing, nothing),
        "host memory of the machine beyond the launch, peak MB": ("500.0", nothing),
        "GPU memory, peak MB": (nothing, nothing),
        "communication a step and rank, MB": ("4.000", nothing),
        "communication a step and rank by kind, MB: reduce_scatter": ("2.000", nothing),
        "training loss at the end, nats a label token": ("2.0000", "2.0000"),
        "accuracy after training": ("0.975", nothing),
    }
    for head, (stage0, zero3) in expected.items():
        assert page.row(head, cells=7)[1::5] == [stage0, zero3], head


def test_the_findings_and_the_verdicts(written: Path) -> None:
    page = page_of(written)
    verdict, published, ours, rule = page.row("Stage 3 + offload takes about 6.3 times as long as stage 1")
    assert verdict == "contradicted"
    assert published == "12 min to 1 min 52 s"
    assert ours == "stage3_offload / stage1: 1.000 ± 1.142", "each 1.57 x 3 / 17 ** 0.5 / 2"
    assert rule == "ratio of the median steady step times: 5.04 to 7.875"
    assert page.row("Fine-tuning lifts the accuracy from 0 to 1")[0] == "confirmed"
    assert page.row("Stage 3 + offload needs least GPU memory")[0] == "not testable on this machine: it has no GPU"
    assert "one_process: failed: out of memory: 1 GB." in page.text
    assert "Least memory of the fullest GPU: not measured here." in page.text


def test_four_charts_and_the_losses(written: Path) -> None:
    drawn = ("cpu_utilisation", "host_memory", "train_loss", "val_loss")
    assert {path.name for path in (written / "charts").iterdir()} == {
        f"{name}.{kind}" for name in drawn for kind in ("svg", "csv")
    }
    html = (written / "report.html").read_text()
    assert re.findall(r"<p>(GPU [^<]*)</p>", html) == [
        "GPU utilisation: not measured here: no GPU is seen on this machine.",
        "GPU memory, of the fullest GPU: not measured here: no GPU is seen on this machine.",
    ]
    for name in drawn:
        assert (written / "charts" / f"{name}.svg").read_text().strip() in html
        assert f"](charts/{name}.svg)" in (written / "report.md").read_text()
    rows = list(csv.reader((written / "charts" / "cpu_utilisation.csv").read_text().splitlines()))
    assert rows[0] == ["run", "seconds since launch", "% of all cores"]
    assert [row for row in rows if row[0] == "zero3"] == [
        ["zero3", "0.5", "25.0"],
        ["zero3", "1.0", "25.0"],
        ["zero3", "1.5", "100.0"],
    ]


def test_a_machine_with_gpus(tmp_path: Path) -> None:
    """The machine has two GPUs, and the comparison has two configurations."""
    write_comparison(tmp_path, ["zero2", "zero3"], matmul_peak_flops={"cuda": 2e8})
    for name in ("zero2", "zero3"):
        write_configuration(tmp_path / name, usage(device_type="cuda", memory_of="CUDA allocator"), 10.0)
        head, *rows = SAMPLES.splitlines()
        gpus = ",".join(f"gpu{gpu}_{what}" for gpu in (0, 1) for what in ("utilisation_percent", "memory_bytes"))
        lines = [
            f"{head},{gpus}",
            *(f"{row},{40 * i},{i}500000000,{20 * i},{i}100000000" for i, row in enumerate(rows)),
        ]
        (tmp_path / name / "samples.csv").write_text("\n".join(lines) + "\n")
    write_comparison_report(tmp_path)
    page = page_of(tmp_path)
    assert page.row("GPU memory, peak MB: GPU 0") == ["2,500.0"] * 2
    assert page.row("GPU utilisation, mean %") == ["30.0"] * 2, "0 and 0, 40 and 20, 80 and 40"
    assert page.row("model FLOPs utilisation, %") == ["25.00"] * 2
    assert page.row("peak memory of a rank is its") == ["CUDA allocator"] * 2
    four = {"gpu_utilisation", "gpu_memory", "cpu_utilisation", "host_memory"}
    assert four <= {path.stem for path in (tmp_path / "charts").glob("*.svg")}
    memory = (tmp_path / "charts" / "gpu_memory.csv").read_text().splitlines()
    assert memory[:3] == ['run,seconds since launch,"used, MB"', "zero2,0.5,500.0", "zero2,1.0,1500.0"]


def test_a_chart_that_has_no_data_any_more_goes(comparison: Path) -> None:
    (comparison / "charts").mkdir()
    (comparison / "charts" / "gpu_memory.svg").write_text("of another day")
    (comparison / "charts" / "mine.svg").write_text("not ours")
    write_comparison_report(comparison)
    assert not (comparison / "charts" / "gpu_memory.svg").exists()
    assert (comparison / "charts" / "mine.svg").exists()


def test_the_summary_has_the_numbers(written: Path) -> None:
    summary = summary_of(written)
    stage0 = summary["runs"]["reference-stage0"]
    assert stage0["mfu"] == pytest.approx(0.25)
    assert stage0["peak_bytes"] == {"rank 0": 700_000_000, "rank 1": 800_000_000}
    assert stage0["gpu_memory_bytes"] is None
    assert summary["null"] == "not measured here"
    assert summary["published"]["reference-stage3_offload"]["wall_seconds"] == 720
    assert summary["published"]["answers"]["tuned"]["tokens_per_second"] == 12.1
    assert len(summary["conclusions"]) == 7
    assert summary["comparison"]["machine"]["cores"] == 4
    assert list(summary["runs"]) == list(CONFIGURATIONS)


def test_a_comparison_of_which_nothing_is_done(tmp_path: Path) -> None:
    write_comparison(tmp_path, overrides=[], matmul_peak_flops={})
    write_comparison_report(tmp_path)
    page = page_of(tmp_path)
    assert page.row("wall time, s") == ["not measured here"] * 7
    assert "svg" not in page.tags
    assert not list((tmp_path / "charts").iterdir())
    assert page.row("matrix product in bf16, FLOP/s") == ["not measured here"]


def test_the_page_needs_nothing_else(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    loads = {
        name: value for name, value in page.attributes if name in ("src", "srcset", "data", "action", "background")
    }
    assert loads == {}
    links = {value for name, value in page.attributes if name.endswith("href") and not value.startswith("#")}
    assert links == {f"charts/{path.name}" for path in (written / "charts").glob("*.csv")}
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert set(re.findall(r"https?://[^\"' ]*", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }, "names, which nothing loads"


def test_the_page_is_structured_and_takes_the_readers_colours(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert ("charset", "utf-8") in page.attributes
    assert ("lang", "en") in page.attributes
    assert "color-scheme: light dark" in html
    assert (page.tags.count("h1"), page.tags.count("main")) == (1, 1)
    assert page.tags.count("table") == html.count('<div class="scroll"'), "each scrolls by itself"
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100, "of several charts in one page"


def test_all_texts_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<b>run|"
    write_run(run, usage(memory_of=EVIL, engine=EVIL))
    write_evaluation(run, answer=EVIL)
    (run / "versions.json").write_text(json.dumps({EVIL: EVIL}))
    write_run_report([run], run)
    page = page_of(run)
    assert page.tags.count("script") == 3, "two with data, and the page's own"
    assert "b" not in page.tags
    assert answers_of(page)["questions"][0]["a"]["0"][:2] == [EVIL, 0]
    text = (run / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<script", text)
    assert "![i]" not in text
    row = next(line for line in text.splitlines() if line.startswith("| 5= |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert "王" in row


def test_the_page_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", usage())
    write_evaluation(tmp_path / "mine")
    main([str(tmp_path / "mine")])
    page = page_of(tmp_path / "mine")
    assert "Run mine" in page.text
    drawn = {path.stem for path in (tmp_path / "mine" / "charts").glob("*.svg")}
    assert drawn == {"loss", "train_lr", "train_grad_norm", "memory"}
    assert "Throughput: not measured here: no train/tokens_per_second in metrics.jsonl." in page.text
    text = (tmp_path / "mine" / "report.md").read_text(encoding="utf-8")
    assert "mine, tuned: 1 of 2 answers failed" in text
    assert "right one" not in text, "report.md has only those that failed"
    answers = answers_of(page)
    assert answers["models"] == ["tuned"]
    assert [(each["q"], each["a"]["0"][0]) for each in answers["questions"]] == [
        ("5=", "王大丫丫的回答是--->1 + 1"),
        ("6=", "right one"),
    ]
    assert page.row("wall time, s") == ["70.0"]
    assert page.row("model FLOPs utilisation, %") == ["not measured here"]
    assert page.row("engine") == ["DeepSpeed ZeRO-3"]
    assert page.row("torch") == ["2.13.0"]
    assert page.row("optim.lr") == ["0.001"]
    assert not [row for row in page.rows if row and "all processes" in row[0]], "no monitor watches a run on its own"


def test_the_accuracy_of_the_checkpoints_over_the_steps(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_run(folder, usage())
    write_judged_evaluation(folder)
    evaluation = json.loads((folder / "eval.json").read_text())
    score = evaluation["scores"]["base"]
    evaluation["scores"] |= {"step-000040": score | {"accuracy": 0.6}, "step-000020": score | {"accuracy": 0.4}}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    main([str(folder)])
    rows = (folder / "charts" / "accuracy.csv").read_text().splitlines()
    assert rows[1:] == ["accuracy,20,0.4", "accuracy,40,0.6"]
    assert "Accuracy of the checkpoints" in page_of(folder).text


def test_a_run_of_which_there_is_only_a_line(tmp_path: Path) -> None:
    """The run has no usage.json, no evaluation, no validation and no versions."""
    run = tmp_path / "mine"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 10.2, "train/grad_norm": null}\n{"step": 2, "tra')
    main([str(run)])
    page = page_of(run)
    assert {path.stem for path in (run / "charts").glob("*.svg")} == {"loss"}
    assert page.row("training loss at the end, nats a label token") == ["10.2000"]
    assert page.row("steady step time, s: median") == ["not measured here"]
    assert "mine has no usage.json" in page.text
    assert "mine: not measured here. python -m eval.run --run mine" in page.text


def test_several_runs_share_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/run", "b/run"):
        write_run(tmp_path / name, usage())
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((tmp_path / "b/run/recipe.yaml").read_text())
    recipe["optim"]["lr"] = 0.5
    (tmp_path / "b/run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["a/run", "b/run", "b/run/"])
    page = page_of(tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"Settings in which the runs differ\*\*\n\n(.*?)\n\n", text, re.DOTALL)
    assert table.splitlines()[2:] == ["| optim.lr | 0.001 | 0.5 |"]
    assert text.index("Settings in which") < text.index("Results and costs")
    assert page.row("wall time, s") == ["70.0", "70.0"]
    assert list(summary_of(tmp_path / "report")["runs"]) == ["a/run", "b/run"]
    assert not (tmp_path / "a" / "run" / "report.html").exists()
    assert "Fastest: a/run, 2 s a step (median), not clearly faster than b/run" in page.text
    main(["a/run", "b/run", "--out", "new/folder"])
    assert (tmp_path / "new" / "folder" / "report.md").is_file()


def make_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "no folder of a run or of a comparison"),
    "a file": (make_file, "no folder of a run or of a comparison"),
    "empty": (make_empty, "no folder of a run or of a comparison"),
    "damaged": (lambda run: (run / "usage.json").write_text("{"), "usage.json: is damaged"),
    "damaged within": (lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"), "metrics.jsonl: is damaged: line 1"),
    "half a comparison": (
        lambda run: write_comparison(run, machine={}),
        "comparison.json: is damaged: 'cores' is miss",
    ),
    "a comparison's list": (lambda run: (run / "comparison.json").write_text("[]"), "comparison.json: is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_run_is_refused_in_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, said = REFUSED[case]
    run = tmp_path / "run"
    write_run(run, usage())
    spoil(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_code:
        main([str(run)])
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert str(run) in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_comparison_stands_alone(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    for argv in ([str(comparison), str(tmp_path / "run")], [str(comparison), "--out", str(tmp_path / "x")]):
        with pytest.raises(SystemExit) as exit_code:
            main(argv)
        assert exit_code.value.code == 2
        assert "Give it alone" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: the report cannot be written: File exists"):
        write_run_report([tmp_path / "run"], tmp_path / "file")


@pytest.mark.parametrize("writes", [0, 5, 10])
def test_a_full_disk_leaves_the_old_files_whole(
    writes: int, comparison: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the first, at the sixth, and at the last of the eleven files."""
    write_comparison_report(comparison)
    (comparison / "zero3" / "run" / "metrics.jsonl").write_text('{"step": 7, "train/loss": 1.0}\n')
    before = {path: path.read_bytes() for path in comparison.rglob("*") if path.is_file()}
    left, write_bytes = [writes], Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if not left[0]:
            write_bytes(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as exit_code:
        main([str(comparison)])
    assert exit_code.value.code == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in comparison.rglob("*") if path.is_file()} == before


def test_a_markdown_table_has_a_rule_under_its_head() -> None:
    assert markdown_table(["", "a"], [["x", "1"], ["y", ""]]) == "| | a |\n|---|---|\n| x | 1 |\n| y | |"


def test_it_starts_without_what_trains() -> None:
    """The command starts quickly because it imports nothing that only a training needs."""
    script = "import sys, eval.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "deepspeed", "accelerate", "peft", "matplotlib.pyplot"} & set(
        done.stdout.split()
    )
