"""patchkit's patches, each on a view of the same weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from generating import Timed, bytes_per_pass, generate, load, way_of
from peer import Answer, Clock, Made, Way

from patchkit import parse_spec, patch_model
from patchkit.speculation import reset_statistics, statistics_of
from patchkit.speculation.heads import load_heads
from patchkit.static_step import LEAST_ROOM
from patchkit.views import twin

SINKS, WINDOW, SLOTS = 4, 508, 432


def ways(made: Made) -> dict[str, Callable[[], Way]]:
    loaded = functools.cache(functools.partial(load, made.model))
    specs = [
        f"streaming(sinks={SINKS}, window={WINDOW})",
        f"memory(slots={SLOTS})",  # in fewer bytes than that window
        "mlp_int8",
        "compile",
        # A compiled step reads the whole ring, filled or not: what that costs where the text is short.
        f"streaming(sinks={SINKS}, window={WINDOW}) + compile",
        f"streaming(sinks={SINKS}, window=2044) + compile",
        "mlp_int8 + compile",
        f"streaming(sinks={SINKS}, window={WINDOW}) + mlp_int8 + compile",
        "speculative",
        "speculative(draft=suffix(scope=call))",
        "gemv",
        "gemv + speculative(draft=suffix(scope=call))",
        "int8(scope='all+head')",
        "int8(scope='all+head') + speculative(draft=suffix(scope=call))",
        "int8(scope='all+head') + compile",
        f"streaming(sinks={SINKS}, window={WINDOW}) + int8(scope='all+head') + compile",
        "int8(scope='all+head') + speculative(draft=suffix(scope=call)) + compile",
        "mlp_int8 + speculative(draft=suffix(scope=call)) + compile",
        "mlp_int8 + gemv + speculative(draft=suffix(scope=call))",
    ]
    named = {spec: spec for spec in specs} | {
        f"{before}speculative (EAGLE heads)": f'{before}speculative(draft=eagle("{made.heads}"))' for before in ("", "gemv + ")
    }
    tuned = made.spec.read_text().strip().splitlines()[-1] if made.spec.exists() else None
    if tuned is not None:
        named[f"tune's choice: {tuned}"] = tuned
    return {
        "unpatched": lambda: way_of(loaded(), cache=True),
        **{name: functools.partial(patched, loaded, spec, made) for name, spec in named.items()},
    }


def patched(loaded: Callable[[], Any], spec: str, made: Made) -> Way:
    view = patch_model(twin(loaded()), spec, verbose=False)
    window = next((patch.capacity for patch in parse_spec(spec) if patch.name == "streaming"), None)
    dtype = "all int8" if "all+head" in spec else "MLP int8" if "mlp_int8" in spec else "float32"
    compiled = "compile" in spec
    # A compiled step reads the whole cache: the ring of a window, or the room that a text begins with.
    slots = (window or LEAST_ROOM) if compiled else None
    plain = way_of(
        view,
        counted=not compiled,
        window=window,
        slots=slots,
        dtype=dtype,
        cache=spec.startswith(("streaming", "memory")) and "+" not in spec,
    )
    if "speculative" not in spec:
        return plain
    # What one draft of the heads reads: their own weights, and the model's head.
    per_draft = 0
    if "eagle" in spec:
        heads = load_heads(made.heads)
        per_draft = sum(tensor.nbytes for tensor in heads.state_dict().values()) + view.get_output_embeddings().weight.nbytes

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        reset_statistics(view)
        clock = Clock()
        ids = generate(view, prompt, new_tokens, Timed(clock))
        # A round is a pass; a hook that counted them would make compiled steps compile again.
        rounds = statistics_of(view).steps
        drafts = sum(max(step.proposed) for step in rounds)
        return dataclasses.replace(clock.answer(ids, drafting_bytes=drafts * per_draft), forwards=len(rounds))

    return Way(answer, bytes_per_pass(view), plain.kv_bytes, dtype, window, slots)
