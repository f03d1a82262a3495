"""What a tracker that fails costs a run: `python -m tests.tracker_faults` (two minutes).

Trains the debug recipe in one process with SwanLab in trouble, and counts the seconds that the run waited for its
tracker: at the start, at each log and at the end.
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.launching import DEBUG, ROOT, Run, start
from tests.guarantees import write_section

WORKER = ROOT / "tests" / "distributed" / "tracker_worker.py"
FAULTS = {  # what is said of it, and how often
    "none: no tracker": 0,
    "none: SwanLab offline": 0,
    "its folder cannot be written": 1,
    "an exception in every log": 1,
    "online with a key, and the network refuses": 1,
    "online with a key, and the network never answers": 1,
}


@contextmanager
def proxy(refuses: bool) -> Iterator[dict[str, str]]:
    """Environment with a key, in which all of the network is one address: refusing, or silent for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if refuses:
            server.close()
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        key = {"SWANLAB_MODE": "online", "SWANLAB_API_KEY": "0123456789abcdefghijk"}
        yield dict.fromkeys(names, address) | {"NO_PROXY": "", "no_proxy": ""} | key


def run_with(fault: str, folder: Path) -> Run:
    run_dir = folder / "run"
    tracker = "null" if fault == "none: no tracker" else "swanlab"
    command = [sys.executable, str(WORKER), *DEBUG, "--tracker", tracker, "--run_dir", str(run_dir)]
    if fault == "its folder cannot be written":
        run_dir.mkdir()
        (run_dir / "recipe.yaml").touch()  # as after a run that was killed before its first checkpoint
        (run_dir / "swanlog").touch()
        return start([*command, "--resume", "auto"], run_dir)
    if fault.startswith("online"):
        with proxy(refuses="refuses" in fault) as env:
            return start(command, run_dir, env)
    return start(command, run_dir, {"BREAK_TRACKER": "1"} if "exception" in fault else None)


def seconds_waited(run: Run) -> float:
    return float(json.loads((run.folder / "tracker.json").read_text())["seconds"])


def what_is_wrong(fault: str, run: Run) -> str | None:
    """None where the run came to its end as without a tracker, and said of it what FAULTS says."""
    if run.code or len(run.metrics) != 4 or not (run.folder / "adapter" / "adapter_model.safetensors").is_file():
        return f"the run did not end well:\n{run.output}"
    said = run.output.count("warning: the tracker")
    return None if said == FAULTS[fault] else f"{said} warnings:\n{run.output}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tracker_faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds: int = parser.parse_args().rounds
    waited: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    for _ in range(rounds):
        for fault in FAULTS:
            with tempfile.TemporaryDirectory() as folder:
                run = run_with(fault, Path(folder))
                if wrong := what_is_wrong(fault, run):
                    sys.exit(f"{fault}: {wrong}")
                waited[fault].append(seconds_waited(run))
                print(f"{fault}: {waited[fault][-1]:.2f} s", flush=True)
    rows = [f"| {fault} | {statistics.median(all_of_it):.2f} |" for fault, all_of_it in waited.items()]
    text = (
        "Seconds that a whole run of the debug recipe waited for its tracker, at the start, at each log and at the end "
        f"(median of {rounds}). Every run came to its end; each fault was mentioned once.\n\n"
        "| fault | seconds |\n|---|---|\n"
    )
    write_section("Tracker faults", "python -m tests.tracker_faults", text + "\n".join(rows))


if __name__ == "__main__":
    main()
