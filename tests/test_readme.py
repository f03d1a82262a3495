"""What README and docs/ show of the code is the code, and what they link to is there."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from loop.recipe import parse_recipe, recipe_as_dict
from tests.distributed.launching import ROOT

README = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # to a file of this project


def test_the_step_in_readme_is_the_step() -> None:
    shown = re.search(r"<!-- step -->\n```python\n(.*?)```\n<!-- /step -->", README.read_text(), re.DOTALL)
    assert shown is not None
    source = (ROOT / "loop" / "step.py").read_text()
    start, end = source.index("    for micro_batch in window.micro_batches:"), source.index("    return StepResult(")
    assert shown[1] == textwrap.dedent(source[start:end])


def test_the_breakpoint_in_readme_is_where_backward_begins() -> None:
    lines = (ROOT / "loop" / "step.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if 'measured("backward")' in text)
    assert f"break step.py:{line}'" in README.read_text()


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


# What README promises, by the beginning of each sentence or line of a table, and the test that holds it to that.
PROMISES = {
    "Its training loop fits on one screen": "test_readme.py::test_the_loop_fits_on_one_screen",
    "The same commands run the real DeepSpeed engine": "distributed/test_launch_files.py::test_launches",
    "A separate evaluation asks the model before and after": "distributed/test_reference_task.py::test_learns_the_task",
    "Both set up `.venv` first": "test_readme.py::test_commands_of_make_are_there",
    "While you work, run `make check`": "test_readme.py::test_commands_of_make_are_there",
    "`make test-slow` runs what `make test` leaves out": "test_readme.py::test_commands_of_make_are_there",
    "You need no GPU and no model hub": "distributed/test_privacy.py::test_nobody_outside_is_called",
    "The user says `1802=`": "test_check.py::test_answers_by_hand",
    "It trains on the numbers": "test_sums.py::test_every_number_once_and_every_sum_right",
    "It lifted the accuracy": "distributed/test_reference_task.py::test_learns_the_task",
    "The base model answers": "test_tiny_base.py::test_base_refuses_the_task_and_can_split_in_words",
    "This is a step of the optimizer": "test_readme.py::test_the_step_in_readme_is_the_step",
    "The loss is the mean over the label tokens": "distributed/test_stages.py::test_is_the_reference",
    "The labels are what the model's chat template makes": "test_template.py::test_each_answer_stands_where_a_server",
    "Under DeepSpeed one call of the engine clips": "distributed/test_stages.py::test_is_the_reference",
    "| `zero0` `zero1` `zero2` `zero3` |": "distributed/test_stages.py::test_is_the_reference",
    "| `zero2_offload` `zero3_offload` |": "distributed/test_stages.py::test_is_the_reference",
    "| `reference/stage0` `stage1`": "distributed/test_launch_files.py::test_launches",
    "| `nvme/zero3` |": "distributed/test_nvme.py::test_",
    "| `two_machines` |": "distributed/test_launchers.py::test_two_machines_train_as_two_processes_of_one",
    "| `one_process` |": "distributed/test_comparison.py::test_each_run_is_as_the_loops_own",
    "All but the last launch two processes": "test_readme.py::test_every_accelerate_file_is_shown_and_launches_two",
    "Files that `accelerate config` writes work too": "test_launch_settings.py::test_what_would_not_be_done_is_refused",
    "The accelerate file owns": "test_deepspeed_config.py::test_",
    "The recipe owns every number": "test_readme.py::test_help_lists_every_key",
    "A step learns `rows_per_step` rows": "test_batch_arithmetic.py::test_the_reference_learns_32_rows_a_step_on_any",
    "Before you launch, `python -m loop.plan": "test_plan.py::test_recommends_stage_3_without_offload",
    "On two machines, give these commands": "distributed/test_launchers.py::test_two_machines_train_as_two_processes",
    "Any instruct model with a chat template": "test_files.py::test_every_kind_of_file_has_the_same_rows",
    "| chat messages |": "test_formats.py::test_a_row_is_the_conversation",
    "| ShareGPT |": "test_formats.py::test_a_row_is_the_conversation",
    "| alpaca |": "test_formats.py::test_a_row_is_the_conversation",
    "| prompt and completion |": "test_formats.py::test_a_row_is_the_conversation",
    "| text |": "test_tokens.py::test_a_plain_text_is_all_labels",
    "Look at the rows as the model gets them": "distributed/test_user_path.py::test_the_commands_of_readme",
    "Other judges compare the last number": "test_judges.py::test_answers_by_hand",
    "The evaluation says whether": "test_eval_run.py::test_what_an_evaluation_says",
    "To the same prompt the chat gives": "test_chat_command.py::test_a_streamed_answer_is_that_of_the_evaluation",
    "`loop.export` merges the adapter": "test_export.py::test_",
    "Before it says done": "test_export.py::test_",
    "A merge that loses the adapter": "test_export.py::test_",
    "`--adapter` exports": "test_export.py::test_",
    "Of these, `transformers serve` was run here": "test_serve_check.py::test_",
    "![The first screen": "test_page_browser.py::test_the_first_screen_has_the_three_answers",
    "`python -m eval.report RUN_FOLDER` draws": "test_page_browser.py::test_the_first_screen_has_the_three_answers",
    "`python -m eval.report A B` puts": "test_report.py::test_several_runs_share_a_page",
    "`python -m eval.report RUN_FOLDER --watch` shows": "test_following.py::test_the_server_answers_this_machine_only",
    "`--max_steps 200` ends": "distributed/test_moments.py::test_max_steps_in_the_middle_of_an_epoch",
    "`--patience 3` ends": "distributed/test_moments.py::test_patience_ends_a_run",
    "With `--choose_by val/loss`": "test_eval_run.py::test_the_checkpoint_that_is_best_by_the_judge",
    "Nothing is cut off": "test_load.py::test_rows_that_are_too_long",
    "A run writes into `runs/<recipe>-<time>/`": "distributed/test_launch_files.py::test_launches",
    "| `metrics.jsonl` |": "test_tracking.py::test_lines_are_on_disk_at_once",
    "| `adapter/` |": "distributed/test_stages.py::test_adapter_is_whole_and_base_untouched",
    "| `checkpoints/step-…/` |": "distributed/test_resume.py::test_to_the_bit",
    "| `recipe.yaml` `inputs.json`": "distributed/test_launch_files.py::test_launches",
    "| `eval.json` `answers.jsonl` `report.html` |": "test_eval_run.py::test_the_report_shows_the_new_evaluation",
    "The folder may be moved": "distributed/test_moved_runs.py::test_a_moved_run_is_evaluated_from_another_folder",
    "To train longer, resume": "distributed/test_resume.py::test_training_longer",
    "The tracker is SwanLab": "test_tracking.py::test_swanlab_runs_offline_without_account_or_terminal",
    "Without a launcher the same loop runs": "distributed/test_debugging.py::test_plain_python_runs_the_same_engine",
    "You do not have to configure anything": "distributed/test_debugging.py::test_plain_python_runs_the_same_engine",
    "`debug.yaml` goes through every phase": "distributed/test_debugging.py::test_plain_python_runs_the_same_engine",
    "This stops after the forward pass": "distributed/test_debugging.py::test_pdb_stops_inside_the_step",
    "Try `p loss`": "distributed/test_debugging.py::test_pdb_stops_inside_the_step",
    "In VS Code, F5 starts": "test_readme.py::test_vs_code_starts_what_readme_says",
    "To stop at another stage, launch one process": "distributed/test_warm.py::test_",
    "| [docs/": "test_readme.py::test_links_lead_to_files",
}
# What only describes, or was measured: a benchmark, or the closing measurement of a release, says how.
DESCRIBES = (
    "The others were not run",
    "plainloop fine-tunes language models",
    "It also builds DeepSpeed's C++ extensions",
    "You need Linux, CPython",
    "The task comes from a published",
    "`make demo` takes",
    "[loop/train.py](loop/train.py) is the table of contents",
    "A `breakpoint()` anywhere",
    "| accel_configs/",
    "| format | a row |",
    "`mine.yaml` is a copy",
    "`make real-model` goes this way",
    "A step of our default was",
    "Licence: Apache 2.0",
)


def sentences(page: str) -> list[str]:
    """The sentences of a page and the lines of its tables, without its code and its headings."""
    page = re.sub(r"```.*?```|<!--.*?-->", "", page, flags=re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n", page):
        if block.lstrip().startswith("|"):
            found += [line for line in block.splitlines() if not re.fullmatch(r"[|\- ]*", line)]
        elif block.strip() and not block.startswith("#"):
            found += re.split(r"(?<=[.!?]) (?=[A-Z`\[])", " ".join(block.split()))
    return found


def test_every_promise_of_readme_has_a_test() -> None:
    told = sentences(README.read_text())
    known = (*PROMISES, *DESCRIBES)
    assert [sentence for sentence in told if not sentence.startswith(known)] == [], "add the test, or leave it out"
    assert [start for start in known if not any(sentence.startswith(start) for sentence in told)] == [], "is gone"


@pytest.mark.parametrize("promise", PROMISES)
def test_the_test_of_a_promise_is_there(promise: str) -> None:
    file, _, name = PROMISES[promise].partition("::")
    assert f"\ndef {name}" in (ROOT / "tests" / file).read_text()


def test_the_loop_fits_on_one_screen() -> None:
    source = (ROOT / "loop" / "train.py").read_text()
    for function, lines in (("main", 40), ("fit", 40)):
        body = re.search(rf"^def {function}\(.*?(?=^\S)", source, re.DOTALL | re.MULTILINE)
        assert body is not None
        assert len(body[0].rstrip().splitlines()) < lines, function


def test_commands_of_make_are_there() -> None:
    makefile, page = (ROOT / "Makefile").read_text(), README.read_text()
    named = set(re.findall(r"make ([a-z-]+)", page))
    assert {"demo", "test", "setup", "check", "test-slow"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for target in named - {"setup"}:
        needs = re.search(rf"^{target}: (\w+)", makefile, re.MULTILINE)
        assert needs is not None
        assert needs[1] in ("setup", "lint"), "which needs setup"


def test_every_accelerate_file_is_shown_and_launches_two() -> None:
    page = README.read_text()
    for path in (ROOT / "accel_configs").glob("**/*.yaml"):
        assert f"`{path.stem}`" in page or f"/{path.stem}`" in page, path.stem
        assert yaml.safe_load(path.read_text())["num_processes"] == (1 if path.stem == "one_process" else 2)


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_recipe(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    keys = [key for key, _ in leaves(recipe_as_dict(parse_recipe([])[1]))]
    assert len(keys) > 30
    assert [key for key in keys if f"--{key}" not in said] == []


def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def test_vs_code_starts_what_readme_says() -> None:
    (first, second) = json.loads((ROOT / ".vscode" / "launch.json").read_text())["configurations"]
    for each in (first, second):
        assert f"*{each['name']}*" in README.read_text()
    assert first["program"] == "${workspaceFolder}/loop/train.py"
    assert (second["request"], second["processId"]) == ("attach", "${command:pickProcess}")
