"""Asks one model all questions, in processes of its own, on all ranks."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from data.chat import prompt_ids
from data.conversation import Row
from eval.answers.generate import Answer, generate, load_model, timed
from eval.answers.settings import Settings
from eval.answers.vllm_backend import ask_vllm
from loop.guard.process import RunError
from loop.measure.memory import memory_in_use, peak_memory
from loop.model.build import build_template, build_tokenizer
from loop.recipe import Recipe, find_model


@dataclass(frozen=True)
class Question:
    """Says what one worker process has to do: which model to ask, how, and with which rows."""

    label: str  # base, tuned, or the name of a checkpoint
    recipe: Recipe
    adapter: Path | None
    merge: bool
    rows: list[Row]  # the last turn of each is what is asked for
    batch_size: int | None  # None stands for as many prompts as fit into memory
    settings: Settings
    backend: str = "transformers"
    verify: int = 0  # the first so many rows are asked once more, one at a time


@dataclass(frozen=True)
class Asked:
    """Holds the answers of one process to its share of the rows, and what they cost."""

    answers: list[list[Answer]]  # those to each row
    seconds: float
    peak_load: int | None
    peak_inference: int | None
    different: int = 0  # number of the first `verify` rows that get another answer when asked one at a time

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for row in self.answers for answer in row)


def ask(question: Question) -> Asked:
    """Asks one model its rows. This function runs in a worker process."""
    settings = question.settings
    if question.backend == "vllm":
        answers, seconds = ask_vllm(question)
        return Asked(answers, seconds, None, None)
    if torch.cuda.is_available():
        # peak_memory() and timed() look at the current GPU.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    peak_memory()  # the peak counts from here on
    recipe, tokenizer = question.recipe, build_tokenizer(question.recipe)
    name = find_model(recipe.model.name_or_path)
    model = load_model(name, question.adapter, question.merge, recipe.model.trust_remote_code)
    peak_load = peak_memory()
    template = build_template(recipe, tokenizer)
    prompts = [prompt_ids(row, template) for row in question.rows]
    stops = template.stop_tokens(model.generation_config)
    peak_memory()  # the peak counts from here on
    held = memory_in_use()
    total = len(prompts) * settings.samples
    with tqdm(total=total, desc=question.label, unit="answer", disable=not sys.stderr.isatty()) as bar:
        answers, seconds = timed(
            lambda: generate(model, tokenizer, prompts, stops, question.batch_size, settings, progress=bar.update)
        )
    peak = peak_memory()
    peak_inference = peak - held if peak is not None and held is not None else None
    alone = [generate(model, tokenizer, [p], stops, 1, settings)[0] for p in prompts[: question.verify]]
    different = sum(a != b for a, b in zip(alone, answers[: question.verify], strict=True))
    return Asked(answers, seconds, peak_load, peak_inference, different)


def ask_everywhere(question: Question) -> Asked:
    """Asks all rows: each rank asks its share, in a fresh worker process, and gets the answers of all ranks.

    The worker is fresh so that the memory of one model does not count for the next. Every rank has to call this
    function.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    share = replace(question, rows=question.rows[rank::ranks], verify=len(range(rank, question.verify, ranks)))
    mine: Asked | Exception
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            mine = pool.submit(ask, share).result() if share.rows else Asked([], 0.0, None, None)
    except Exception as error:  # the other ranks would wait for this rank
        mine = error
    everyone: list[Asked] = []
    for number, each in enumerate(gather_object([mine]) if ranks > 1 else [mine]):  # a collective
        if isinstance(each, Exception):
            raise each if number == rank else RunError(f"rank {number} could not answer: {each}")
        everyone.append(each)
    answers: list[list[Answer]] = [[] for _ in question.rows]
    for number, each in enumerate(everyone):
        answers[number::ranks] = each.answers
    return Asked(
        answers,
        max(each.seconds for each in everyone),
        max((each.peak_load for each in everyone if each.peak_load is not None), default=None),
        max((each.peak_inference for each in everyone if each.peak_inference is not None), default=None),
        sum(each.different for each in everyone),
    )
