"""The loss inside the model: logits exist only where a label is predicted, and only for a few labels at a time.

The logits of one position are as many numbers as the vocabulary has tokens (152,064 in Qwen2.5), and so is their
gradient. So the loss makes logits for a few label positions at a time and turns them into the gradient of the hidden
state at once. lm_head is frozen and needs no gradient of its own.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers.modeling_outputs import BaseModelOutputWithPast

LOGITS = 2**26  # numbers in the logits that exist at a time; in fp32 256 MiB, for 441 label positions of Qwen2.5
FP16_SCALE = 2.0**12  # keeps small probabilities above the smallest number of fp16


class PeftModelWithLoss(PeftModelForCausalLM):
    """A PeftModel whose forward pass returns the loss instead of logits.

    A subclass with a forward pass of its own is how PEFT itself adapts a PeftModel to a task. Parameters, state dicts
    and adapter files have the same names as in any PeftModel.
    """

    def __init__(self, base: Any, config: LoraConfig, **options: Any) -> None:
        """`options` are those of PeftModelForCausalLM, for example autocast_adapter_dtype."""
        super().__init__(base, config, **options)
        head = base.get_output_embeddings()
        if type(head) is nn.Linear and not head.weight.requires_grad and has_plain_head(base):
            base.set_output_embeddings(HeadWithLoss(head))

    def forward(  # type: ignore[override]
        self, labels: Tensor, predicts: Tensor, weights: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Scalar: the cross entropy in nats, times its weight and summed over the N label tokens.

        `labels` [N] are their token ids, and `weights` [N] what each weighs; without it each weighs 1. `predicts` [N]
        are the places of the tokens before them, in the batch's [B, T] laid out flat. `inputs` are the base model's own
        arguments.
        """
        base: Any = self.get_base_model()
        head = base.get_output_embeddings()
        if not isinstance(head, HeadWithLoss):
            return _nll_of_all_logits(base, labels, predicts, weights, inputs)
        decoder = getattr(base, base.base_model_prefix)
        hidden = decoder(**inputs).last_hidden_state  # [B, T, hidden size]
        nll: Tensor = head(hidden.flatten(0, 1).index_select(0, predicts), labels, weights)
        return nll


class HeadWithLoss(nn.Linear):
    """An lm_head that, given labels, returns their loss; without labels it returns logits as before.

    It takes over the weight and the bias of `head`. It is a module and owns the weight, so ZeRO-3 gathers the weight
    when the head is called.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, head.bias is not None, "meta")  # draws no random numbers
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """[N, hidden size], [N], [N] -> scalar; without labels […, hidden size] -> […, vocab]"""
        if labels is None:
            return super().forward(hidden)
        nll: Tensor = LinearNLL.apply(hidden, self.weight, self.bias, labels, weights)  # type: ignore[no-untyped-call]
        return nll


def _nll_of_all_logits(
    base: Any, labels: Tensor, predicts: Tensor, weights: Tensor | None, inputs: dict[str, Any]
) -> Tensor:
    """The loss of a model that does more than lm_head's product to make its logits: all of them exist at once."""
    ids = inputs["input_ids"]
    if ids.is_meta:  # a mask on this device has no contents; so the same number of places is kept in each row
        kept = torch.zeros(-(-len(predicts) // len(ids)), dtype=torch.long, device="meta")
    else:
        kept = torch.zeros_like(ids, dtype=torch.bool).flatten().index_fill(0, predicts, True).view_as(ids)
    logits = base(**inputs, logits_to_keep=kept).logits.flatten(0, -2)[: len(predicts)]  # [N, vocab]
    if weights is None:
        return cross_entropy(logits.float(), labels, reduction="sum")
    return cross_entropy(logits.float(), labels, reduction="none") @ weights


def logits_at_once(base: Any, label_tokens: int) -> int:
    """Bytes of the logits that exist at a time, at most, when a PeftModelWithLoss of `base` gets so many labels."""
    head = base.get_output_embeddings()
    vocab: int = head.weight.shape[0]
    many = min(label_tokens, max(1, LOGITS // vocab)) if isinstance(head, HeadWithLoss) else label_tokens
    return 4 * vocab * many


class LinearNLL(torch.autograd.Function):
    """The cross entropy of `labels` [N] under the logits hidden @ weight.T + bias, each times its part of `weights`
    [N] (None stands for 1), summed: a scalar in fp32.

    hidden is [N, hidden size], weight [vocab, hidden size]. Neither weight nor bias gets a gradient. The gradient of
    hidden is (softmax - one-hot) @ weight; the forward pass computes it, while the logits exist.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None
    ) -> Tensor:
        nll = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        scale = FP16_SCALE if weight.dtype == torch.float16 else 1.0
        rows = max(1, LOGITS // weight.shape[0])
        for start in range(0, len(labels), rows):
            here = slice(start, start + rows)
            logits = linear(hidden[here], weight, bias).float()  # [rows, vocab]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            label = labels[here, None]
            nlls = log_sum - logits.gather(1, label)  # [rows, 1]
            nll += (nlls if weights is None else nlls * weights[here, None]).sum()
            if gradient is not None:
                softmax = logits.sub_(log_sum).exp_()
                softmax.scatter_add_(1, label, torch.full_like(log_sum, -1.0))
                gradient[here] = (softmax.mul_(scale).to(weight.dtype) @ weight).float() / scale
                if weights is not None:
                    gradient[here] *= weights[here, None]
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None, None, None


class _Probe(nn.Module):
    """A module in the decoder's place, which keeps the arguments that it is called with and always returns `hidden`."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.got: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> BaseModelOutputWithPast:
        self.got = {name: value for name, value in inputs.items() if value is not None and value is not False}
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def has_plain_head(base: Any) -> bool:
    """Whether the model's logits are lm_head's output as it is, and its decoder gets the model's arguments as they are.

    The function finds out by trying: it calls the model with a probe as decoder and with a head that changes nothing.
    The answer is False, for example, where logits are scaled (Granite, Cohere) or capped (Gemma 2).
    """
    name = base.base_model_prefix
    decoder, head = getattr(base, name, None), base.get_output_embeddings()
    if not isinstance(decoder, nn.Module) or head is None:
        return False
    # On the CPU by name: the caller may have made the meta device the default, where tensors cannot be compared.
    probe = _Probe(torch.arange(1.0, 7.0, device="cpu").view(1, 2, 3))
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device="cpu"), "apart": object()}
    try:
        setattr(base, name, probe)
        base.set_output_embeddings(nn.Identity())
        logits = type(base).forward(base, **inputs).logits
        return torch.equal(logits, probe.hidden) and probe.got == inputs
    except Exception:  # the model asks for more than the probe has, so its head is not plain
        return False
    finally:
        setattr(base, name, decoder)
        base.set_output_embeddings(head)
