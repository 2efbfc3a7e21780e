"""A real pretrained model, SmolLM2-135M-Instruct; not measured, with the reason, where it is not installed.

identity  greedy answers in float32, at most 64 tokens: every exact patch must give the tokens of the unpatched model
speed     greedy answers in bf16 through the chat template, each spec interleaved with plain decoding on each prompt: ms per token from
          the first token to the last
demo      `patchkit demo smollm2` in bf16: perplexity of streaming / unpatched within and beyond the model's 8192 positions, ms per token
          by context, keys recalled
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evals.answers import PLAIN, answer, compared, interleaved, median_of, prompt_ids
from evals.gpu.rows import Cases, NotMeasured, Row
from evals.gpu.sizes import Sizes
from evals.prompts import EDITS, STORIES, WARM_UP
from patchkit import patch_model, report
from patchkit.models import SMOLLM2, ModelUnavailable, load_model, smollm2_gguf
from patchkit.views import twin

# Each compiled one takes half a minute to compile.
EXACT = ("speculative", "streaming(window=4092)", "compile", "compile(cudagraphs=True)", "streaming(window=4092) + speculative + compile")
# The most important first, in case the time runs out.
TIMED = (
    "compile(cudagraphs=True)",
    "speculative",
    "streaming(window=508)",
    "streaming(window=508) + compile(cudagraphs=True)",
    "mlp_int8(mode=weight_only) + compile(cudagraphs=True)",
    "speculative + compile(cudagraphs=True)",
    "mlp_int8(mode=weight_only)",
)


def smollm2(sizes: Sizes, device: torch.device) -> Cases:
    """Cases of the real model; with tiny sizes those of a bundled model, in few tokens."""
    if sizes.smollm2_tokens is None:
        try:
            smollm2_gguf()
        except ModelUnavailable as error:
            yield "smollm2", functools.partial(not_measured, str(error).splitlines()[0])
            return
        yield from cases(lambda: load_model(SMOLLM2), device)
    else:
        few = sizes.smollm2_tokens
        load = functools.partial(load_model, "stdlib-1m-draft")
        yield from cases(load, device, ("speculative",), ("streaming(window=28)",), few, demo=False)


def not_measured(reason: str) -> Row:
    """A case that cannot run here."""
    raise NotMeasured(reason)


def cases(
    load: Callable[[], tuple[Any, Any]],
    device: torch.device,
    exact: Sequence[str] = EXACT,
    timed: Sequence[str] = TIMED,
    new_tokens: int = 64,
    demo: bool = True,
) -> Cases:
    """Cases of one model.

    Args:
        load: returns the model in float32, and its tokenizer; called when the first case runs.
        exact: specs whose answers must equal the unpatched ones.
        timed: specs to time.
        new_tokens: the most tokens of an answer.
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
    """The model in float32 and in bf16 on the device, each loaded when first needed, and the prompts."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device, new_tokens: int) -> None:
        self.load, self.device, self.new_tokens = load, device, new_tokens

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model in float32, and its tokenizer."""
        model, tokenizer = self.load()
        return model.to(self.device).eval(), tokenizer

    @functools.cached_property
    def half(self) -> Any:
        """Model in bf16, to be timed."""
        model, _ = self.load()
        return model.to(self.device, torch.bfloat16).eval()

    def prompts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Token ids of each text through the chat template."""
        return [prompt_ids(self.loaded[1], text).to(self.device) for text in texts]

    def answers(self, view: Any) -> list[list[int]]:
        """Greedy answers to three edits and three stories."""
        texts = self.prompts((*EDITS[:3], *STORIES[:3]))
        return [answer(view, ids, self.new_tokens).ids for ids in texts]

    @functools.cached_property
    def right(self) -> list[list[int]]:
        """Answers of the unpatched model in float32."""
        return self.answers(self.loaded[0])

    def identical(self, spec: str) -> Row:
        """Answers with an exact patch, compared with the unpatched model's."""
        view = patch_model(twin(self.loaded[0]), spec, verbose=False)
        found = self.answers(view)
        unequal = [index for index, (a, b) in enumerate(zip(found, self.right, strict=True)) if a != b]
        hits = {f"{patch.name}: {key}": value for patch in report(view).patches for key, value in patch.hits.items()}
        row: Row = {"spec": spec, "answers": len(found), "tokens": sum(map(len, found)), "hits": hits}
        return {**row, "message": f"answers {unequal} differ from the unpatched model's"} if unequal else row

    def timed(self, spec: str) -> Row:
        """Milliseconds per token with a spec, on stories and on edits."""
        ways = {PLAIN: self.half, spec: patch_model(twin(self.half), spec, verbose=False)}
        row: Row = {"spec": spec}
        for view in ways.values():
            for text in self.prompts((WARM_UP, EDITS[0])):
                answer(view, text, 24)
        for group, texts in (("stories", STORIES), ("edits", EDITS)):
            prompts = self.prompts(texts)
            found = interleaved(ways, prompts, self.new_tokens, rounds=2)
            row[group] = compared(found, spec, len(prompts)) | {"plain_ms_per_token": median_of(found[PLAIN])}
        row["hits"] = {f"{patch.name}: {key}": value for patch in report(ways[spec]).patches for key, value in patch.hits.items()}
        return row

    def demo(self) -> Row:
        """Figures and printed lines of the demo."""
        from patchkit.measure.demo import run_demo  # it needs rich, which the other cases do not

        demo = run_demo(self.half, self.loaded[1])
        times = [f"{row.name}: ms per token at {row.ms_per_token}, {row.cache_bytes} bytes" for row in demo.rows]
        return demo.to_dict() | {"found": [*demo.ratio_lines(), *demo.recall_lines(), *times]}
