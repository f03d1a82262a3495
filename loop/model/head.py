"""The loss inside the model: lm_head only where a label is predicted, and not for all labels of a long answer at once.

Logits of a position take vocab numbers, for Qwen2.5 152,064, and their gradient as many. So they are made for a few
label positions at a time and become the gradient of the hidden state there and then: frozen, lm_head needs no other.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers.modeling_outputs import BaseModelOutputWithPast

LOGITS = 2**26  # at once, in fp32: a quarter of a GiB; 441 label positions of Qwen2.5
FP16_SCALE = 2.0**12  # keeps small probabilities above fp16's smallest number


def put_loss_inside(model: Any) -> None:
    """From now on model(labels=…, predicts=…, **inputs) is the sum of the label tokens' cross entropy, in nats.

    Of a PeftModel: `labels` [N] are token ids, `predicts` [N] the places in the batch, laid out flat, of the tokens
    before them. A model that makes something else of lm_head's output makes all of its logits.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if "forward" in vars(base):
        return  # it is there
    if type(head) is nn.Linear and not head.weight.requires_grad and has_plain_head(base):
        head.forward = partial(_nll_of_hidden, head)  # type: ignore[method-assign]
        base.forward = partial(_forward, getattr(base, base.base_model_prefix), head)
    else:
        base.forward = partial(_forward_with_logits, base.forward)


def logits_at_once(base: Any, label_tokens: int) -> int:
    """Bytes of the logits that such a model makes at a time, at most, for so many labels."""
    vocab: int = base.get_output_embeddings().weight.shape[0]
    many = label_tokens
    if type(base.get_output_embeddings()) is nn.Linear and "forward" in vars(base.get_output_embeddings()):
        many = min(many, max(1, LOGITS // vocab))
    return 4 * vocab * many


def _forward(decoder: nn.Module, head: nn.Module, labels: Tensor, predicts: Tensor, **inputs: Any) -> Tensor:
    hidden = decoder(**inputs).last_hidden_state  # [B, T, hidden]
    nll: Tensor = head(hidden.flatten(0, 1).index_select(0, predicts), labels)  # as a module: ZeRO-3 gathers its weight
    return nll


def _forward_with_logits(forward: Any, labels: Tensor, predicts: Tensor, **inputs: Any) -> Tensor:
    ids = inputs["input_ids"]
    if ids.is_meta:  # where no mask can be looked into: as many places of each row
        kept = torch.zeros(-(-len(predicts) // len(ids)), dtype=torch.long, device="meta")
    else:
        kept = torch.zeros_like(ids, dtype=torch.bool).flatten().index_fill(0, predicts, True).view_as(ids)
    logits = forward(**inputs, logits_to_keep=kept).logits.flatten(0, -2)[: len(predicts)]  # [N, vocab]
    return cross_entropy(logits.float(), labels, reduction="sum")


def _nll_of_hidden(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    nll: Tensor = LinearNLL.apply(hidden, head.weight, head.bias, labels)  # type: ignore[no-untyped-call]
    return nll


class LinearNLL(torch.autograd.Function):
    """Scalar, fp32: cross entropy of `labels` [N] under the logits hidden @ weight.T + bias, summed.

    hidden is [N, hidden size], weight [vocab, hidden size]; neither weight nor bias gets a gradient. That of hidden is
    (softmax - one-hot) @ weight, found on the way forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        nll = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        scale = FP16_SCALE if weight.dtype == torch.float16 else 1.0
        rows = max(1, LOGITS // weight.shape[0])
        for start in range(0, len(labels), rows):
            here = slice(start, start + rows)
            logits = linear(hidden[here], weight, bias).float()  # [rows, vocab]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            label = labels[here, None]
            nll += (log_sum - logits.gather(1, label)).sum()
            if gradient is not None:
                softmax = logits.sub_(log_sum).exp_()
                softmax.scatter_add_(1, label, torch.full_like(log_sum, -1.0))
                gradient[here] = (softmax.mul_(scale).to(weight.dtype) @ weight).float() / scale
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None, None


class _Probe(nn.Module):
    """Stands where a decoder stands, keeps what it is called with, and returns the same whatever that is."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.got: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> BaseModelOutputWithPast:
        self.got = {name: value for name, value in inputs.items() if value is not None and value is not False}
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def has_plain_head(base: Any) -> bool:
    """Whether its logits are lm_head's output and its decoder gets its inputs, both as they are. Tried out.

    Not so, for example, where logits are scaled (Granite, Cohere) or capped (Gemma 2).
    """
    name = base.base_model_prefix
    decoder, head = getattr(base, name, None), base.get_output_embeddings()
    if not isinstance(decoder, nn.Module) or head is None:
        return False
    probe = _Probe(torch.arange(1.0, 7.0).view(1, 2, 3))
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "apart": object()}
    try:
        setattr(base, name, probe)
        base.set_output_embeddings(nn.Identity())
        logits = type(base).forward(base, **inputs).logits
        return torch.equal(logits, probe.hidden) and probe.got == inputs
    except Exception:  # it asks for more than there is here: not plain
        return False
    finally:
        setattr(base, name, decoder)
        base.set_output_embeddings(head)
