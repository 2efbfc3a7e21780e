"""The section of evals/gpu.py on a real pretrained model, SmolLM2-135M-Instruct; skipped with the reason where it is not installed.

identity  greedy answers in float32, at most 64 tokens: every exact patch must give the tokens of the unpatched model
demo      `patchkit demo smollm2` in bf16: perplexity of streaming / unpatched within and beyond the model's 8192 positions, ms per token by
          context, keys recalled
speed     greedy answers in bf16 through the chat template, each way in turns with plain decoding on each prompt: ms per token from the
          first token to the last, as in evals/real.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from evals import real
from patchkit import patch_model, report
from patchkit.measure.demo import run_demo
from patchkit.views import twin

Row = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]

# Each compiled one takes half a minute to compile.
EXACT = ("speculative", "streaming(window=4092)", "compile", "compile(cudagraphs=True)", "streaming(window=4092) + speculative + compile")
# In order of interest, should the time run out.
TIMED = (
    "compile(cudagraphs=True)",
    "speculative",
    "streaming(window=508)",
    "streaming(window=508) + compile(cudagraphs=True)",
    "mlp_int8(mode=weight_only) + compile(cudagraphs=True)",
    "speculative + compile(cudagraphs=True)",
    "mlp_int8(mode=weight_only)",
)


def cases(
    load: Callable[[], tuple[Any, Any]],
    device: torch.device,
    exact: Sequence[str] = EXACT,
    timed: Sequence[str] = TIMED,
    new_tokens: int = 64,
    demo: bool = True,
) -> Cases:
    """The rows of the section.

    Args:
        load: gives the model in float32, and its tokenizer; called when the first row runs.
        exact: specs whose answers must be the unpatched ones.
        timed: specs to time.
        new_tokens: at most so many per answer.
        demo: whether to run the demo.
    """
    bench = Bench(load, device, new_tokens)
    for spec in exact:
        yield f"{spec}: greedy answers", functools.partial(bench.identical, spec)
    for spec in timed:
        yield f"{spec}: ms per token", functools.partial(bench.timed, spec)
    if demo:
        yield "demo", bench.demo


class Bench:
    """The model in float32 and in bf16 on the device, each loaded when first wanted, and the prompts."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device, new_tokens: int) -> None:
        self.load, self.device, self.new_tokens = load, device, new_tokens

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        model, tokenizer = self.load()
        return model.to(self.device).eval(), tokenizer

    @functools.cached_property
    def half(self) -> Any:
        """The model to time, in bf16."""
        model, _ = self.load()
        return model.to(self.device, torch.bfloat16).eval()

    def prompts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        return [real.prompt_ids(self.loaded[1], text).to(self.device) for text in texts]

    def answers(self, view: Any) -> list[list[int]]:
        """To some edits and stories."""
        texts = self.prompts((*real.EDITS[:3], *real.STORIES[:3]))
        return [real.answer(view, ids, self.new_tokens).ids for ids in texts]

    @functools.cached_property
    def right(self) -> list[list[int]]:
        """The unpatched model's answers in float32."""
        return self.answers(self.loaded[0])

    def identical(self, spec: str) -> Row:
        view = patch_model(twin(self.loaded[0]), spec, verbose=False)
        found = self.answers(view)
        unequal = [index for index, (a, b) in enumerate(zip(found, self.right, strict=True)) if a != b]
        hits = {f"{patch.name}: {key}": value for patch in report(view).patches for key, value in patch.hits.items()}
        row: Row = {"spec": spec, "answers": len(found), "tokens": sum(map(len, found)), "hits": hits}
        return {**row, "message": f"answers {unequal} are others than the unpatched model's"} if unequal else row

    def timed(self, spec: str) -> Row:
        ways = {real.PLAIN: self.half, spec: patch_model(twin(self.half), spec, verbose=False)}
        row: Row = {"spec": spec}
        for view in ways.values():
            for text in self.prompts((real.WARM_UP, real.EDITS[0])):
                real.answer(view, text, 24)
        for group, texts in (("stories", real.STORIES), ("edits", real.EDITS)):
            prompts = self.prompts(texts)
            found = real.in_turns(ways, prompts, self.new_tokens, rounds=2)
            row[group] = real.compared(found, spec, len(prompts)) | {"plain_ms_per_token": real.median_of(found[real.PLAIN])}
        row["hits"] = {f"{patch.name}: {key}": value for patch in report(ways[spec]).patches for key, value in patch.hits.items()}
        return row

    def demo(self) -> Row:
        demo = run_demo(self.half, self.loaded[1])
        times = [f"{row.name}: ms per token at {row.ms_per_token}, {row.cache_bytes} bytes" for row in demo.rows]
        return demo.to_dict() | {"found": [*demo.ratio_lines(), *demo.recall_lines(), *times]}
