"""Builds the parts of a run: tokenizer, examples, model with LoRA, optimizer and learning-rate schedule."""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.examples import Example
from data.layout import Layout
from data.load import Loaded, Reading, Tally, load, repeated
from data.template import CHATML, ChatTemplate, check_control_tokens
from loop.batch_arithmetic import warmup_steps
from loop.engine.accelerator import mixed_precision, zero_stage
from loop.engine.once import once_per_machine
from loop.internals.deepspeed_internals import fetch_as_a_whole, is_fetched_as_a_whole
from loop.internals.transformers_internals import keep_activations_of_last_layer
from loop.measure.phases import measured
from loop.model.attention import BY_ROW, attention_for
from loop.model.head import PeftModelWithLoss
from loop.model.lora import ADAPTER, share_inputs, shared_inputs, use_fused_lora
from loop.model.opening import open_base_model, open_tokenizer
from loop.model.operators import use_fused_operators
from loop.model.reach import Reach
from loop.recipe import Recipe, check_examination, data_files, find_data, find_model, find_path

PAD = 0  # the token id of padding. Nothing reads it, but it needs an embedding, which a tokenizer's own may not have
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Data:
    """The tokenized rows, which lie on the disk. `validation` is empty where the recipe names no rows for it."""

    train: Sequence[Example]
    validation: Sequence[Example]
    pad_token_id: int
    layout: Layout = "padded"  # how rows share a micro-batch
    parts: Mapping[str, int] = field(default_factory=dict)  # for each validation file: how many of the rows are its own
    tallies: Mapping[str, Tally] = field(default_factory=dict)  # for each file: what became of its rows
    template: ChatTemplate | None = None  # what asks the model; None for rows that were made otherwise


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Opens the tokenizer of the recipe's model. Raises UserError when it cannot be opened."""
    name = find_model(recipe.model.name_or_path)
    said = f"model.name_or_path {name}: no tokenizer could be opened"
    try:
        tokenizer = open_tokenizer(name, recipe.model.trust_remote_code)
    except Exception as error:  # a damaged file may raise any exception
        raise UserError(f"{said}: {_reason(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers made an empty one
        raise UserError(f"{said}: its files are missing. Copy the model anew.")
    return tokenizer


def build_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Makes what writes conversations: the tokenizer's chat template, or the recipe's. Raises UserError."""
    data = recipe.data
    if data.chat_template is not None:
        tokenizer.chat_template = find_template(data.chat_template, recipe.model.trust_remote_code)
        check_control_tokens(tokenizer)
    today = date.fromisoformat(data.date) if data.date else None
    return ChatTemplate(tokenizer, data.system_prompt, data.assistant_markup == "parse", today)


def find_template(name: str, trust_remote_code: bool = False) -> str:
    """The text of the chat template that the recipe names: chatml, a file, or another model's. Raises UserError."""
    if name == "chatml":
        return CHATML
    path = find_path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not path.is_dir() and (name.endswith((".jinja", ".j2", ".txt")) or path.is_absolute() or name.startswith(".")):
        raise UserError(f"data.chat_template {name}: there is no such file. Give chatml, a file, or a model.")
    try:
        template = open_tokenizer(find_model(name), trust_remote_code).chat_template
    except Exception as error:  # a name of the hub may fail in many ways
        raise UserError(
            f"data.chat_template {name}: is no file, and no model's tokenizer could be opened: {_reason(error)}. Give "
            "chatml, a file, or a model."
        ) from error
    if not isinstance(template, str):
        raise UserError(f"data.chat_template {name}: this model has no chat template. Name another one.")
    return template


def build_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Reads, checks and tokenizes the rows, once for all processes of a machine. Raises UserError on anything wrong."""
    check_examination(recipe)
    data, template = recipe.data, build_template(recipe, tokenizer)
    reading = Reading(template, data.max_length, data.too_long, data.validation_share, data.columns)
    train = {find_data(name): times for name, times in data_files(data.train_file).items()}
    validation = [find_data(name) for name in data_files(data.validation_file)]
    loaded = Loaded.opened(*once_per_machine(lambda: load(train, validation, reading).shared()))
    needing = {"patience": recipe.patience is not None, "choose_by": recipe.choose_by == "val/loss"}
    if not loaded.validation and any(needing.values()):
        key = next(key for key, needs in needing.items() if needs)
        raise UserError(f"{key} needs validation rows, and none is left. Leave it out, or raise data.max_length.")
    rows = repeated(loaded.train, loaded.times)
    return Data(rows, loaded.validation, PAD, parts=loaded.parts, tallies=loaded.tallies, template=template)


def _reason(error: Exception) -> str:
    """Describes another library's error in a few words. It names the class, because the text of a KeyError alone says
    nothing."""
    return f"{type(error).__name__}: {str(error)[:500]}"


def check_model(recipe: Recipe) -> PeftModelWithLoss:
    """Opens the model with adapters on the meta device, without its weights, and returns it.

    Every process does this by itself, and all come to the same result. Later, at stage 3, rank 0 alone reads the
    weights, and an error there would leave the other ranks waiting.
    Raises UserError when the model cannot be opened, when weights are missing or have another shape, and when a LoRA
    target names no layer in it that a row of text reaches.
    """
    name = find_model(recipe.model.name_or_path)
    said = f"model.name_or_path {name}: "
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # `found` holds what transformers would print
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = _open_model(
            recipe, device_map={"": "meta"}, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file may raise any exception
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
    return add_adapters(model, recipe)


def add_adapters(model: Any, recipe: Recipe) -> PeftModelWithLoss:
    """Gives a model on the meta device the recipe's adapters, on every layer of these names that rows of text reach.

    Raises UserError when the model has no such layers, and for an embedding: PEFT holds the matrices of such an adapter
    outside the modules whose weights ZeRO-3 gathers.
    """
    name = recipe.model.name_or_path
    kinds = {path.rpartition(".")[2]: type(module) for path, module in model.named_modules()}
    missing = [target for target in recipe.lora.target_modules if target not in kinds]
    if missing:
        raise UserError(f"lora.target_modules: {name} has no layers named {', '.join(missing)}.")
    embeddings = [target for target in recipe.lora.target_modules if issubclass(kinds[target], torch.nn.Embedding)]
    if embeddings:
        raise UserError(
            f"lora.target_modules: {', '.join(embeddings)} of {name} is an embedding, which gets no adapter here, "
            "because ZeRO-3 cannot gather it. Name linear layers."
        )
    reach = Reach(model)
    for layer in reach.passed_once():
        fetch_as_a_whole(layer)  # of use at stage 3 only
    unreached = reach.unreached(recipe.lora.target_modules)
    for target in recipe.lora.target_modules:
        if all(path in unreached for path, _ in model.named_modules() if path.rpartition(".")[2] == target):
            raise UserError(f"lora.target_modules: no row of text reaches the layers of {name} named {target}.")
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers warns PEFT's authors
            adapted = adapt(model, _lora_config(recipe, unreached), autocast_adapter_dtype=False)
    except Exception as error:  # PEFT raises several kinds for layers that it cannot adapt
        raise UserError(f"lora.target_modules: {name} cannot get such adapters: {_reason(error)}") from error
    share_inputs(model, reach.shared_inputs(recipe.lora.target_modules))
    return adapted


def adapt(base: Any, config: LoraConfig, autocast_adapter_dtype: bool) -> PeftModelWithLoss:
    """Gives `base` the adapters of `config`, with this project's LoRA layer and loss (loop/model/lora.py and head.py).

    This is PEFT's get_peft_model with another class for the result.
    """
    config.base_model_name_or_path = getattr(base, "name_or_path", None) or None  # as get_peft_model does
    return PeftModelWithLoss(base, use_fused_lora(config), autocast_adapter_dtype=autocast_adapter_dtype)


def adapters_of(model: PeftModel) -> LoraConfig:
    """PEFT's description of the adapters that `model` has."""
    config = model.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    return config


def _open_model(recipe: Recipe, **how: Any) -> Any:
    """Opens the recipe's base model; `how` are further arguments of from_pretrained."""
    model, name = recipe.model, find_model(recipe.model.name_or_path)
    return open_base_model(name, model.trust_remote_code, attn_implementation=model.attn_implementation, **how)


def _lora_config(recipe: Recipe, unreached: list[str]) -> LoraConfig:
    """PEFT's configuration with the recipe's numbers; the layers `unreached` get no adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora.dropout,
        target_modules=list(recipe.lora.target_modules),
        exclude_modules=unreached or None,
    )


@measured("load")
def build_model(recipe: Recipe, without_weights: PeftModelWithLoss, accelerator: Accelerator) -> PeftModelWithLoss:
    """Builds the frozen base model with fresh LoRA adapters; when it is called it returns the loss.

    The adapters are those that check_model gave to the model `without_weights`, and the recipe says auto nowhere. Every
    rank enters: at stage 3 rank 0 reads the weights and shares them with the others.
    """
    base = _open_model(recipe, dtype=WEIGHT_DTYPES[mixed_precision(accelerator)])
    base.config.use_cache = False  # training needs no cache of keys and values
    suit_device(base, recipe.batching, accelerator.device)
    set_seed(recipe.seed)  # after loading, so that the initial adapters do not depend on how the base was loaded
    # Under DeepSpeed the adapters have the base's dtype at every stage, and the optimizer holds fp32 masters.
    # Without DeepSpeed there are no masters, so the adapters themselves are fp32.
    under_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    model = adapt(base, deepcopy(adapters_of(without_weights)), autocast_adapter_dtype=not under_deepspeed)
    share_inputs(model, shared_inputs(without_weights))
    # After PEFT, which would make even the embeddings require gradients.
    set_checkpointing(base, recipe.gradient_checkpointing)
    if zero_stage(accelerator) == 3:
        fetch_by_layers(model, without_weights)
    return model


def fetch_by_layers(model: PeftModelWithLoss, without_weights: PeftModelWithLoss) -> None:
    """Makes ZeRO-3 fetch and release the decoder layers that check_model found as a whole each, and not each module in
    them by itself.

    DeepSpeed takes the gradients in such a layer when the gradient of its input is there. The input of the first layer
    is made of frozen embeddings and needs no gradient; DeepSpeed would take the layer's gradients before they exist.
    """
    for name, module in without_weights.named_modules():
        if is_fetched_as_a_whole(module):
            layer = model.get_submodule(name)
            fetch_as_a_whole(layer)
            layer.register_forward_pre_hook(_require_gradient_of_input)


def _require_gradient_of_input(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
    """A hook for a layer's forward pass."""
    if not arguments[0].requires_grad:
        arguments[0].requires_grad_(True)


def suit_device(base: Any, layout: str, device: torch.device) -> None:
    """Gives the model the attention that `layout` needs, and on a GPU fused operators."""
    set_layout(base, layout, attention_for(base, device))
    if device.type == "cuda":
        use_fused_operators(base)


def set_layout(base: Any, layout: str, attention: str = BY_ROW) -> None:
    """Gives the model the `attention` that keeps rows apart, where `layout` puts several rows into one."""
    if layout != "padded":
        base.set_attn_implementation(attention)


def set_checkpointing(base: Any, kind: str) -> None:
    """Switches gradient checkpointing of the model; `kind` is none, non_reentrant or reentrant."""
    base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    if kind != "none":
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
        keep_activations_of_last_layer(base)
    # transformers may have made the inputs require gradients by itself. That is undone here, because a second call of
    # enable_input_require_grads would forget the first one's hook and leave it in place.
    base.disable_input_require_grads()
    if kind == "reentrant":  # this kind computes gradients only for segments with an input that requires them
        base.enable_input_require_grads()


def build_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.AdamW:
    """Makes AdamW over the trainable parameters, with the recipe's numbers."""
    optim = recipe.optim
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)


def build_lr_scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, total_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Makes the schedule: the learning rate rises from 0 in a line over ceil(warmup_ratio x total_steps) steps, then
    falls along half a cosine to 0 at total_steps. The schedule starts after `done` steps.
    """
    warmup = warmup_steps(recipe.optim.warmup_ratio, total_steps)
    scheduler: torch.optim.lr_scheduler.LambdaLR = transformers.get_cosine_schedule_with_warmup(
        optimizer, warmup, total_steps
    )
    for _ in range(done):
        scheduler.step()
    return scheduler
