"""Asks a model as somebody would who knows nothing of this project: with transformers and PEFT alone.

`python -P stranger.py REQUEST` runs in a process of its own. REQUEST is a JSON file, whose keys are those that `main`
reads; the answers go to two files in its folder `out`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def main(request: dict[str, Any]) -> None:
    model = open_model(request)
    out = Path(request["out"])
    logits = {}
    for i, (ids, places) in enumerate(request["rows"]):
        logits[f"tuned.{i}"] = logits_at(model, ids, places)
        if request["adapter"]:
            with model.disable_adapter():
                logits[f"base.{i}"] = logits_at(model, ids, places)
    answers = [answer(model, prompt, request) for prompt in request["prompts"]]
    prompts: list[list[int]] = []
    if request["conversations"]:
        tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=request["trust_remote_code"])
        prompts = [prompt_of(tokenizer, messages) for messages in request["conversations"]]
    save_file(logits, out / "logits.safetensors")
    (out / "answers.json").write_text(json.dumps({"answers": answers, "prompts": prompts}))


def open_model(request: dict[str, Any]) -> Any:
    """Opens the model, and the adapter where there is one. Raises RuntimeError where a file lacks a weight."""
    opened: Any = AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"],
        output_loading_info=True,
    )
    model, found = opened
    if wrong := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise RuntimeError(f"{len(wrong)} weights are missing or have another shape, first {min(map(str, wrong))}")
    if request["adapter"]:
        model = PeftModel.from_pretrained(model, request["adapter"])
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        written = load_file(Path(request["adapter"]) / "adapter_model.safetensors")
        if held.keys() != written.keys() or any(not torch.equal(held[k].float(), written[k].float()) for k in held):
            raise RuntimeError("the opened model does not hold what stands in adapter_model.safetensors")
    return model.to(request["device"]).eval()


def prompt_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a prompt; none where the chat template refuses the conversation."""
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    except Exception:  # a template is a program, and may raise anything
        return []


@torch.inference_mode()
def logits_at(model: Any, ids: list[int], places: list[int]) -> torch.Tensor:
    """The logits [places, vocabulary] at these places of a text."""
    output = model(input_ids=torch.tensor([ids], device=model.device))
    logits: torch.Tensor = output.logits[0, places].float().cpu().contiguous()
    return logits


@torch.inference_mode()
def answer(model: Any, prompt: list[int], request: dict[str, Any]) -> dict[str, list[Any]]:
    """The greedy answer to a prompt: its ids, and at each of them by how much its logit is above the second best.

    Without `stops` in the request the model's own generation_config.json says where an answer ends.
    """
    ids = torch.tensor([prompt], device=model.device)
    stops = {"eos_token_id": request["stops"]} if request["stops"] else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request["max_new_tokens"],
        pad_token_id=request["pad"],
        output_logits=True,
        return_dict_in_generate=True,
        **stops,
        **GREEDY,
    )
    best = [step[0].float().topk(2).values.tolist() for step in output.logits]
    return {"ids": output.sequences[0, len(prompt) :].tolist(), "gaps": [first - second for first, second in best]}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
