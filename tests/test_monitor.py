"""Tests the monitor with processes that use known amounts, and with a driver that gives known numbers."""

import contextlib
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from eval.hardware import nvml
from eval.hardware.nvml import gpu_columns, gpu_names, open_gpus, sample_gpus
from eval.hardware.process_tree import ProcessTree
from eval.monitor import Monitor, Sampling, columns, main

MB = 1 << 20
HELD = 200 * MB
WAIT = "print('ready', flush=True); sys.stdin.read()"
HOLD = f"held = b'x' * {HELD}; {WAIT}"
SHARE = f"import mmap; held = mmap.mmap(-1, {HELD}); held.write(b'x' * {HELD}); {WAIT}"
BURN = "import time; print('ready', flush=True)\nwhile True: pass"
WRITE = """
file = open(sys.argv[1], "wb")
print('ready', flush=True)
sys.stdin.readline()
import os
file.write(b'x' * (64 << 20))
file.flush()
os.fsync(file.fileno())
print('ready', flush=True)
sys.stdin.read()
"""
CHILD = "import subprocess; subprocess.run([sys.executable, '-c', sys.argv[1], *sys.argv[2:]])"


@contextmanager
def python(code: str, *words: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Runs a Python process that has said that it is ready; ends the process and its children afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{code}", *words],
        env={key: value for key, value in os.environ.items() if key != "RANK"} | (env or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
        process.kill()
        process.communicate()


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


def proc_status(pid: int, key: str) -> int:
    """Returns the bytes that /proc/PID/status has for `key`; the monitor reads resident memory from another file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def test_resident_memory_is_what_was_touched() -> None:
    with python("pass;" + WAIT) as small, python(HOLD) as large:
        cells = [ProcessTree(process.pid).sample(1) for process in (small, large)]
        (rss, rss_rank), (more, more_rank) = [(c["tree_rss_bytes"], c["rank0_rss_bytes"]) for c in cells]
        assert rss == rss_rank
        assert more == more_rank == pytest.approx(proc_status(large.pid, "VmRSS"), abs=2 * MB)
        assert more is not None
        assert rss is not None
        assert more - rss == pytest.approx(HELD, abs=8 * MB)
        assert cells[1]["tree_swap_bytes"] == pytest.approx(proc_status(large.pid, "VmSwap"), abs=MB)


def test_shared_memory_is_counted_as_shared() -> None:
    with python(HOLD) as private, python(SHARE) as shared:
        one, other = (ProcessTree(process.pid).sample(1) for process in (private, shared))
    assert one["tree_shared_bytes"] is not None
    assert one["tree_shared_bytes"] < 40 * MB
    assert other["tree_shared_bytes"] == pytest.approx(one["tree_shared_bytes"] + HELD, abs=8 * MB)


def busy_share(pid: int, seconds: float) -> float:
    """Returns CPU seconds divided by wall seconds, from the nanoseconds that the scheduler counts."""

    def spent() -> float:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9

    before, begun = spent(), time.monotonic()
    time.sleep(seconds)
    return (spent() - before) / (time.monotonic() - begun)


def test_cpu_is_what_the_scheduler_gave() -> None:
    """The share is near 100 % where a core is free, and less on a busy machine."""
    with python(BURN) as process:
        tree = ProcessTree(process.pid)
        share = busy_share(process.pid, 2.0)
        cells = tree.sample(1)
    assert cells["tree_cpu_percent"] == cells["rank0_cpu_percent"] == pytest.approx(100 * share, abs=3)


def test_a_grandchild_counts_and_goes_on_counting_without_its_parent() -> None:
    with python(CHILD, f"import sys; {HOLD}") as process:
        (child,) = psutil.Process(process.pid).children()
        tree = ProcessTree(process.pid)
        rss = [proc_status(pid, "VmRSS") for pid in (process.pid, child.pid)]
        assert tree.sample(1)["tree_rss_bytes"] == pytest.approx(sum(rss), abs=2 * MB)
        assert rss[1] > HELD
        process.kill()
        process.wait()
        try:
            assert tree.sample(1)["tree_rss_bytes"] == pytest.approx(rss[1], abs=2 * MB)
        finally:
            child.kill()


def test_a_process_that_ends_takes_no_cpu_time_away() -> None:
    """The use of an ended process is gone from /proc. The tree's use is that of the other processes, not below 0."""
    with python(CHILD, BURN) as process:
        (child,) = psutil.Process(process.pid).children()
        tree = ProcessTree(process.pid)
        time.sleep(1)
        before = tree.sample(1)["tree_cpu_percent"]
        child.kill()
        assert process.wait() is not None
        after = tree.sample(1)
    assert before is not None
    assert before > 10
    assert after["tree_cpu_percent"] == 0
    assert tree.processes == set(), "nor does a process count that only waits to be noticed"


def test_a_process_that_comes_later_counts_from_when_it_is_seen() -> None:
    """Otherwise one sample of half a second would contain all that the process has used since it began."""
    with python(f"print('ready', flush=True); sys.stdin.readline(); {CHILD}", BURN) as process:
        tree = ProcessTree(process.pid)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(1.5)
        tree.next_look = 0.0
        first = tree.sample(1)
        share = busy_share(psutil.Process(process.pid).children()[0].pid, 1.0)
        second = tree.sample(1)
    assert first["tree_cpu_percent"] == pytest.approx(0, abs=3)
    assert second["tree_cpu_percent"] == pytest.approx(100 * share, abs=5)


def test_bytes_written_to_disk(tmp_path: Path) -> None:
    with python(WRITE, str(tmp_path / "file")) as process:
        tree = ProcessTree(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        cells = tree.sample(1)
    assert cells["tree_disk_write_bytes"] in (0, pytest.approx(64 * MB, rel=0.02)), "0 on a file system in memory"


@pytest.mark.parametrize(("said", "rank"), [("RANK=1", 1), ("ACCELERATE_MIXED_PRECISION=bf16", 0)])
def test_a_rank_is_the_training_and_no_helper_of_it(said: str, rank: int) -> None:
    """A launcher writes the rank into the environment of the training, and the helpers get the same environment."""
    launcher = f"import subprocess; subprocess.run(['env', {said!r}, sys.executable, '-c', *sys.argv[1:]])"
    with python(launcher, f"import sys; {CHILD}", f"import sys; {WAIT}") as process:
        (training,) = psutil.Process(process.pid).children()
        assert training.children() != []
        assert ProcessTree(process.pid).ranks == {rank: training}


def test_a_launcher_is_no_rank() -> None:
    with python(f"'accelerate'; {WAIT}") as launcher, python(WAIT) as training:
        assert ProcessTree(launcher.pid).ranks == {}
        assert ProcessTree(training.pid).ranks == {0: psutil.Process(training.pid)}


@pytest.mark.launches
def test_sampling_costs_little_and_says_how_much(tmp_path: Path) -> None:
    with python(BURN) as process, Monitor(process.pid, tmp_path / "samples.csv", 0.5) as monitor:
        time.sleep(5.2)
        native = monitor.thread.native_id
        spent = int(Path(f"/proc/self/task/{native}/schedstat").read_text().split()[0]) / 1e9
    rows = rows_of(tmp_path / "samples.csv")
    seconds = column(rows, "seconds")
    assert seconds == pytest.approx([0.5 * round(2 * when) for when in seconds], abs=0.2), "each in its turn"
    assert len(set(seconds)) == len(rows) > 3
    assert monitor.cost.samples == len(rows)
    assert monitor.cost.cpu_seconds == pytest.approx(spent, rel=0.2)
    assert monitor.cost.share_of_a_core == pytest.approx(monitor.cost.cpu_seconds / seconds[-1], rel=0.1)
    assert monitor.cost.share_of_a_core < 0.01


def test_the_file_is_whole_at_any_time_and_what_is_not_told_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "samples.csv"
    with python(BURN) as process, Monitor(process.pid, file, 0.1, num_ranks=2):
        time.sleep(0.65)
        rows = rows_of(file)
        assert file.read_text().endswith("\n")
    assert list(rows[0]) == columns(2, len(open_gpus()))
    assert len(rows) >= 4
    for row in rows:
        assert row["rank1_rss_bytes"] == row["rank1_cpu_percent"] == "", "there is no rank 1"
        assert 0 <= float(row["machine_cpu_percent"]) <= 100
        assert float(row["machine_used_bytes"]) > float(row["tree_rss_bytes"]) > 0


def test_a_file_that_takes_no_more_ends_the_sampling_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with python(BURN) as process, Monitor(process.pid, Path("/dev/full"), 0.1) as monitor:
        time.sleep(0.5)
        assert not monitor.thread.is_alive()
    assert capsys.readouterr().out.count("warning: /dev/full cannot be written") == 1
    assert monitor.cost == Sampling(0, 0.0, 0.0)


def test_by_itself_until_the_tree_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with python(f"print('ready', flush=True); held = b'x' * {HELD}; import time; time.sleep(2)") as process:
        main(["--pid", str(process.pid), "--interval", "0.1", "--out", str(tmp_path / "samples.csv")])
        assert process.poll() == 0
    rows = rows_of(tmp_path / "samples.csv")
    assert f"{len(rows)} samples in " in capsys.readouterr().out
    assert len(rows) > 3
    assert min(column(rows, "tree_rss_bytes")) > 4 * MB


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pid", "99999999"], "there is no such process"),
        (["--pid", "-1"], "there is no such process"),
        (["--pid", str(os.getpid()), "--interval", "nan"], "has to be 0.05 to 60 seconds"),
        (["--pid", str(os.getpid()), "--out", "/dev/null/file"], "cannot be written"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


class NoAnswer(Exception):
    """Stands in for the error of NVML."""


def no_answer(*args: object) -> None:
    raise NoAnswer


def driver(**changes: Callable[..., object]) -> SimpleNamespace:
    """Returns a stand-in for pynvml, with two GPUs whose numbers all differ."""
    known: dict[str, object] = {
        "NVMLError": NoAnswer,
        "NVML_PCIE_UTIL_TX_BYTES": 0,  # bytes that the GPU sends
        "NVML_PCIE_UTIL_RX_BYTES": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetName": lambda gpu: f"GPU {gpu}",
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=100 + gpu, free=1, total=1000 + gpu),
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=40 + gpu, memory=99),
        "nvmlDeviceGetPcieThroughput": lambda gpu, counter: (7, 500)[counter] * (gpu + 1),  # KB a second
    }
    return SimpleNamespace(**known | changes)


def test_gpus_are_shown_as_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", driver())
    gpus = open_gpus()
    assert gpu_names(gpus) == [{"name": "GPU 0", "memory_bytes": 1000}, {"name": "GPU 1", "memory_bytes": 1001}]
    assert sample_gpus(gpus) == {
        "gpu0_utilisation_percent": 40,
        "gpu0_memory_bytes": 100,
        "gpu0_host_to_device_bytes_per_second": 500_000,
        "gpu0_device_to_host_bytes_per_second": 7_000,
        "gpu1_utilisation_percent": 41,
        "gpu1_memory_bytes": 101,
        "gpu1_host_to_device_bytes_per_second": 1_000_000,
        "gpu1_device_to_host_bytes_per_second": 14_000,
    }


def test_a_question_that_a_gpu_does_not_answer_is_an_empty_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nvml, "pynvml", driver(nvmlDeviceGetPcieThroughput=no_answer))
    with python(BURN) as process, Monitor(process.pid, tmp_path / "samples.csv", 0.1):
        time.sleep(0.35)
    for row in rows_of(tmp_path / "samples.csv"):
        assert (row["gpu1_memory_bytes"], row["gpu1_utilisation_percent"]) == ("101", "41")
        assert row["gpu0_host_to_device_bytes_per_second"] == row["gpu1_device_to_host_bytes_per_second"] == ""


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", driver(nvmlInit=no_answer))
    assert open_gpus() == []
    assert gpu_columns(0) == []
    assert sample_gpus([]) == {}
