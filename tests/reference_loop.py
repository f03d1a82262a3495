"""The judge of the loop: the same training in plain PyTorch, in float64, on one process, a window in one go.

No accelerate, no DeepSpeed, no PEFT: its own LoRA, its own chat text and labels, AdamW and cosine from their
formulas (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101). Only the frozen model is transformers'.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "你是一个有帮助的助手,帮我解决下面数学问题"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 64.0
PEAK, WARMUP_RATIO, WEIGHT_DECAY, BETAS, EPS, MAX_NORM = 1e-4, 0.03, 0.1, (0.9, 0.999), 1e-8, 1.0


@dataclass(frozen=True)
class History:
    """What each step had: its mean loss in nats a label token, global gradient norm before clipping, learning rate."""

    loss: list[float]
    grad_norm: list[float]
    lr: list[float]
    adapter: dict[str, Tensor]  # after the last step; "<layer>.lora_A" [RANK, d_in], "<layer>.lora_B" [d_out, RANK]


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        dtype = base.weight.dtype
        self.base, self.a, self.b = base, nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + (x @ self.a.T) @ self.b.T * (ALPHA / RANK)
        return out


def tokens_and_labels(row: dict[str, str], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of the written-out chat, and which of them are the answer or its end."""
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
    )
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(row["output"] + "<|im_end|>")["input_ids"]
    return before + after, [False] * len(before) + [True] * len(after)


def learning_rate(step: int, total: int) -> float:
    """The learning rate of update `step`, counted from 0."""
    warmup = math.ceil(total * WARMUP_RATIO)
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def reference_loop(
    folder: Path,
    rows_file: Path,
    initial: dict[str, Tensor],
    rows_per_step: int,
    seed: int,
    weights: torch.dtype,
    arithmetic: torch.dtype = torch.float64,
) -> History:
    """One epoch over `rows_file`, from the adapter `initial`, over the checkpoint `folder` rounded to `weights`.

    Forward and backward compute in `arithmetic`; the update is float64 in any case, on weights of its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=weights)
    model = model.to(arithmetic).requires_grad_(False)
    adapters: dict[str, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if f"{name}.lora_A" in initial:
            wrapped = LoraLinear(module, initial[f"{name}.lora_A"], initial[f"{name}.lora_B"])
            model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], wrapped)
            adapters |= {f"{name}.lora_A": wrapped.a, f"{name}.lora_B": wrapped.b}
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    encoded = [tokens_and_labels(row, tokenizer) for row in rows]
    order = np.random.default_rng((seed, 0)).permutation(len(rows)).tolist()
    windows = [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]
    masters = {name: parameter.detach().double() for name, parameter in adapters.items()}
    first = {name: torch.zeros_like(master) for name, master in masters.items()}
    second = {name: torch.zeros_like(master) for name, master in masters.items()}
    history = History([], [], [], {})
    for step, window in enumerate(windows):
        loss = window_loss(model, [encoded[i] for i in window])
        gradients = dict(zip(adapters, torch.autograd.grad(loss, list(adapters.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        lr = learning_rate(step, len(windows))
        clip = min(1.0, MAX_NORM / (norm + 1e-6))
        with torch.no_grad():
            for name, parameter in adapters.items():
                gradient = gradients[name].double() * clip
                first[name].mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient)
                second[name].mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient.square())
                m = first[name] / (1 - BETAS[0] ** (step + 1))
                v = second[name] / (1 - BETAS[1] ** (step + 1))
                masters[name].mul_(1 - lr * WEIGHT_DECAY).sub_(lr * m / (v.sqrt() + EPS))
                parameter.copy_(masters[name])
        history.loss.append(loss.item())
        history.grad_norm.append(norm)
        history.lr.append(lr)
    history.adapter.update({name: parameter.detach().double() for name, parameter in adapters.items()})
    return history


def window_loss(model: Any, rows: list[tuple[list[int], list[bool]]]) -> Tensor:
    """Scalar: mean cross entropy over the label tokens of all `rows`, in one padded batch with all logits."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    log_probabilities = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    picked = [
        log_probabilities[i, position - 1, token]
        for i, (tokens, labels) in enumerate(rows)
        for position, (token, label) in enumerate(zip(tokens, labels, strict=True))
        if label
    ]
    return -torch.stack(picked).mean()
