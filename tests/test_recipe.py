from pathlib import Path

import pytest
import yaml

from data.errors import UserError
from data.sums import SYSTEM_PROMPT
from eval.judging import judges
from loop.recipe import (
    DEFAULT_RECIPE,
    JUDGES,
    ROOT,
    RUN_OPTIONS,
    check_examination,
    find_model,
    find_path,
    parse_recipe,
    recipe_as_dict,
)

RECIPES = ROOT / "loop" / "recipes"


def test_without_arguments_it_is_tiny() -> None:
    name, recipe = parse_recipe([])
    assert name == "tiny"
    assert recipe == parse_recipe(["--config", str(DEFAULT_RECIPE)])[1]


def test_14b_is_the_reference_number_for_number() -> None:
    name, recipe = parse_recipe(["--config", str(RECIPES / "qwen2.5-14b.yaml")])
    assert name == "qwen2.5-14b"
    assert recipe.model.name_or_path == "Qwen/Qwen2.5-14B-Instruct"
    assert recipe.data.system_prompt == SYSTEM_PROMPT
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 64, 0.01)
    attention, mlp = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    assert list(recipe.lora.target_modules) == attention + mlp
    assert (recipe.epochs, recipe.seed, recipe.micro_batch_size, recipe.rows_per_step) == (1, 42, 16, 32)
    assert (recipe.optim.lr, recipe.optim.warmup_ratio, recipe.optim.weight_decay) == (1e-4, 0.03, 0.1)
    assert recipe.gradient_checkpointing == "auto"
    assert (recipe.log_every, recipe.eval_every, recipe.save_total_limit) == (5, 0, 3)
    assert recipe.data.max_length == 51


def test_tiny_differs_from_14b_only_where_it_says() -> None:
    tiny, big = (
        recipe_as_dict(parse_recipe(["--config", str(RECIPES / f)])[1]) for f in ("tiny.yaml", "qwen2.5-14b.yaml")
    )
    assert {key for key in tiny if tiny[key] != big[key]} == {"model", "optim", "epochs"}
    assert {key for key in tiny["optim"] if tiny["optim"][key] != big["optim"][key]} == {"lr"}


def test_command_line_wins_over_the_file() -> None:
    assert parse_recipe(["--optim.lr", "3e-5"])[1].optim.lr == 3e-5
    assert parse_recipe(["--lora.target_modules", "[q_proj, v_proj]"])[1].lora.target_modules == ("q_proj", "v_proj")


def test_written_recipe_reads_back(tmp_path: Path) -> None:
    recipe = parse_recipe(["--run_dir", "runs/x", "--optim.betas", "[0.8, 0.9]"])[1]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_as_dict(recipe), allow_unicode=True))
    assert parse_recipe(["--config", str(path)])[1] == recipe


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optim.learning_rate", "1"], "optim.learning_rate"),
        (["--epochs", "two"], "epochs"),
        (["--epochs", "1.5"], "epochs"),
        (["--epochs", "0"], "epochs is 0, but has to be 1 to a million"),
        (["--max_steps", "0"], "max_steps is 0, but has to be 1 to a million, or null"),
        (["--max_steps", "-5"], "max_steps is -5"),
        (["--max_steps", "2.5"], "max_steps"),
        (["--max_steps", "1000001"], "max_steps is 1000001"),
        (["--patience", "0"], "patience is 0, but has to be 1 to a million, or null"),
        (["--patience", "long"], "patience"),
        (["--patience", "3", "--data.validation_file", "null"], "patience is 3, but has to be null where there are no"),
        (["--patience", "3", "--data.validation_file", "[]"], "patience is 3, but has to be null where there are no"),
        (["--choose_by", "best"], "choose_by"),
        (["--choose_by", "null"], "choose_by"),
        (["--choose_by", "val/loss", "--data.validation_file", "null"], "choose_by is val/loss, but has to be last"),
        (["--micro_batch_size", "-1"], "micro_batch_size is -1"),
        (["--grad_accum_steps", "0"], "grad_accum_steps is 0"),
        (["--rows_per_step", "0"], "rows_per_step is 0, but has to be 1 to a million, or null"),
        (["--optim.lr", "0"], "optim.lr is 0.0"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.lr", "inf"], "optim.lr"),
        (["--optim.warmup_ratio", "1"], "optim.warmup_ratio is 1"),
        (["--optim.max_grad_norm", "0"], "optim.max_grad_norm is 0"),
        (["--lora.dropout", "1"], "lora.dropout is 1"),
        (["--lora.rank", "0"], "lora.rank is 0"),
        (["--lora.target_modules", "[]"], "lora.target_modules"),
        (
            ["--eval.judge", "[sums, exactly]"],
            "eval.judge is ('sums', 'exactly'), but has to be of sums, exact, contains",
        ),
        (
            ["--choose_by", "judge", "--eval.judge", "[]"],
            "choose_by is judge, but has to be last where there is no eval",
        ),
        (["--eval.max_new_tokens", "0"], "eval.max_new_tokens is 0, but has to be at least 1, or null"),
        (["--gradient_checkpointing", "sometimes"], "gradient_checkpointing"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_values(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(arguments)
    assert said in str(error.value)


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(["--epochs", "0", "--lora.rank", "0"])
    assert "epochs" in str(error.value)
    assert "lora.rank" in str(error.value)


def test_recipe_file_with_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(DEFAULT_RECIPE.read_text() + "epoch: 3\n")
    with pytest.raises(UserError, match="epoch"):
        parse_recipe(["--config", str(path)])


def test_paths_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_path("data/math/math_eval_200.json") == ROOT / "data/math/math_eval_200.json"
    (tmp_path / "mine.json").touch()
    assert find_path("mine.json") == Path("mine.json")
    assert find_model("data/tiny_base") == str(ROOT / "data/tiny_base")
    assert find_model("Qwen/Qwen2.5-14B-Instruct") == "Qwen/Qwen2.5-14B-Instruct"
    for missing in ("./nothing", "/no/where", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder"):
            find_model(missing)


def test_what_the_evaluation_needs_is_there_before_the_training(tmp_path: Path) -> None:
    def check(*options: str) -> None:
        check_examination(parse_recipe(list(options))[1])

    check("--eval.judge", f"[exact, 'regex:a', {tmp_path}/mine.py:judge]", "--eval.judge", "[exact]")
    for options, said in (
        (("--eval.data", "nowhere.jsonl"), "eval.data: there is no file nowhere.jsonl"),
        (("--eval.judge", "[exact, mine.py:judge]"), "eval.judge: there is no file mine.py"),
    ):
        with pytest.raises(UserError, match=said):
            check(*options)
    (tmp_path / "mine.py").touch()
    check("--eval.judge", f"[exact, {tmp_path}/mine.py:judge]", "--eval.data", str(DEFAULT_RECIPE))
    check("--eval.data", "hub:name")


def test_the_names_of_the_judges() -> None:
    assert set(JUDGES) == set(judges.JUDGES)


def test_run_options_are_keys_of_the_recipe() -> None:
    """A key that was renamed would silently count as mathematics."""
    values = recipe_as_dict(parse_recipe([])[1])
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    keys = {*(values.keys() - sections.keys()), *(f"{name}.{key}" for name, inner in sections.items() for key in inner)}
    assert keys >= RUN_OPTIONS
    assert {"optim.lr", "lora.rank", "data.system_prompt", "seed", "epochs", "max_steps"} <= keys - RUN_OPTIONS
    assert {"patience", "choose_by"} <= RUN_OPTIONS, "until it ends, the run is the same"


def test_rows_that_are_held_out_are_enough_for_patience() -> None:
    held_out = ["--data.validation_file", "null", "--data.validation_share", "0.1"]
    assert parse_recipe([*held_out, "--patience", "3", "--choose_by", "val/loss"])[1].patience == 3
