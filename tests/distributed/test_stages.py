"""The same run under every configuration: same losses, same learning rates, whole adapters, untouched base."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.launching import CONFIGS, ROOT, WORKER, Run, launch

STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
TINY = ROOT / "data" / "tiny_base"


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of the task, of unequal answer lengths: 72.jsonl for nine steps of eight, and 9.jsonl."""
    lines = (ROOT / "data" / "math" / "math_train_1798.json").read_text().splitlines()[1:]
    folder = tmp_path_factory.mktemp("data")
    for count in (72, 9):
        (folder / f"{count}.jsonl").write_text("\n".join(line.rstrip(",") for line in lines[:count]))
    return folder


@pytest.fixture(scope="session")
def train(rows: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A function that launches one fp32 run without dropout, logging every step, and remembers it."""
    base = tmp_path_factory.mktemp("runs")

    @cache
    def run(
        config: str, processes: int, micro: int, accum: int, checkpointing: str = "non_reentrant", count: int = 72
    ) -> Run:
        return launch(
            CONFIGS / f"{config}.yaml",
            *("--data.train_file", str(rows / f"{count}.jsonl"), "--data.validation_file", "null"),
            *("--epochs", "1", "--log_every", "1", "--lora.dropout", "0", "--tracker", "null"),
            *("--micro_batch_size", str(micro), "--grad_accum_steps", str(accum)),
            *("--gradient_checkpointing", checkpointing),
            folder=base / f"{config}-{processes}-{micro}-{accum}-{checkpointing}-{count}",
            processes=processes,
            precision="no",
            script=WORKER,
        )

    return run


@pytest.mark.parametrize("config", STAGES)
def test_every_stage_is_the_same_training(config: str, train) -> None:  # type: ignore[no-untyped-def]
    run, reference = train(config, 2, 4, 1), train("zero0", 2, 4, 1)
    assert run.code == 0, run.output
    assert len(run.series("train/loss")) == 9
    assert run.series("train/loss") == pytest.approx(reference.series("train/loss"), rel=1e-4)
    assert run.series("train/grad_norm") == pytest.approx(reference.series("train/grad_norm"), rel=1e-4)
    assert run.series("train/loss")[-1] < 0.9 * run.series("train/loss")[0], "nothing was learned"


@pytest.mark.parametrize("config", STAGES)
def test_adapter_is_whole_and_base_untouched(config: str, train) -> None:  # type: ignore[no-untyped-def]
    run = train(config, 2, 4, 1)
    assert run.code == 0, run.output
    check = json.loads((run.folder / "base_check.json").read_text())
    assert check["different"] == []
    assert check["compared"] > 40
    model = AutoModelForCausalLM.from_pretrained(TINY)
    plain = {name: parameter.shape for name, parameter in model.named_parameters()}
    tuned = PeftModel.from_pretrained(model, str(run.folder / "adapter"))
    tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4 * 7 * 2, "4 layers, 7 projections, A and B"
    for name, tensor in tensors.items():
        layer, _, which = name.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        d_out, d_in = plain[f"{layer}.weight"]
        assert tensor.shape == {"lora_A": (8, d_in), "lora_B": (d_out, 8)}[which]
        assert torch.count_nonzero(tensor) > 0
        assert torch.equal(tuned.get_parameter(name.replace(".weight", ".default.weight")), tensor)


@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [("zero0", "none"), ("zero3", "none"), ("zero3", "reentrant"), ("zero2_offload", "reentrant")],
)
def test_checkpointing_is_the_same_training(config: str, checkpointing: str, train) -> None:  # type: ignore[no-untyped-def]
    run, reference = train(config, 2, 4, 1, checkpointing), train("zero0", 2, 4, 1)
    assert run.code == 0, run.output
    assert run.series("train/loss") == pytest.approx(reference.series("train/loss"), rel=1e-5)
    assert run.series("train/grad_norm") == pytest.approx(reference.series("train/grad_norm"), rel=1e-4)


def cosine_with_warmup(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """The closed form, written down independently: learning rate of update `step`, counted from 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize(("processes", "micro", "accum"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4)])
def test_learning_rate_is_the_closed_form(processes: int, micro: int, accum: int, train) -> None:  # type: ignore[no-untyped-def]
    run = train("zero0" if (processes, accum) == (2, 1) else "zero3", processes, micro, accum)
    assert run.code == 0, run.output
    expected = [cosine_with_warmup(step, 9, 3e-3, 0.03) for step in range(9)]
    assert run.series("train/lr") == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("processes", "micro", "accum"), [(1, 1, 8), (1, 2, 4), (2, 4, 1), (2, 1, 4)])
def test_how_a_batch_is_cut_up_does_not_matter(processes: int, micro: int, accum: int, train) -> None:  # type: ignore[no-untyped-def]
    run, whole = train("zero3", processes, micro, accum), train("zero3", 1, 8, 1)
    assert run.code == 0, run.output
    assert run.series("train/loss") == pytest.approx(whole.series("train/loss"), rel=1e-5)


@pytest.mark.parametrize("config", ["zero0", "zero2_offload", "zero3"])
def test_stand_ins_change_nothing(config: str, train) -> None:  # type: ignore[no-untyped-def]
    """Nine rows in windows of eight, cut up by ones: in the second window seven of eight places have no row."""
    run, whole = train(config, 2, 1, 4, count=9), train("zero0", 1, 8, 1, count=9)
    assert run.code == 0, run.output
    assert len(run.series("train/loss")) == 2
    for key in ("train/loss", "train/grad_norm"):
        assert run.series(key) == pytest.approx(whole.series(key), rel=1e-5)


def test_first_loss_and_gradient_are_plain_pytorch(rows: Path, train) -> None:  # type: ignore[no-untyped-def]
    """Step 1 of the real run against the base model alone, row by row, labels found in the rendered text."""
    import numpy as np
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, set_seed

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    order = np.random.default_rng((42, 0)).permutation(72)[:8]
    texts = [json.loads(line) for line in (rows / "72.jsonl").read_text().splitlines()]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(TINY)
    set_seed(42)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64, target_modules=targets))
    total, count = torch.zeros(()), 0
    for i in order:
        prompt = (
            "<|im_start|>system\n你是一个有帮助的助手,帮我解决下面数学问题<|im_end|>\n"
            f"<|im_start|>user\n{texts[i]['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        )
        answer = tokenizer(texts[i]["output"] + "<|im_end|>")["input_ids"]
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + answer])
        log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(ids.shape[1] - len(answer), ids.shape[1]):
            total = total - log_probabilities[position - 1, ids[0, position]]
            count += 1
    (total / count).backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    run = train("zero3", 2, 4, 1)
    assert run.series("train/loss")[0] == pytest.approx((total / count).item(), rel=1e-5)
    assert run.series("train/grad_norm")[0] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)
