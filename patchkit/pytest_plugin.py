"""pytest plug-in with one fixture, `patch_gate`: a performance and quality gate on top of pytest-benchmark.

    def test_streaming_is_faster(patch_gate, model):
        patch_gate(model, "streaming(window=1020)", context=16384, min_speedup=4, max_ppl_increase=0.03)

A gate fails where it could not measure: under --benchmark-skip, --benchmark-disable and pytest-xdist (which disables benchmarks), without
pytest-benchmark, if the test never calls it, or if the patch never acts. Importing this loads neither torch nor patchkit's modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from patchkit.gates.result import Gate
    from patchkit.patch import Patch


class PatchGate:
    """The fixture `patch_gate`; called once per test."""

    def __init__(self, benchmark: Any) -> None:
        self.benchmark = benchmark
        self.called = False

    def __call__(
        self,
        model: PreTrainedModel,
        patches: Patch | str | Sequence[Patch | str],
        *,
        min_speedup: float | None = None,
        max_ppl_increase: float | None = None,
        context: int | None = None,
        rounds: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        documents: Sequence[str | Sequence[int]] | None = None,
    ) -> Gate:
        """Measure the patched model against the unpatched one, and fail the test unless every bound is shown to hold.

        Bounds are those of `patchkit.gates.result.Bounds`, other arguments those of `run_gate`. The figures are in the benchmark's
        `extra_info["patch_gate"]`, and with `--benchmark-json=FILE` in that file, for `patchkit gate`.
        """
        if self.called:
            pytest.fail("patch_gate was called before in this test: one gate per test, use pytest.mark.parametrize", pytrace=False)
        self.called = True
        if not self.benchmark.enabled:
            pytest.fail(
                "patch_gate measured nothing, because benchmarks are disabled: run without --benchmark-disable and without -n",
                pytrace=False,
            )
        from patchkit.errors import PatchError
        from patchkit.gates import gate

        try:
            bounds = gate.Bounds(min_speedup, max_ppl_increase)
            found = gate.run_gate(model, patches, bounds, context, rounds, tokenizer, documents, self.benchmark.pedantic)
        except PatchError as error:
            pytest.fail(f"patch_gate: {error}", pytrace=False)
        # pytest-benchmark has timed all rounds as one; its tables should show the patched model.
        self.benchmark.stats.stats.data[:] = [ms / 1000 for ms in found.rounds_ms[gate.PATCHED]]
        self.benchmark.extra_info["patch_gate"] = found.to_dict()
        if found.failures:
            pytest.fail("\n".join([f"patch_gate: {found}", *found.failures]), pytrace=False)
        return found


class _WithBenchmark:
    @pytest.fixture
    def patch_gate(self, benchmark: Any) -> Iterator[PatchGate]:
        """Fail unless a patch is as fast and as good as demanded; patchkit.pytest_plugin has the arguments."""
        gate = PatchGate(benchmark)
        yield gate
        if not gate.called and not benchmark.skipped:
            pytest.fail("the test took the fixture patch_gate and never called it, so nothing was measured", pytrace=False)


class _WithoutBenchmark:
    @pytest.fixture
    def patch_gate(self) -> None:
        """Needs pytest-benchmark."""
        pytest.fail("patch_gate needs pytest-benchmark, which is not active: pip install patchkit[gates]", pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    active = config.pluginmanager.hasplugin("benchmark") or config.pluginmanager.hasplugin("pytest_benchmark.plugin")
    config.pluginmanager.register(_WithBenchmark() if active else _WithoutBenchmark(), "patchkit_gate")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    # pytest-benchmark skips every benchmark, and a skipped gate would look green.
    skipping = item.config.getoption("benchmark_skip", False) and not item.config.getoption("benchmark_only", False)
    if skipping and "patch_gate" in getattr(item, "fixturenames", ()):
        pytest.fail("patch_gate measured nothing, because of --benchmark-skip: run gates without it, or deselect them", pytrace=False)
    return (yield)
