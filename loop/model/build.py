"""Builds what a run consists of: tokenizer, examples, model with LoRA, optimizer and schedule."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from data.chat import encode_rows
from data.errors import UserError
from data.examples import Example
from data.layout import Layout
from data.rows import iter_rows
from loop.engine.accelerator import mixed_precision
from loop.measure.phases import measured
from loop.model.attention import BY_ROW
from loop.model.head import put_loss_inside
from loop.model.lora import fuse_lora
from loop.recipe import Recipe, find_model, find_path

WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Data:
    """Tokenized rows, on disk; `validation` is empty where the recipe names no file."""

    train: Sequence[Example]
    validation: Sequence[Example]
    pad_token_id: int
    layout: Layout = "padded"  # of micro-batches


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Raises UserError when there is none to open."""
    name = find_model(recipe.model.name_or_path)
    said = f"model.name_or_path {name}: no tokenizer could be opened"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{said}: {_reason(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made from nothing, where a model's type is known
        raise UserError(f"{said}: its files are missing. Copy the model anew.")
    return tokenizer


def build_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Both files read, checked and tokenized; UserError on anything wrong in them."""

    def load(file: str) -> Sequence[Example]:
        path = find_path(file)
        return encode_rows(iter_rows(path), path, recipe.data.system_prompt, recipe.data.max_length, tokenizer)

    validation = load(recipe.data.validation_file) if recipe.data.validation_file else []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Data(load(recipe.data.train_file), validation, int(pad))


def _reason(error: Exception) -> str:
    """An error of another library in a few words; of a KeyError the text alone says nothing."""
    return f"{type(error).__name__}: {str(error)[:500]}"


def check_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Opens the model, with adapters but without weights, each process for itself: all come to the same verdict.

    Later, at stage 3, rank 0 alone reads the weights, and what is wrong with them would leave the others waiting.
    Raises UserError when it cannot be opened, when weights are missing or of another shape, when there are
    fewer embeddings than the tokenizer has tokens, and when a LoRA target names no linear layer in it.
    """
    name = find_model(recipe.model.name_or_path)
    said = f"model.name_or_path {name}: "
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it would print is in `found`
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = _open_model(
            recipe, device_map={"": "meta"}, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{said}the model could not be opened: {_reason(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    wrong += [
        f"{key} is {tuple(has)} instead of {tuple(needs)}" for key, has, needs in sorted(found["mismatched_keys"])
    ]
    if wrong:
        raise UserError(
            f"{said}{len(wrong)} of its weights do not fit its config.json, first {wrong[0]}. Copy it anew."
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if embeddings < len(tokenizer):
        raise UserError(
            f"{said}its vocabulary has {embeddings} tokens and its tokenizer {len(tokenizer)}. Copy it anew."
        )
    return add_adapters(model, recipe)


def add_adapters(model: Any, recipe: Recipe) -> PeftModel:
    """The recipe's, to a model on the meta device. Raises UserError when it has no such layers to adapt."""
    name = recipe.model.name_or_path
    layers = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    missing = [target for target in recipe.lora.target_modules if target not in layers]
    if missing:
        raise UserError(f"lora.target_modules: {name} has no layers named {', '.join(missing)}.")
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, for PEFT's authors
            adapted = get_peft_model(model, _lora_config(recipe), autocast_adapter_dtype=False)
    except Exception as error:  # PEFT has several for what it cannot adapt
        raise UserError(f"lora.target_modules: {name} cannot get such adapters: {_reason(error)}") from error
    assert isinstance(adapted, PeftModel)
    return adapted


def _open_model(recipe: Recipe, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        find_model(recipe.model.name_or_path),
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        use_safetensors=True,  # the other format is pickle, which can run code
        **how,
    )


def _lora_config(recipe: Recipe) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.model.name_or_path,
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora.dropout,
        target_modules=list(recipe.lora.target_modules),
    )


@measured("load")
def build_model(recipe: Recipe, layout: Layout, checkpointing: str, accelerator: Accelerator) -> PeftModel:
    """The base model, frozen, with fresh LoRA adapters; called with labels it returns the loss (loop/model/head.py).

    Every rank enters: at stage 3 rank 0 reads and shares.
    """
    base = _open_model(recipe, dtype=WEIGHT_DTYPES[mixed_precision(accelerator)])
    base.config.use_cache = False  # a cache is of no use in training
    set_layout(base, layout)
    set_seed(recipe.seed)  # here, so that the initial adapters do not depend on how the base was loaded
    # Under DeepSpeed the adapters have the base's dtype at every stage and the fp32 masters live in the
    # optimizer. Without DeepSpeed there are no masters, so the adapters themselves are fp32.
    under_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    model = get_peft_model(base, _lora_config(recipe), autocast_adapter_dtype=not under_deepspeed)
    assert isinstance(model, PeftModel)
    set_checkpointing(base, checkpointing)  # after PEFT, which would let even the embeddings want gradients
    fuse_lora(model)
    put_loss_inside(model)
    return model


def set_layout(base: Any, layout: Layout) -> None:
    """Gives the model the attention that rows in one need."""
    if layout != "padded":
        base.set_attn_implementation(BY_ROW)


def set_checkpointing(base: Any, kind: str) -> None:
    """`kind` is none, non_reentrant or reentrant."""
    base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    if kind != "none":
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
        layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
        for last in layers[-1:]:
            last.gradient_checkpointing = False  # its backward pass is the first: what it kept would be gone at once
    base.disable_input_require_grads()  # else what transformers has enabled by itself would be forgotten, not undone
    if kind == "reentrant":  # it computes gradients only for segments one of whose inputs wants one
        base.enable_input_require_grads()


def build_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.AdamW:
    optim = recipe.optim
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)


def build_lr_scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, total_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear from 0 over ceil(warmup_ratio x total_steps) steps, then half a cosine to 0 at total_steps.

    `done` steps of it are past already.
    """
    warmup = warmup_steps(recipe, total_steps)
    scheduler: torch.optim.lr_scheduler.LambdaLR = transformers.get_cosine_schedule_with_warmup(
        optimizer, warmup, total_steps
    )
    for _ in range(done):
        scheduler.step()
    return scheduler


def warmup_steps(recipe: Recipe, total_steps: int) -> int:
    return math.ceil(recipe.optim.warmup_ratio * total_steps)


def rows_per_step(recipe: Recipe, accelerator: Accelerator) -> int:
    """The effective batch: micro x accumulation x ranks."""
    return recipe.micro_batch_size * recipe.grad_accum_steps * int(accelerator.num_processes)
