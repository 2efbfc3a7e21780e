"""`PatchkitLM`: lm-evaluation-harness on a patched model, with whole sequences streamed through one cache.

Stock lm-eval cuts sequences to the model's context, so a streaming cache never holds more than the window it was trained
on. Here a whole sequence goes through one cache, in chunks, and a token beyond a window is scored as it would be generated.

    import lm_eval
    from patchkit.lm_eval.model import PatchkitLM

    patch_model(model, "streaming(window=508)")
    results = lm_eval.simple_evaluate(model=PatchkitLM(model), tasks=["wikitext"])
    results["config"]["patchkit"]        # what was patched, and for each task what the patches did

Importing this module makes the model known to lm-eval as "patchkit".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit._compat.lm_eval import batch_size_finder, length_asked, length_set_to, lm_eval_check, set_processes
from patchkit.api import patch_model
from patchkit.errors import PatchConflict, UnsupportedModel
from patchkit.lm_eval.activity import Activity, NeverActed
from patchkit.lm_eval.arguments import split_outside_brackets
from patchkit.measure.perplexity import TextError, stream_nll
from patchkit.measure.texts import encode
from patchkit.models import BUNDLED, bundled_path
from patchkit.patch import Patch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ImportError as error:
    raise ImportError(f"PatchkitLM needs lm-evaluation-harness ({error}): pip install patchkit[eval]") from error

lm_eval_check()

# lm-eval asks for a number where a text may be of any length.
ANY_LENGTH = 10**9

_logger = logging.getLogger("patchkit")


@register_model("patchkit")
class PatchkitLM(HFLM):
    """lm-eval's `HFLM` for patched and unpatched models.

    Differs from it in that contexts and documents are not cut to the model's context, except where a table of positions ends there or
    `max_length` says so; that they are fed `chunk` tokens at a time through one cache; and that a task in which a patch never acted
    ends in `NeverActed`. `results["config"]["patchkit"]` has, for each task, the tokens scored, how many of these lie beyond each
    patch's window, and by how much each patch's counters rose. Under `accelerate launch`, these are sums over all processes.

    Args:
        pretrained: a loaded model, patched or not; or the name of one: "bundled", a directory or a hub id.
        patches: applied to the model first: a spec string, or `Patch` objects.
        chunk: tokens per forward.
        options: of `HFLM`: tokenizer, batch_size, dtype, device, max_length, ...

    Raises:
        UnsupportedModel: it is no causal language model, or a patch refuses it.
        ValueError: chunk < 1.
    """

    def __init__(self, pretrained: Any, patches: str | Patch | list[Patch] | None = None, chunk: int = 512, **options: Any) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: give at least one token per forward")
        if pretrained == "bundled" or pretrained in BUNDLED:
            pretrained = str(bundled_path(pretrained))
        if not isinstance(pretrained, str) and not options.get("tokenizer") and not getattr(pretrained, "name_or_path", ""):
            raise UnsupportedModel("this model was not loaded from a directory or the hub, so its tokenizer is unknown: give tokenizer=")
        super().__init__(pretrained=pretrained, **options)
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModel(
                "this model is prompt-tuned: PEFT puts its prompt in front of every forward, and texts go through several here. Use "
                "lm-eval's own model 'hf'"
            )
        if self.backend != "causal":
            raise UnsupportedModel(f"{type(self.model).__name__} is an encoder-decoder: patchkit evaluates decoder-only models")
        if hasattr(self, "accelerator"):  # lm-eval sees several processes only where there are several GPUs
            set_processes(self, self.accelerator.process_index, self.accelerator.num_processes)
        if patches:
            patch_model(self.model, patches)
        self.chunk = chunk
        self._activity = Activity(self.model)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> PatchkitLM:
        """Make the model from a string such as `pretrained=DIR,patches=streaming(sinks=4,window=508)`: commas in brackets do not split."""
        from lm_eval.utils import handle_arg_string

        parts = [part.partition("=") for part in split_outside_brackets(arg_string) if part.strip()]
        given: dict[str, Any] = {name.strip(): value if name.strip() == "patches" else handle_arg_string(value) for name, _, value in parts}
        given |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**given)

    @property
    def max_length(self) -> int:
        """Length beyond which sequences are cut: the given one, or the end of the model's table of positions."""
        stock: int = super().max_length
        return stock if length_asked(self) or has_position_table(self.model, stock) else ANY_LENGTH

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._counted(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._counted(self._rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._counted(super().generate_until, requests, disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Set lm-eval's cache of responses; its keys are texts without the model, so it is refused for another model's answers.

        Raises:
            PatchConflict: it holds answers of a model with other patches.
        """
        super().set_cache_hook(cache_hook)
        answers = cache_hook.dbdict
        mine = " + ".join(patch.spec for patch in self._activity.report().patches) or "no patches"
        if answers is not None:
            if len(answers) and (whose := answers.get("patchkit")) != mine:
                raise PatchConflict(f"this use_cache holds answers of a model with {whose or 'unknown patches'}: give another for {mine}")
            answers["patchkit"] = mine

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model, its patches and their activity, which lm-eval writes into `results["config"]`.

        Raises:
            NeverActed: nothing was run since the last time, because every answer came from lm-eval's cache of responses.
        """
        patches = self._activity.report().patches
        if patches and not self._activity.tasks:
            raise NeverActed("no task has run on the patched model: its answers came from a cache of responses (use_cache), leave that out")
        tasks, self._activity.tasks = self._activity.tasks, {}
        facts = {"name", "spec", "changed", "left_alone", "warnings", "same_up_to"}
        return super().get_model_info() | {
            "patchkit": {
                "patches": [{name: value for name, value in vars(patch).items() if name in facts} for patch in patches],
                "chunk": self.chunk,
                "tasks": {task: {what: dict(counts) for what, counts in record.items()} for task, record in tasks.items()},
            }
        }

    # -- scoring -----------------------------------------------------------------------------------------------------------

    def _rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score each document through one cache, or in lm-eval's windows if documents are longer than `max_length`."""
        documents = [self._encode_document(request.args[0]) for request in requests]
        if max(map(len, documents), default=0) > self.max_length + 1:
            _logger.warning("patchkit: texts are longer than the %d tokens allowed, and are scored in windows of that", self.max_length)
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        answers = []
        for request, ids in zip(requests, documents, strict=True):
            nll = stream_nll(self.model, ids, self.chunk) if len(ids) > 1 else torch.zeros(0)
            self._activity.count(0, len(nll))
            answers.append(-nll.double().sum().item())
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _encode_document(self, text: str) -> list[int]:
        if self.custom_prefix_token_id is None:
            return encode(self.tokenizer, text)
        return [self.custom_prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations: longest first, one forward for requests that differ in their last token only, streamed in chunks."""
        for strings, context, continuation in requests:
            if not context or not continuation:
                raise TextError(f"an empty {'continuation' if context else 'context'} cannot be scored: {strings!r}")
        ordered = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[-2] + request[-1][:-1],
        )
        automatic = self.batch_size == "auto" and not override_bs
        size = (override_bs or 0) if self.batch_size == "auto" else self.batch_size
        answers = []
        for batch in ordered.get_batched(n=size, batch_fn=batch_size_finder(self) if automatic and len(ordered) else None):
            rows = [self._fitting(context + continuation)[:-1] for _, context, continuation in batch]
            logits = self._last_logits(rows, [len(continuation) for *_, continuation in batch])
            for row, scores, (strings, context, continuation) in zip(rows, logits, batch, strict=True):
                likeliest = scores.argmax(-1)
                logp = torch.log_softmax(scores, dim=-1, dtype=self.softmax_dtype)[None]
                for same, tokens, each in ordered.get_cache(req_str=strings, cxt_toks=context, cont_toks=continuation, logits=logp):
                    wanted = torch.tensor(tokens, device=each.device)
                    total = each[0, -len(tokens) :].gather(1, wanted[:, None]).sum()
                    answer = (float(total), bool((likeliest[-len(tokens) :] == wanted).all()))
                    self._activity.count(len(row) - len(tokens), len(tokens))
                    answers.append(answer)
                    if same is not None:
                        self.cache_hook.add_partial("loglikelihood", same, answer)
        return ordered.get_original(answers)

    def _fitting(self, ids: list[int]) -> list[int]:
        """The last tokens of a sequence, as many as `max_length` allows."""
        if len(ids) > self.max_length + 1:
            _logger.warning("patchkit: a text of %d tokens is cut to its last %d, where positions end", len(ids), self.max_length)
        return ids[-(self.max_length + 1) :]

    def _last_logits(self, rows: list[list[int]], counts: list[int]) -> list[torch.Tensor]:
        """Logits [n, V] of the last n = ``counts[i]`` tokens of each row, all rows through one cache, padded on the right.

        A token sees none that come after it, so padding there changes nothing.
        """
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        takes_keep = "logits_to_keep" in _compat.argument_names(self.model)
        found: list[list[torch.Tensor]] = [[] for _ in rows]
        cache = None
        for start in range(0, longest, self.chunk):
            stop = min(start + self.chunk, longest)
            wanted = [(max(len(row) - count, start), min(len(row), stop)) for row, count in zip(rows, counts, strict=True)]
            first = min((low for low, high in wanted if low < high), default=stop - 1)
            keep = {"logits_to_keep": stop - first} if takes_keep else {}
            with torch.no_grad(), torch.autocast(self.device.type, self.mixed_precision_dtype, enabled=bool(self.mixed_precision_dtype)):
                out = self.model(input_ids=ids[:, start:stop], use_cache=True, **{_compat.CACHE: cache}, **keep)
            cache = _compat.cache_of(out)
            if cache is None and stop < longest:
                raise UnsupportedModel(f"{type(self.model).__name__} returns no cache to stream through: give a larger chunk")
            shown = stop - out.logits.shape[1]
            for row, (low, high) in enumerate(wanted):
                if low < high:
                    found[row].append(out.logits[row, low - shown : high - shown])
        return [torch.cat(parts) for parts in found]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        tokens = super()._model_generate(context, max_length, stop, **options)
        made = (tokens[:, context.shape[1] :] != self.tokenizer.pad_token_id).sum(1)
        mask = options.get("attention_mask", torch.ones_like(context))
        for prompt, new in zip(mask.sum(1).tolist(), made.tolist(), strict=True):
            self._activity.count(prompt - 1, new)
        return tokens

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Find a batch size, at the length that the model was made for if no request gives one."""
        with length_set_to(self, length_asked(self) or (None if requests else super().max_length)):
            return super()._detect_batch_size(requests, pos)

    # -- what the patches did ----------------------------------------------------------------------------------------------

    def _counted(self, method: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        """Answer the requests, those of each task together, and record what the patches did in it.

        Raises:
            NeverActed: a patch did nothing in a task.
        """
        tasks: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            tasks.setdefault(request.task_name or "task", []).append(index)
        answers: list[Any] = [None] * len(requests)
        found = {}
        for task, indices in tasks.items():
            before = self._activity.counters()
            for index, answer in zip(indices, method([requests[index] for index in indices], disable_tqdm=disable_tqdm), strict=True):
                answers[index] = answer
            found[task] = {name: counts - before[name] for name, counts in self._activity.counters().items()}
        self._activity.record(self._of_all_processes(found))
        return answers

    def _of_all_processes(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        if self.world_size == 1:
            return [found]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, found)
        return gathered


def has_position_table(model: nn.Module, rows: int) -> bool:
    """Whether positions index a table that ends after ``rows`` of them (some models keep up to two rows more)."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    return any(table.ndim == 2 and rows <= table.shape[0] <= rows + 2 for table in [*tables, *model.buffers()])
