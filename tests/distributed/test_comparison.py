"""Real comparisons: one that is killed and goes on, one that runs out of time, one that runs out of disk."""

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from eval.comparing.launch import MARK
from tests.distributed.launching import CONFIGS, DEBUG, ROOT, Run, last_step, start
from tests.distributed.test_disk import IN_NAMESPACE, needs_mount
from tests.warm import clean_environment

STAGES = [sys.executable, "-m", "eval.stages", *DEBUG]
Killed = tuple[Path, dict[str, dict[str, bytes]], Run]
WAITING = 300  # seconds; only so that a hang fails


def command(out: Path, *configs: Path) -> list[str]:
    return [*STAGES, "--out", str(out), "--accel", *map(str, configs), "--", "--tracker", "swanlab"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def processes_of(out: Path) -> list[psutil.Process]:
    """The processes that bear the mark of one of the comparison's configurations."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.environ().get(MARK, "/")).parent == out.resolve():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until_nobody_is_left(out: Path) -> None:
    deadline = time.monotonic() + WAITING
    while left := processes_of(out):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def refusing(folder: Path) -> Path:
    """An accelerate YAML whose DeepSpeed JSON the training refuses: the recipe owns the optimizer."""
    json_file = folder / "refused.json"
    json_file.write_text('{"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}')
    file = folder / "refused.yaml"
    file.write_text(
        f"deepspeed_config: {{deepspeed_config_file: {json_file}}}\ndistributed_type: DEEPSPEED\n"
        "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nnum_processes: 1\nuse_cpu: false\n"
    )
    return file


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A folder; what two configurations had left in it when the third one's training was killed; the command again."""
    folder = tmp_path_factory.mktemp("comparison")
    out = folder / "out"
    words = command(out, refusing(folder), CONFIGS / "one_process.yaml", CONFIGS / "zero3.yaml")
    log = folder / "output.txt"
    with log.open("wb") as said:
        process = subprocess.Popen(words, cwd=ROOT, env=clean_environment(), stdout=said, stderr=said)
        deadline = time.monotonic() + WAITING
        while last_step(out / "zero3" / "run") < 1:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "zero3" / "result.json").exists()
    (out / "zero3" / "of-the-killed-one").touch()
    wait_until_nobody_is_left(out)
    before = {name: contents(out / name) for name in ("refused", "one_process")}
    return out, before, start(words, out)


def result(out: Path, name: str) -> dict[str, object]:
    values: dict[str, object] = json.loads((out / name / "result.json").read_text())
    return values


def test_a_killed_comparison_goes_on(killed: Killed) -> None:
    out, before, run = killed
    assert run.code == 0, run.output
    first = {
        name: {file: text for file, text in contents(out / name).items() if "again" not in file} for name in before
    }
    assert first == before, "to the byte"
    assert "run 3 of 3: zero3" in run.output
    assert "\nrun 1 of 3" not in run.output
    assert "\nrun 2 of 3" not in run.output
    assert not (out / "zero3" / "of-the-killed-one").exists(), "half a run is begun anew"
    assert result(out, "zero3")["status"] == "finished"
    assert not (out / "zero3" / "training.json").exists()


def test_a_second_round_in_reverse_order_times_what_finished(killed: Killed) -> None:
    out, _, run = killed
    rounds = [line for line in run.output.splitlines() if line.endswith(" of training")]
    names = [line.partition(": ")[2].partition(":")[0] for line in rounds]
    assert names == ["zero3", "zero3", "one_process"]
    assert [line.startswith("second round, run ") for line in rounds] == [False, True, True]
    for name in ("one_process", "zero3"):
        assert {path.name for path in (out / name / "again").iterdir()} == {
            *("log.txt", "result.json", "samples.csv", "usage.json")
        }
    assert not (out / "refused" / "again").exists()


def test_what_fails_is_recorded_and_the_rest_goes_on(killed: Killed) -> None:
    out, _, run = killed
    failed = result(out, "refused")
    assert failed["status"] == "failed"
    assert str(failed["reason"]).endswith("remove the block 'optimizer'; optim in the recipe owns it.")
    assert not (out / "refused" / "run").exists()
    assert "2 of 3 runs finished, 1 failed" in run.output


def test_each_run_is_as_the_loops_own(killed: Killed) -> None:
    """On the same effective batch: 2 rows, 4 accumulated by one process, 2 by each of two."""
    out, _, _ = killed
    losses = []
    for name, processes in (("one_process", 1), ("zero3", 2)):
        run = Run(out / name / "run", 0, "")
        assert result(out, name) | {"num_processes": processes, "grad_accum_steps": 4 // processes} == result(out, name)
        losses.append(run.series("train/loss"))
        assert len(load_file(run.folder / "adapter" / "adapter_model.safetensors")) == 56
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=0.01), "bf16, and weights kept in another precision"


def test_the_base_model_is_asked_once(killed: Killed) -> None:
    out, _, _ = killed
    asked = [
        list(json.loads((out / name / "run" / "eval.json").read_text())["scores"]) for name in ("one_process", "zero3")
    ]
    assert asked == [["base", "tuned"], ["tuned"]]


def test_samples_of_the_whole_run_and_of_each_rank(killed: Killed) -> None:
    out, _, _ = killed
    with (out / "zero3" / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = result(out, "zero3")
    sampling, wall_seconds = known["sampling"], known["wall_seconds"]
    assert isinstance(sampling, dict)
    assert isinstance(wall_seconds, float)
    assert sampling["samples"] == len(rows) > 10
    assert 0 < sampling["share_of_a_core"] < 0.01
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds[0] == pytest.approx(0.5, abs=0.4)
    assert seconds[-1] == pytest.approx(wall_seconds, abs=2)
    together = [row for row in rows if row["rank0_rss_bytes"] and row["rank1_rss_bytes"]]
    assert len(together) > 5
    for row in together:
        ranks = float(row["rank0_rss_bytes"]) + float(row["rank1_rss_bytes"])
        assert float(row["tree_rss_bytes"]) > ranks, "the launcher counts as well"
    assert max(float(row["rank1_rss_bytes"]) for row in together) > 2e8, "torch alone has more"
    assert max(float(row["tree_cpu_percent"]) for row in rows) > 20


def test_each_is_a_swanlab_run_of_one_group(killed: Killed) -> None:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record  # type: ignore[import-untyped]
    from swanlab.sdk.internal.core_python.store import DataStoreReader  # type: ignore[import-untyped]

    out, _, _ = killed
    for name in ("refused", "one_process", "zero3"):
        (file,) = (out / name / "swanlog").glob("run-*/run-*.swanlab")
        reader = DataStoreReader()
        reader.open(file)
        records = [Record.FromString(data) for data in reader]
        (begun,) = [record.start for record in records if record.WhichOneof("record_type") == "start"]
        assert (begun.project, begun.group, begun.name) == ("plainloop", "out", name)
        scalars = [record.scalar for record in records if record.WhichOneof("record_type") == "scalar"]
        logged = [(s.step, s.value.number) for s in scalars if s.key == "train/loss"]
        losses = Run(out / name / "run", 0, "").series("train/loss") if name != "refused" else []
        assert logged == list(enumerate(losses, start=1))
        with (out / name / "samples.csv").open(newline="") as rows:
            sampled = [float(row["tree_rss_bytes"]) for row in csv.DictReader(rows)]
        assert [s.value.number for s in scalars if s.key == "hardware/tree_rss_bytes"] == sampled
        assert not [s for s in scalars if "gpu" in s.key and not Path("/dev/nvidia0").exists()], (
            "not measured: left out"
        )


def test_a_complete_comparison_only_writes_its_report(killed: Killed) -> None:
    out, _, _ = killed
    kept = [out / "comparison.json", *(path for path in out.glob("*/*") if path.parent.name != "charts")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    begun = time.time()
    words = command(out, out.parent / "refused.yaml", CONFIGS / "one_process.yaml", CONFIGS / "zero3.yaml")
    run = start(words, out)
    assert run.code == 0, run.output
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert (out / "report.md").stat().st_mtime > begun
    assert set(json.loads((out / "summary.json").read_text())["runs"]) == {"refused", "one_process", "zero3"}
    assert "run 1 of 3" not in run.output


def test_an_evaluation_that_was_interrupted_is_all_that_is_done_again(killed: Killed, tmp_path: Path) -> None:
    """And one that fails is a failure of its configuration, with its reason."""
    out = tmp_path / "out"
    shutil.copytree(killed[0], out)
    done = out / "one_process" / "result.json"
    done.rename(out / "one_process" / "training.json")
    before = contents(out / "one_process")
    adapter = out / "one_process" / "run" / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(b"torn")
    words = command(out, CONFIGS / "one_process.yaml", CONFIGS / "zero3.yaml")
    run = start(words, out)
    assert run.code == 0, run.output
    assert result(out, "one_process")["status"] == "failed"
    assert str(result(out, "one_process")["reason"]).startswith(f"evaluation: {adapter}: cannot be read")
    adapter.write_bytes(whole)
    run = start([*words[:-3], "--retry", *words[-3:]], out)
    assert run.code == 0, run.output
    assert result(out, "one_process")["status"] == "finished"
    after = contents(out / "one_process")
    of_evaluation = ("run/eval.json", "run/answers.jsonl", "run/report", "run/summary", "run/charts")  # begins of names
    training = [name for name in before if name.startswith("run/") and not name.startswith(of_evaluation)]
    assert "run/adapter/adapter_model.safetensors" in training
    assert {name: after[name] for name in training} == {name: before[name] for name in training}
    assert after["samples.csv"] == before["samples.csv"]
    assert b"adapter: " in after["log.txt"]
    assert list(json.loads(after["run/eval.json"])["scores"]) == ["base", "tuned"], (
        "nobody else has asked the base model"
    )
    assert json.loads(after["result.json"])["wall_seconds"] == json.loads(before["training.json"])["wall_seconds"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_time_out_is_recorded_and_a_signal_stops_all(number: int, tmp_path: Path) -> None:
    """The first runs out of its three seconds, before it has loaded anything; the second is stopped."""
    out = tmp_path / "out"
    words = [*STAGES, "--out", str(out), "--accel", str(CONFIGS / "zero2.yaml"), str(CONFIGS / "zero3.yaml")]
    log = tmp_path / "output.txt"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*words, "--timeout", "3"], cwd=ROOT, env=clean_environment(), stdout=said, stderr=said
        )
        deadline = time.monotonic() + WAITING
        while not (out / "zero3" / "log.txt").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(timeout=WAITING) == 128 + number, log.read_text()
    assert processes_of(out) == []
    assert result(out, "zero2") | {"status": "timed out", "reason": "time-out after 3 s"} == result(out, "zero2")
    assert not (out / "zero3" / "result.json").exists()
    assert "stopped: 1 of 2 runs are done and stay; the same command does the rest" in log.read_text()
    assert "Traceback" not in log.read_text()


@needs_mount
@pytest.mark.parametrize("room", [600, 0])
def test_a_full_disk_loses_no_finished_run(room: int, killed: Killed, tmp_path: Path) -> None:
    """There is room for all that has been done and for half a checkpoint of 1.1 MB, or for nothing at all."""
    out, _, _ = killed
    disk, left_behind = tmp_path / "disk", tmp_path / "left behind"
    disk.mkdir()
    words = command(disk / "out", out.parent / "refused.yaml", CONFIGS / "one_process.yaml", CONFIGS / "zero3.yaml")
    script = f"""
mount -t tmpfs -o size=100m none {shlex.quote(str(disk))}
cp -a {shlex.quote(str(out))} {shlex.quote(str(disk))}/out
rm -r {shlex.quote(str(disk))}/out/zero3
used=$(du -sk {shlex.quote(str(disk))} | cut -f1)
mount -o remount,size=$((used + {room}))k {shlex.quote(str(disk))}
{shlex.join(words)}
code=$?
cp -a {shlex.quote(str(disk))}/out {shlex.quote(str(left_behind))}
exit $code
"""
    run = start([*IN_NAMESPACE, script], left_behind)
    for name in ("refused", "one_process"):
        assert contents(left_behind / name) == contents(out / name)
    assert "No space left on device" in run.output
    assert "Traceback" not in run.output
    if room:
        assert run.code == 0, run.output
        assert result(left_behind, "zero3")["status"] == "failed"
    else:
        assert run.code == 1
        assert run.output.count("error: ") == 1
        assert "Runs that are done stay" in run.output
        assert not (left_behind / "zero3").exists()
    assert json.loads((left_behind / "comparison.json").read_text())["recipe"] == "debug"
