"""Few-shot tasks through lm-evaluation-harness, which is imported only when a task is run.

The harness brings task definitions and prompts; their data sets come from a hub unless they are cached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import EngineError, InputError, suggest
from workbench.progress import Job
from workbench.runtime.base import Sampler

if TYPE_CHECKING:
    from workbench.runtime.base import Engine

_DEFAULT_NEW_TOKENS = 256  # the harness' own default where a task does not say


def run_tasks(
    engine: Engine,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    job: Job | None = None,
) -> pd.DataFrame:
    """Run tasks of lm-evaluation-harness on an engine.

    Args:
        engine: dense or compressed.
        tasks: names as the harness knows them.
        num_fewshot: examples in the prompt; None for the task's own number.
        limit: examples per task; None for all.
        seed: of the choice of examples.
        job: progress, one unit per request.

    Returns:
        One row per task and metric: ``task``, ``metric``, ``filter``, ``value``, ``stderr`` (NaN where the harness
        gives none), ``n`` (examples), ``num_fewshot``.

    Raises:
        InputError: an unknown task.
        EngineError: the harness is not installed, or a data set can neither be reached nor is cached.
    """
    lm = harness_model(engine, seed=seed, job=job)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks:
            raise InputError(f"lm-evaluation-harness has no task '{task}'." + suggest(task, manager.all_tasks))
    try:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except OSError as error:  # connection refused, offline mode, no such data set in the cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(
            f"The data of {', '.join(tasks)} could not be had ({reason}): connect to the hub once, or use the "
            "questions that come with the workbench."
        ) from error
    return results_table(found)


def results_table(found: dict[str, Any]) -> pd.DataFrame:
    """Turn the harness' nested results into rows; see ``run_tasks``."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{name}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": name,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else math.nan,
                    "n": found["n-samples"][task]["effective"],
                    "num_fewshot": found["n-shot"].get(task),
                }
            )
    return pd.DataFrame(rows)


def harness_model(engine: Engine, *, seed: int = 0, job: Job | None = None) -> Any:
    """Wrap an engine as an ``lm_eval.api.model.LM``, to pass to ``lm_eval.simple_evaluate``.

    Raises:
        EngineError: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise EngineError(
            f"Few-shot tasks need lm-evaluation-harness ({error}): pip install 'compression-workbench[bench]'."
        ) from error
    model, progress = engine.model, job or Job()
    # The harness may ask for one token more than the context, which it predicts but never feeds; an engine is given
    # all of them.
    longest = engine.context_length - 1

    class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types, and may not be installed
        """The three requests of the harness, answered one text at a time."""

        tokenizer = model.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(model.stop_tokens[0]) if model.stop_tokens else int(model.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return model.bos if model.bos is not None else self.eot_token_id

        @property
        def tokenizer_name(self) -> str:
            return model.name

        @property
        def max_length(self) -> int:
            return longest

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = model.encode(string, bos=False)
            begin = add_special_tokens is not False and model.bos is not None and ids[:1] != [model.bos]
            return [model.bos, *ids] if begin and model.bos is not None else ids

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text = model.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            progress.stage("log-likelihoods", len(requests))
            answers = []
            for texts, context, continuation in requests:
                tokens = [*context, *continuation][-engine.context_length :]
                answer = _score_end(engine, tokens, min(len(continuation), len(tokens) - 1))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                answers.append(answer)
                progress.advance()
            return answers

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=longest,
                    context_len=1,
                )
                pieces = [(None, *make_disjoint_window(window)) for window in windows]
                total = sum(score for score, _ in self._loglikelihood_tokens(pieces))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
                totals.append(total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            progress.stage("generation", len(requests))
            replies = []
            for request in requests:
                reply = _generate(engine, request.args[0], dict(request.args[1]), seed, progress)
                self.cache_hook.add_partial("generate_until", request.args, reply)
                replies.append(reply)
                progress.advance()
            return replies

    return HarnessModel()


def _score_end(engine: Engine, tokens: Sequence[int], count: int) -> tuple[float, bool]:
    """Log-likelihood of the last ``count`` tokens, and whether greedy decoding would have chosen each of them."""
    begin = len(tokens) - count  # index of the first scored token
    total, greedy = 0.0, True
    for first, rows in engine.log_probabilities(tokens, prompt_length=begin):
        positions = np.arange(max(first, begin - 1), min(first + len(rows), len(tokens) - 1))
        if len(positions) == 0:
            continue
        targets = np.asarray(tokens)[positions + 1]
        picked = rows[positions - first]
        total += float(picked[np.arange(len(targets)), targets].sum(dtype=np.float64))
        greedy = greedy and bool((picked.argmax(axis=1) == targets).all())
    return total, greedy


def _generate(engine: Engine, context: str, options: dict[str, Any], seed: int, job: Job) -> str:
    """Reply to one request; the text ends before the first of the task's stop strings."""
    from workbench.runtime.sampling import sample

    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    new_tokens = min(int(options.get("max_gen_toks", _DEFAULT_NEW_TOKENS)), engine.context_length - 1)
    sampler = Sampler(
        temperature=float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0,
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
    )
    model, rng = engine.model, np.random.default_rng(seed)
    prompt = model.encode(context)[-(engine.context_length - new_tokens) :]
    sequence = engine.start(seed=seed)
    logits = engine.prefill(sequence, prompt)
    tokens: list[int] = []
    while True:
        job.check()
        token = sample(logits, sampler, rng)
        if token in model.stop_tokens:
            break
        tokens.append(token)
        text = model.decode(tokens)
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)]
        if len(tokens) == new_tokens:
            break
        logits = engine.step([sequence], [token])[0]
    return model.decode(tokens)
