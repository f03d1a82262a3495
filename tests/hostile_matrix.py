"""Runs every hostile case on one process and on two: `python -m tests.hostile_matrix` (some minutes).

Each has to end in one message that names it and exit code 2, on every rank, with nothing written.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, launch, start
from tests.guarantees import write_section
from tests.hostile import CASES, Case

WORKER = ROOT / "tests" / "distributed" / "hostile_worker.py"
Outcome = tuple[int, str]  # exit code, and what was said
Outcomes = dict[str, list[Outcome]]  # case -> each rank's, in the order of ranks


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def some_of_each_kind() -> dict[str, Case]:
    """The first six cases of every kind of input."""
    seen: Counter[str] = Counter()
    chosen = {}
    for name, case in CASES.items():
        kind = name.partition(": ")[0]
        seen[kind] += 1
        if seen[kind] <= 6:
            chosen[name] = case
    return chosen


def run_cases(processes: int, folder: Path, chosen: dict[str, Case] = CASES) -> Outcomes:
    """Runs the `chosen` cases in the same processes. What a case left behind counts as said by rank 0."""

    def run(script: Path, run_dir: Path, *arguments: str) -> None:
        if processes == 1:
            done = start([sys.executable, str(script), *arguments, "--run_dir", str(run_dir)], run_dir)
        else:
            done = launch(CONFIGS / "zero3.yaml", *arguments, folder=run_dir, script=script, processes=processes)
        assert done.code == 0, done.output

    run(ROOT / "loop" / "train.py", folder / "a real run", *DEBUG)
    cases, before = [], {}
    for number, (name, case) in enumerate(chosen.items()):
        own = folder / f"{number:03d}"
        own.mkdir()
        arguments = [*DEBUG, "--run_dir", str(own / "run"), *case.make(own)]
        cases.append([name, arguments, {key: value.format(folder=own) for key, value in case.env.items()}])
        before[name] = (own, contents(own))
    (folder / "cases.json").write_text(json.dumps(cases))
    here = contents(ROOT / "runs")
    run(WORKER, folder)
    ranks = [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(processes)]
    found: Outcomes = {name: [tuple(rank[name]) for rank in ranks] for name in chosen}
    for name, (own, held) in before.items():
        if contents(own) != held:
            code, said = found[name][0]
            found[name][0] = (code, f"{said}\nwrote {contents(own).items() ^ held.items()}")
    assert contents(ROOT / "runs") == here, "a case wrote into runs/"
    assert not (ROOT / "plainloop-was-here").exists(), "a pickle was loaded, or code from a model"
    return found


def what_is_wrong(case: Case, outcomes: list[Outcome]) -> str | None:
    """None where the case ended as it should."""
    (code, said), *others = outcomes
    message = f"\n{said}".rpartition("\nerror: ")[2]
    demands = {
        "exit code 2": code == 2,
        "the same exit code on all ranks": all(other == code for other, _ in others),
        "one message": f"\n{said}".count("\nerror: ") == 1,
        "that names what is wrong": case.said in message,
        "and is short": len(message) < 2000,
        "no traceback": "Traceback" not in said,
        "nothing written": "\nwrote " not in said,
    }
    missed = [demand for demand, met in demands.items() if not met]
    return f"{', '.join(missed)}: {outcomes}" if missed else None


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.hostile_matrix", description=__doc__).parse_args()
    bad: dict[str, str] = {}
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            for name, outcomes in run_cases(processes, Path(folder)).items():
                if wrong := what_is_wrong(CASES[name], outcomes):
                    bad[f"{name}, {processes} processes"] = wrong
                    print(name, processes, wrong)
    kinds = Counter(name.partition(": ")[0] for name in CASES)
    rows = [f"| {kind} | {count} |" for kind, count in kinds.items()]
    text = (
        f"{len(CASES)} cases ([the list](../tests/hostile.py)), each on one process and on two: "
        f"{2 * len(CASES) - len(bad)} of {2 * len(CASES)} ended in one message that names what is wrong and exit code "
        "2 of every rank, with nothing written, no pickle loaded and no hang.\n\n| input | cases |\n|---|---|\n"
    )
    write_section("Hostile input", "python -m tests.hostile_matrix", text + "\n".join(rows))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
