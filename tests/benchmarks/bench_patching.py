"""What patching itself costs: time, copies of weights, and the import."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from patchkit import patch_model, unpatch_model


def test_patch_and_unpatch(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    model = pythia("410m")
    weights = [p.data_ptr() for p in model.parameters()]

    def there_and_back() -> float:
        started = time.perf_counter()
        patch_model(model, "streaming", verbose=False)
        patched_at = [p.data_ptr() for p in model.parameters()]
        unpatch_model(model)
        elapsed = time.perf_counter() - started
        assert patched_at == weights == [p.data_ptr() for p in model.parameters()]
        return elapsed

    first = there_and_back()
    times = benchmark.pedantic(lambda: [there_and_back() for _ in range(7)], rounds=1, iterations=1)
    seconds = statistics.median(times)
    record("patch_and_unpatch", seconds, "<= 0.5", what="seconds to patch and unpatch streaming on a Pythia-410m shape, fp32", first=first)
    assert seconds <= 0.5


# `import patchkit` is lazy and would win by doing nothing, so its names are imported too. Both libraries are lazy: the fair
# comparison for the names is with a model class, which whoever has a model to patch has imported.
IMPORTS = {
    "package": ("import transformers", "import patchkit"),
    "names": ("from transformers import GPTNeoXForCausalLM", "from patchkit import StreamingLLM, patch_model, report, unpatch_model"),
}


def test_import_time(benchmark: Any, record: Callable[..., None]) -> None:
    def added(before: str, what: str) -> float:
        code = f"import time, json\n{before}\nstarted = time.perf_counter()\n{what}\nprint(json.dumps(time.perf_counter() - started))"
        return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    def measure() -> dict[str, float]:
        return {name: statistics.median(added(*statements) for _ in range(5)) for name, statements in IMPORTS.items()}

    seconds = benchmark.pedantic(measure, rounds=1, warmup_rounds=1, iterations=1)
    record(
        "import_time",
        max(seconds.values()),
        "<= 0.3",
        what="seconds that importing patchkit, and its names, adds to importing transformers",
        **seconds,
    )
    assert max(seconds.values()) <= 0.3
