"""One poisoned row stops every rank, under every stage, before anything is kept."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, Run, launch

STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
DDP = ROOT / "tests" / "accel_configs" / "ddp_gpus.yaml"
INF_WORKER = ROOT / "tests" / "distributed" / "inf_worker.py"
ROWS = 16  # row 6 is poisoned


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model with NaN as the embedding of one character, and rows of which one has it."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny_base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_base")
    model.config.tie_word_embeddings = False  # or every row's logits would be poisoned
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    (token,) = tokenizer("@")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [f'{{"instruction": "{x}{"@" if x == 6 else ""}=", "output": "1"}}' for x in range(1, ROWS + 1)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "model", folder / "rows.jsonl"


@pytest.mark.parametrize(
    ("config", "precision"),
    [*((CONFIGS / f"{stage}.yaml", "bf16") for stage in STAGES), (CONFIGS / "zero1.yaml", "no"), (DDP, "bf16")]
    + [(CONFIGS / f"{stage}.yaml", "no") for stage in ("zero0", "zero3")],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_stops_every_rank(config: Path, precision: str, poisoned: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = poisoned
    run = launch(
        config,
        *DEBUG,
        *("--model.name_or_path", str(model), "--data.train_file", str(rows), "--data.validation_file", "null"),
        folder=tmp_path / "run",
        precision=precision,
    )
    stops_at_row_6(run, "the loss is not finite in")


def stops_at_row_6(run: Run, said: str) -> None:
    # two ranks x two micro-batches of two rows: the step whose eight rows, in the order of epoch 0, have row 6 in them
    order = (np.random.default_rng((42, 0)).permutation(ROWS) + 1).tolist()
    step = order.index(6) // 8
    assert run.code != 0
    assert run.output.count("error: ") == 1, run.output
    where = re.search(
        rf"error: step {step + 1}: {said} the micro-batch of rows (\d+), (\d+) on rank [01]\.", run.output
    )
    assert where, run.output
    assert 6 in (pair := {int(where[1]), int(where[2])})
    assert pair < set(order[8 * step : 8 * step + 8])
    assert "Traceback" not in run.output.split("error: ")[0]
    assert [line["step"] for line in run.metrics] == list(range(1, step + 1))
    assert {path.name for path in run.folder.iterdir()} & {"adapter", "checkpoints"} == set()


@pytest.mark.parametrize("config", [*(CONFIGS / f"{stage}.yaml" for stage in STAGES), DDP], ids=lambda path: path.stem)
def test_an_infinite_gradient_under_a_finite_loss(config: Path, poisoned: tuple[Path, Path], tmp_path: Path) -> None:
    rows = ("--data.train_file", str(poisoned[1]), "--data.validation_file", "null")
    run = launch(config, *DEBUG, *rows, folder=tmp_path / "run", script=INF_WORKER)
    stops_at_row_6(run, "a gradient is not finite, though all losses are, in")
