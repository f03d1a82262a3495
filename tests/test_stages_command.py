"""Tests what eval.stages plans, refuses and says; tests/distributed/test_comparison.py starts real runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from data.errors import UserError
from eval import stages
from eval.comparing.accel_files import DEFAULT_CONFIGURATIONS, read_configurations
from eval.comparing.comparison import Comparison, check_recipe, only_one, write_comparison, write_whole
from eval.comparing.configuration_run import is_done, training_command
from eval.comparing.launch import GUARD, MARK, end_processes, failure_reason, run_command
from eval.comparing.progress import Progress, last_step
from eval.peak import machine
from eval.run import parse as eval_parse
from loop.recipe import ROOT
from tests.sample_runs import CONFIGURATIONS

DEBUG = str(ROOT / "loop" / "recipes" / "debug.yaml")
ZERO3 = str(ROOT / "accel_configs" / "zero3.yaml")
ONE = str(ROOT / "accel_configs" / "one_process.yaml")


def planned(tmp_path: Path, *words: str) -> Comparison:
    return stages.parse(["--config", DEBUG, "--out", str(tmp_path / "out"), *words])[0]


def accel(tmp_path: Path, name: str, **changes: Any) -> str:
    """Writes an accelerate YAML that differs from zero3's in `changes`, and returns its path."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(Path(ZERO3).read_text()) | changes))
    return str(file)


def test_the_default_is_the_baseline_the_references_four_and_no_offload(tmp_path: Path) -> None:
    names = [configuration.name for configuration in planned(tmp_path).configurations]
    assert names == list(CONFIGURATIONS)
    assert len(names) == len(DEFAULT_CONFIGURATIONS)


def test_names_are_unique(tmp_path: Path) -> None:
    other = accel(tmp_path, "zero3")
    charts = accel(tmp_path, "charts")
    names = [configuration.name for configuration in read_configurations([ZERO3, other, ZERO3, charts])]
    assert names == ["zero3", "zero3-2", "zero3-3", "charts-2"], "charts is a folder of the report"


def test_all_learn_from_the_same_batch(tmp_path: Path) -> None:
    """A step has 24 rows: the largest number of processes, 6, times two micro-batches of two rows."""
    files = {n: accel(tmp_path, f"on{n}", num_processes=n) for n in (1, 2, 3, 4, 6)}
    comparison = planned(tmp_path, "--accel", *files.values())
    accumulated = {c.num_processes: comparison.grad_accum_steps(c) for c in comparison.configurations}
    assert accumulated == {1: 12, 2: 6, 3: 4, 4: 3, 6: 2}
    for configuration in comparison.configurations:
        command = training_command(comparison, configuration, tmp_path / "run")
        last = command[command.index("--grad_accum_steps") + 1] if "--grad_accum_steps" in command else "2"
        assert int(last) * configuration.num_processes * 2 == 24


def test_a_training_is_launched_as_a_user_would(tmp_path: Path) -> None:
    comparison = planned(tmp_path, "--accel", ZERO3, "--", "--epochs", "1")
    command = training_command(comparison, comparison.configurations[0], tmp_path / "run")
    assert command[1:4] == ["-m", "accelerate.commands.accelerate_cli", "launch"]
    assert command[4:8] == ["--config_file", ZERO3, "--main_process_port", "0"]
    assert command[8:] == [
        str(ROOT / "loop" / "train.py"),
        *("--config", DEBUG, "--epochs", "1"),
        *("--run_dir", str(tmp_path / "run"), "--tracker", "null"),
    ]


@pytest.mark.parametrize(("most", "steps"), [("3", 3), ("99", 4)])
def test_the_progress_counts_the_steps_up_to_max_steps(most: str, steps: int, tmp_path: Path) -> None:
    """The debug recipe: two epochs of seven rows, four a step."""
    assert check_recipe(planned(tmp_path, "--accel", ONE, "--", "--max_steps", most, "--rows_per_step", "4")) == steps


def without(tmp_path: Path, key: str) -> str:
    file = Path(accel(tmp_path, "less"))
    values = yaml.safe_load(file.read_text())
    values.pop(key)
    file.write_text(yaml.safe_dump(values))
    return str(file)


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "file.yaml").write_text(text)
    return str(tmp_path / "file.yaml")


def full(tmp_path: Path) -> str:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").touch()
    return str(tmp_path / "mine")


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no such YAML": (lambda tmp: ["--accel", "nowhere.yaml"], "--accel nowhere.yaml: cannot be read"),
    "no YAML": (lambda tmp: ["--accel", written(tmp, "a: [")], "file.yaml: cannot be read"),
    "a list": (lambda tmp: ["--accel", written(tmp, "[1]")], "is no accelerate YAML"),
    "no number": (lambda tmp: ["--accel", without(tmp, "num_processes")], "num_processes is None"),
    "no processes": (lambda tmp: ["--accel", accel(tmp, "x", num_processes=0)], "num_processes is 0"),
    "two machines": (lambda tmp: ["--accel", accel(tmp, "x", num_machines=2)], "num_machines is 2"),
    "no JSON": (
        lambda tmp: ["--accel", accel(tmp, "x", deepspeed_config={"deepspeed_config_file": "nowhere.json"})],
        "deepspeed_config_file nowhere.json cannot be read",
    ),
    "does not divide": (
        lambda tmp: ["--accel", accel(tmp, "x", num_processes=3), ZERO3, "--", "--grad_accum_steps", "1"],
        "2 processes cannot learn from the batch of 3",
    ),
    "no such recipe": (lambda tmp: ["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    "a recipe that does not parse": (lambda tmp: ["--config", written(tmp, "epochs: x")], "epochs"),
    "an unknown key": (lambda tmp: ["--", "--optim.momentum", "0.9"], "optim.momentum"),
    "a value out of range": (lambda tmp: ["--", "--epochs", "0"], "epochs is 0"),
    "a recipe among the overrides": (lambda tmp: ["--", f"--config={DEBUG}"], "--config stands after --"),
    "a folder of its own": (lambda tmp: ["--", "--run_dir", "x"], "run_dir is x"),
    "a run to go on with": (lambda tmp: ["--", "--resume", "auto"], "resume is auto"),
    "no data": (lambda tmp: ["--", "--data.train_file", "nowhere.json"], "nowhere.json: cannot be read"),
    "no model": (lambda tmp: ["--", "--model.name_or_path", "./nowhere"], "there is no folder ./nowhere"),
    "no interval": (lambda tmp: ["--interval", "0"], "--interval is 0"),
    "no time": (lambda tmp: ["--timeout", "nan"], "--timeout is nan"),
    "a folder of something else": (lambda tmp: ["--out", full(tmp)], "is no folder of a comparison"),
    "a file": (lambda tmp: ["--out", written(tmp, "")], "is no folder of a comparison"),
    "an option that there is not": (lambda tmp: ["--stages", "3"], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where runs/ would be
    words, said = BAD[case]
    arguments = words(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as leaving:
        stages.main(arguments if "--config" in arguments else ["--config", DEBUG, *arguments])
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert said in error
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the folder of a comparison of zero3 and one process."""
    monkeypatch.setattr("eval.comparing.comparison.matmul_peak", lambda: {"cpu": {"bf16": 2e11, "fp32": 1e11}})
    comparison = planned(tmp_path, "--accel", ZERO3, ONE)
    with only_one(comparison):
        write_comparison(comparison, machine())
    return comparison.out


def test_the_folder_says_what_is_compared(begun: Path) -> None:
    known = json.loads((begun / "comparison.json").read_text())
    assert known["recipe"] == "debug"
    assert known["config"] == DEBUG
    assert known["accel_configs"] == {"zero3": ZERO3, "one_process": ONE}
    assert known["matmul_peak_flops"] == {"cpu": 2e11}
    assert known["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert known["rows_per_step"] == 8


OTHERS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "an override": (
        lambda tmp: ["--accel", ZERO3, "--", "--optim.lr", "0.5"],
        "recipe.optim.lr: 0.0001 there, 0.5 now",
    ),
    "another file of that name": (
        lambda tmp: ["--accel", accel(tmp, "zero3", mixed_precision="no")],
        "zero3.mixed_precision: bf16 there, no now",
    ),
    "a batch of more processes": (
        lambda tmp: ["--accel", accel(tmp, "more", num_processes=4)],
        "rows_per_step: 8 there, 16 now",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_comparison_is_not_mixed_in(other: str, begun: Path, tmp_path: Path) -> None:
    words, said = OTHERS[other]
    with pytest.raises(UserError, match="holds a comparison of something else") as raised:
        planned(tmp_path, *words(tmp_path))
    assert said in str(raised.value)


def test_another_machine_is_not_mixed_in(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = json.loads((begun / "comparison.json").read_text())
    known["machine"]["cores"] = 999
    (begun / "comparison.json").write_text(json.dumps(known))
    with pytest.raises(SystemExit):
        stages.main(["--config", DEBUG, "--out", str(begun), "--accel", ZERO3])
    assert "cores: 999 there, " in capsys.readouterr().err


def test_more_configurations_extend_it_and_fewer_keep_the_batch(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.comparing.comparison.matmul_peak", lambda: pytest.fail("measured again"))
    alone = planned(tmp_path, "--accel", ONE)
    assert alone.grad_accum_steps(alone.configurations[0]) == 4, "as beside zero3's two processes"
    more = planned(tmp_path, "--accel", accel(tmp_path, "more"))
    write_comparison(more, machine())
    assert list(json.loads((begun / "comparison.json").read_text())["accel_configs"]) == [
        "zero3",
        "one_process",
        "more",
    ]


def test_one_command_at_a_time(begun: Path, tmp_path: Path) -> None:
    comparison = planned(tmp_path, "--accel", ZERO3)
    with only_one(comparison), pytest.raises(UserError, match="another comparison is at work"), only_one(comparison):
        pass


def test_a_failed_run_is_done_unless_it_is_to_be_tried_again(tmp_path: Path) -> None:
    assert not is_done(tmp_path, retry=False)
    write_whole(tmp_path / "result.json", {"status": "failed", "wall_seconds": 1.0})
    assert is_done(tmp_path, retry=False)
    assert not is_done(tmp_path, retry=True)
    write_whole(tmp_path / "result.json", {"status": "finished", "wall_seconds": 1.0})
    assert is_done(tmp_path, retry=True)
    (tmp_path / "result.json").write_text('{"status": ')
    with pytest.raises(UserError, match="Remove it"):
        is_done(tmp_path, retry=False)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.json", {("no", "key"): 2})  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


TABLE = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n  exitcode  : {} (pid: 7)\n"
REASONS = {
    "GPU memory": (
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n" + TABLE.format(1),
        1,
        "out of memory: [rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ),
    "host memory": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory\nerror: x\n",
        1,
        "out of memory: RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    ),
    "killed, and a rank says so": (
        "error: step 5: rank 1 (process 12) died. Go on with --resume.\n" + TABLE.format(-9),
        1,
        "killed (signal 9), as the kernel does when memory runs out",
    ),
    "killed without a word": (TABLE.format(-9), 1, "killed (signal 9), as the kernel does when memory runs out"),
    "one process killed": (
        "subprocess.CalledProcessError: Command '['python']' died with <Signals.SIGKILL: 9>.\n",
        1,
        "killed (signal 9), as the kernel does when memory runs out",
    ),
    "the launcher killed": ("", -9, "killed (signal 9), as the kernel does when memory runs out"),
    "frozen, so ended by another rank": (
        "error: step 5: rank 1 (process 12) has given no sign of life for 60 s and was killed.\n" + TABLE.format(-9),
        1,
        "step 5: rank 1 (process 12) has given no sign of life for 60 s and was killed.",
    ),
    "an error of ours": ("error: lr is 0\nerror: x.json: is empty\n" + TABLE.format(2), 1, "x.json: is empty"),
    "an exception": (
        "Traceback\n[rank1]: ValueError: no such stage\n" + TABLE.format(1),
        1,
        "ValueError: no such stage",
    ),
    "of a module": ("a.b.OddError: what\n", 1, "a.b.OddError: what"),
    "nothing": ("step 1/2\n", 7, "exit code 7"),
    "an error that stands in a line": ("no error: here\n", 7, "exit code 7"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_a_run_has_failed(case: str) -> None:
    said, code, reason = REASONS[case]
    assert failure_reason(said, code) == reason


def test_a_reason_is_one_line_of_bearable_length() -> None:
    assert len(failure_reason("ValueError: " + "x" * 10_000, 1)) <= 300


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(1000)
"""


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_time_out_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process ignores SIGTERM, and one has a session of its own, as the ranks of a launcher have."""
    monkeypatch.setattr(
        "eval.comparing.launch.GUARD", f"import eval.comparing.launch; eval.comparing.launch.GRACE = 0.5; {GUARD}"
    )
    pids: list[int] = []
    code = run_command([sys.executable, "-c", STUBBORN], tmp_path / "log", str(tmp_path), 2.0, pids.append)
    assert code is None
    child = int((tmp_path / "log").read_text())
    assert not alive(pids[0])
    assert not alive(child)


RUN_STUBBORN = """
import sys
from pathlib import Path
from eval.comparing.launch import GUARD, MARK, end_processes, failure_reason, run_command
run_command([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), sys.argv[2], 1000.0, lambda pid: None)
"""


@pytest.mark.launches
def test_so_does_the_death_of_the_comparison(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", RUN_STUBBORN, STUBBORN, str(log)])
    while not log.exists() or not log.read_text().strip():
        time.sleep(0.05)
    child = int(log.read_text())
    parent = psutil.Process(child).ppid()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while alive(child) or alive(parent):
        assert time.monotonic() < deadline, "a process stayed behind"
        time.sleep(0.1)


def test_a_process_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    """Also while its parent, this test, has not asked for it: the parent may be waiting for the end of the command."""
    mark = str(tmp_path / "stage")
    child = subprocess.Popen(["sleep", "600"], env=os.environ | {MARK: mark})
    code = "import sys; from eval.comparing import launch; launch.GRACE = 600.0; launch.end_processes(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, mark], cwd=ROOT, check=True, timeout=60)
    assert child.wait() == -signal.SIGTERM


def test_the_end_of_a_command_ends_no_other_of_its_configuration(tmp_path: Path) -> None:
    """The guard of a comparison that was killed may still be at work when the same command has begun anew."""
    other: list[subprocess.Popen[bytes]] = []

    def begin_another(pid: int) -> None:
        if not other:
            while not (mark := psutil.Process(pid).environ().get(MARK)):  # a moment after the start it has none
                time.sleep(0.01)
            environment = os.environ | {MARK: f"{mark.partition('#')[0]}#another"}
            other.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env=environment))

    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    assert run_command(command, tmp_path / "log", str(tmp_path), 60.0, begin_another) == 0
    assert other[0].poll() is None, "it is another command's"
    end_processes(str(tmp_path))
    assert not alive(other[0].pid), "and it is this configuration's"


def test_a_command_gets_nothing_of_another_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("MINE", "stays")
    code = "import os; print(sorted({'RANK', 'ACCELERATE_USE_DEEPSPEED', 'MINE'} & set(os.environ)))"
    assert run_command([sys.executable, "-c", code], tmp_path / "log", "x", 60.0, lambda pid: None) == 0
    assert (tmp_path / "log").read_text() == "['MINE']\n"


def test_the_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 10 is seen after 20 s, and each later step takes 1 s: 80 more steps are left, then four runs of 200 s."""
    clock = 0.0
    monkeypatch.setattr("eval.comparing.progress.time.monotonic", lambda: clock)
    metrics = tmp_path / "metrics.jsonl"
    progress = Progress(100, [150.0, 250.0])
    progress.begin("run 3 of 7: zero3", 4)
    progress.training(metrics)
    said = [capsys.readouterr().out]
    for step in (10, 20):
        clock = 20.0 + step - 10
        metrics.write_text(f'{{"step": {step}}}\n{{"st')
        progress.training(metrics)
        said.append(capsys.readouterr().out)
    assert said == [
        "run 3 of 7: zero3, starting, about 17 min left\n",
        "run 3 of 7: zero3, training, step 10/100, about 16 min left\n",
        "run 3 of 7: zero3, training, step 20/100, about 15 min left\n",
    ]
    first = Progress(100, [])
    first.begin("run 1 of 1: zero3", 0)
    first.training(tmp_path / "nowhere")
    assert capsys.readouterr().out == "run 1 of 1: zero3, starting, time left not known yet\n"


def test_a_recipe_alone_has_no_adapter_to_ask() -> None:
    with pytest.raises(UserError, match="--adapter-only goes with --run"):
        eval_parse(["--config", DEBUG, "--adapter-only"])


def test_only_whole_lines_of_metrics_count(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_step(file) == 0
    file.write_text('{"step": 1')
    assert last_step(file) == 0
    file.write_text("".join(json.dumps({"step": step, "x": "y" * 100}) + "\n" for step in range(1000)) + '{"step": 7')
    assert last_step(file) == 999


def test_the_recipes_rows_of_a_step_are_those_of_every_configuration(tmp_path: Path) -> None:
    """A step has 32 rows in micro-batches of 16, whatever the largest number of processes in the list is."""
    out = ["--out", str(tmp_path / "rows"), "--accel", accel(tmp_path, "on1", num_processes=1), ZERO3]
    comparison = stages.parse(out)[0]
    assert comparison.rows_per_step == 32
    assert [comparison.grad_accum_steps(each) for each in comparison.configurations] == [2, 1]
    with pytest.raises(UserError, match=r"x\.yaml: rows_per_step is 32, but micro_batch_size 16 x 3 processes = 48"):
        stages.parse([*out[:2], "--accel", accel(tmp_path, "x", num_processes=3)])
