"""lm-evaluation-harness: its parser, and the private methods and attributes of its models that a model of our own uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from patchkit._compat.declared import Names, check_when_used

_HFLM = "lm_eval.models.huggingface:HFLM"

RELIED_ON_WHEN_USED: Names = {
    "lm_eval._cli.harness:HarnessCLI()._parser": None,
    f"{_HFLM}._loglikelihood_tokens": ("self", "requests", "disable_tqdm", "override_bs"),
    f"{_HFLM}._model_generate": ("self", "context", "max_length", "stop"),
    f"{_HFLM}._detect_batch_size": ("self", "requests", "pos"),
    f"{_HFLM}._batch_scheduler": ("self", "pos", "n_reordered_requests"),
    f"{_HFLM}.max_length": None,
    "lm_eval.models.utils:Collator": frozenset({"sort_fn", "group_by", "group_fn"}),
    "lm_eval.models.utils:Collator.get_batched": frozenset({"n", "batch_fn"}),
    "lm_eval.models.utils:Collator.get_cache": frozenset({"req_str", "cxt_toks", "cont_toks", "logits"}),
    "lm_eval.models.utils:Collator.get_original": None,
    "lm_eval.config.evaluate_config:EvaluatorConfig.from_cli": None,
}

MAY_BE_MISSING = {
    "_max_length": "set by HFLM.__init__, so only its source shows it",
    "_rank": "set by HFLM.__init__, so only its source shows it",
    "_world_size": "set by HFLM.__init__, so only its source shows it",
}


def lm_eval_check() -> None:
    """Check the names of lm-eval that `patchkit.lm_eval` relies on, once.

    Raises:
        PatchError: a name is missing or has changed.
    """
    check_when_used("lm_eval", "lm_eval", 'Install a supported lm-eval: pip install "lm-eval[hf]>=0.4.13"')


def parse_options(given: list[str]) -> tuple[Any, list[str]]:
    """Return ``given`` as parsed by the parser of lm-eval's command line, and the options that it does not know."""
    from lm_eval._cli.harness import HarnessCLI

    parsed, unknown = HarnessCLI()._parser.parse_known_args(given)
    return parsed, unknown


def length_asked(model: Any) -> int | None:
    """The ``max_length`` that an `HFLM` was made with, None without one (``_max_length``)."""
    asked: int | None = model._max_length
    return asked


@contextlib.contextmanager
def length_set_to(model: Any, length: int | None) -> Iterator[None]:
    """Within this context an `HFLM` is as if made with ``max_length=length``."""
    asked, model._max_length = model._max_length, length
    try:
        yield
    finally:
        model._max_length = asked


def set_processes(model: Any, rank: int, count: int) -> None:
    """Tell an `HFLM` that it is number ``rank`` of ``count`` processes (``_rank``, ``_world_size``)."""
    model._rank, model._world_size = rank, count


def batch_size_finder(model: Any) -> Callable[[int, Any], int]:
    """The function of an `HFLM` that finds the batch size of what begins at a position of the ordered requests (``_batch_scheduler``)."""
    finder: Callable[[int, Any], int] = model._batch_scheduler
    return finder
