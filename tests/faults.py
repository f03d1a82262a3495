"""The kill matrix: `python -m tests.faults --kills 100` (some minutes) writes its section of docs/guarantees.md.

Runs are killed by SIGKILL, one rank or all, at random times and in every phase of saving, and go on with
--resume auto, until they come to their end. Then their adapter has to be that of a run nobody killed, to the bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.launching import launch_command
from data.errors import UserError
from loop.saving.checkpoint import list_checkpoints, load_checkpoint
from tests.distributed.kill_worker import PHASES
from tests.distributed.launching import CONFIGS, DEBUG, ROOT, children, last_step
from tests.guarantees import write_section
from tests.warm import Started, clean_environment, popen

STAGES = ("zero3", "zero0", "zero2_offload")
SAVE_EVERY = 2
MOST_KILLS = 4  # of one run, which then comes to its end
RUN = (*DEBUG, "--epochs", "5", "--save_every", str(SAVE_EVERY), "--save_total_limit", "2", "--lora.dropout", "0.1")


@dataclass
class Figures:
    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)  # where
    whom: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    runs: int = 0  # that came to their end after being killed
    bit_equal: int = 0
    most_steps_lost: int = 0
    torn_checkpoints: int = 0  # visible under their name and not whole


def start(stage: str, folder: Path, kill: str | None, log: Path) -> Started:
    script = ROOT / "tests" / "distributed" / "kill_worker.py"
    command = [*launch_command(CONFIGS / f"{stage}.yaml"), str(script), *RUN]
    command += ["--run_dir", str(folder), "--resume", "auto"]
    env = clean_environment() | ({"KILL": kill} if kill else {})
    log.unlink(missing_ok=True)
    return popen(command, ROOT, env, log)


def kill_at_random(process: Started, folder: Path, whom: str, chance: random.Random) -> bool:
    """Waits for the loop to begin and a random while longer; False if the run was faster."""
    before = last_step(folder)
    while process.poll() is None and last_step(folder) <= before:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 2.5))
    ranks = children(process.pid)
    if process.poll() is not None or not ranks:
        return False
    for pid in ranks if whom == "all" else [chance.choice(ranks)]:
        os.kill(pid, signal.SIGKILL)
    return True


def one_launch(stage: str, folder: Path, figures: Figures, kill: bool, chance: random.Random, log: Path) -> bool:
    """True when the run has come to its end. Raises RuntimeError when it ended in any other way than by our kill."""
    whom = chance.choice(("one", "all"))
    phase = chance.choice(("random time", "random time", *PHASES)) if kill else "none"
    plan = f"{phase} {chance.randint(1, 4)} {whom}" if phase in PHASES else None
    process = start(stage, folder, plan, log)
    if phase == "random time":
        kill_at_random(process, folder, whom, chance)
    code = process.wait(timeout=300)
    if code == 0:
        return True
    output = log.read_text(errors="replace")
    if not kill or "-9" not in output:
        raise RuntimeError(f"{stage}, {phase}, {whom}: ended with {code}, not by our kill:\n{output[-4000:]}")
    figures.kills += 1
    figures.phases[phase] += 1
    figures.whom[whom] += 1
    whole = 0
    for checkpoint in list_checkpoints(folder):
        try:
            whole = load_checkpoint(checkpoint).step
        except UserError as error:
            figures.torn_checkpoints += 1
            print(f"torn: {error}")
    figures.most_steps_lost = max(figures.most_steps_lost, last_step(folder) - whole)
    return False


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def kill_matrix(kills: int, seed: int, folder: Path) -> Figures:
    chance = random.Random(seed)
    figures = Figures()
    expected: dict[str, bytes] = {}
    log = folder / "log.txt"
    while figures.kills < kills:
        stage = STAGES[figures.runs % len(STAGES)]
        if stage not in expected:
            one_launch(stage, folder / stage, figures, False, chance, log)
            expected[stage] = adapter(folder / stage)
        run = folder / f"{stage}-{figures.runs}"
        before = figures.kills
        launches = 1
        most = min(kills, before + MOST_KILLS)
        while not one_launch(stage, run, figures, figures.kills < most, chance, log):
            launches += 1
        figures.resumes += launches - 1
        if figures.kills == before:
            continue  # it was faster than every kill
        figures.runs += 1
        figures.bit_equal += adapter(run) == expected[stage]
        print(json.dumps(vars(figures)), flush=True)
    return figures


def section(figures: Figures) -> str:
    rows = {
        "kills": f"{figures.kills}: {figures.whom['one']} of one rank, {figures.whom['all']} of all",
        "where": ", ".join(f"{phase} {n}" for phase, n in sorted(figures.phases.items())),
        "resumes": figures.resumes,
        "runs that came to their end after being killed": figures.runs,
        "of them equal to the bit to a run nobody killed": figures.bit_equal,
        f"most steps lost by a kill (saved every {SAVE_EVERY})": figures.most_steps_lost,
        "checkpoints under their name that were not whole": figures.torn_checkpoints,
    }
    text = f"On two processes, with dropout, under {', '.join(STAGES)} in turn.\n\n| | |\n|---|---|\n"
    return text + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = kill_matrix(args.kills, args.seed, Path(folder))
    command = f"python -m tests.faults --kills {figures.kills} --seed {args.seed}"
    write_section("The kill matrix", command, section(figures))
    bad = figures.bit_equal != figures.runs or figures.torn_checkpoints or figures.most_steps_lost > SAVE_EVERY
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
