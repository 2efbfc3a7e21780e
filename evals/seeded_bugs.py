# ruff: noqa: E402  (the path is set before patchkit is imported)
"""Seed bugs into copies of the tree, and count those that the fast layer of the tests catches. Writes evals/results/seeded_bugs.json.

    python evals/seeded_bugs.py                         # make seeded-bugs
    python evals/seeded_bugs.py --only "window one token too long" --only "sinks rotated the wrong way"

Each bug is one edit of patchkit's own code, made in a copy of the tree. In the copy, the fast layer (no case of the matrix) of the test
files named with the bug runs up to its first failure. Naming files keeps this affordable, and is stricter than the whole layer: a bug that
one of these files catches is caught by the whole layer too. At the end the tests that failed are run on an unedited copy, where they have
to pass. The exit status is 1 if a bug escapes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from patchkit.measure.environment import environment

RESULTS = ROOT / "evals" / "results" / "seeded_bugs.json"
# For the tests of one bug; a fast layer that hangs has not caught it.
LIMIT_S = 1800


@dataclass(frozen=True)
class Bug:
    """``old``, which is in patchkit/ exactly once, becomes ``new``; ``tests`` are the files that have to notice."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


STREAMING = ("tests/patches/test_streaming.py",)
KV_INT8 = ("tests/patches/test_kv_int8.py",)
GENERATE = ("tests/patches/test_streaming_generate.py",)
COMPILE = ("tests/patches/test_compile.py",)
LINEAR = ("tests/patches/test_linear.py",)
INT8 = ("tests/patches/test_mlp_int8.py", "tests/int8/test_weight.py", "tests/test_contract.py")
INT4 = ("tests/int4/test_rounding.py", "tests/kernels/test_int4_linear.py", "tests/patches/test_int4.py")
EXACT = ("tests/speculation/test_exact.py",)
SCHEDULED = ("tests/speculation/test_scheduler.py",)
CONSTRAINED = ("tests/grammar/test_grammar.py", "tests/speculation/test_constrained.py")
ANSWERS, CONCURRENT = ("tests/serving/test_answers.py",), ("tests/serving/test_concurrent.py",)
FAULTS, DTYPES = ("tests/faults/test_edited_models.py",), ("tests/faults/test_dtypes.py",)
VERIFIED = ("tests/kernels/test_verify_prefix.py", "tests/kernels/test_op.py")
CONTRACT = ("tests/test_contract.py",)

BUGS = [
    # -- streaming
    Bug("window one token too long", "return key > query - self.window", "return key >= query - self.window", STREAMING),
    Bug("sinks one position off", "(self.plan.main.reach - 1)).clamp(min=0)", "self.plan.main.reach).clamp(min=0)", STREAMING),
    Bug(
        "sinks rotated the wrong way",
        "rotated = torch.addcmul(raw * cos.to(k.device), quarter, sin.to(k.device))",
        "rotated = torch.addcmul(raw * cos.to(k.device), quarter, -sin.to(k.device))",
        STREAMING,
    ),
    Bug(
        "window rotated the wrong way when positions begin anew",
        "layer.rotate_window(cos, sin)",
        "layer.rotate_window(cos, -sin)",
        STREAMING,
    ),
    Bug("steps of fused optimizers are not seen", "watch.steps += 1", "watch.steps += 0", ("tests/test_freshness.py",)),
    Bug("causal mask lost", "(row >= 0) & (key <= query) & (rule", "(row >= 0) & (rule", STREAMING),
    Bug("left padding ignored", "        stream.set_pads(pads)\n", "        pass\n", STREAMING),
    Bug(
        "ring one slot too short",
        "in_ring = self.sinks + (token - self.sinks) % self.window",
        "in_ring = self.sinks + (token - self.sinks) % max(1, self.window - 1)",
        STREAMING,
    ),
    Bug(
        "rollback forgets one token",
        "first = max(seen - count, rule.capacity)",
        "first = max(seen - count + 1, rule.capacity)",
        STREAMING,
    ),
    Bug(
        "sinks stay with their row when rows are reordered",
        "self.unrotated = UnrotatedSinks(*map(index, self.unrotated))",
        "pass",
        STREAMING,
    ),
    Bug(
        "copied cache shares its state",
        "vars(copied).update(copy.deepcopy(vars(self), memo))",
        "vars(copied).update(vars(self))",
        (*STREAMING, "tests/patches/test_refresh.py"),
    ),
    Bug(
        "keys in int8 keep a rotation",
        "lambda tokens: -self.position_ids())",
        "lambda tokens: -self.position_ids() // 2)",
        KV_INT8,
    ),
    Bug(
        "slots in int8 are seen at distances that the model does not know",
        "self.turn * (turns - (rows + self.far) // self.turn).clamp(min=0)",
        "0 * (turns - (rows + self.far) // self.turn).clamp(min=0)",
        KV_INT8,
    ),
    Bug(
        "a scale in int8 is cut off, not rounded",
        "bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000",
        "bits = bits & -0x10000",
        ("tests/kernels/test_op.py",),
    ),
    # -- linear attention
    Bug(
        "boundary token counted in window and state",
        "near = key > query - self.softmax_window",
        "near = key >= query - self.softmax_window",
        LINEAR,
    ),
    Bug(
        "state of linear attention not reset",
        "self.state = self.normalizer = None",
        'self.state, self.normalizer = getattr(self, "state", None), getattr(self, "normalizer", None)',
        LINEAR,
    ),
    # -- int8
    Bug(
        "int8 scale of another channel",
        "return int8_linear(x, self.qdata, self.scale, bias, self.activation)",
        "return int8_linear(x, self.qdata, self.scale.roll(1), bias, self.activation)",
        INT8,
    ),
    Bug(
        "int8 bias dropped",
        "return int8_linear(x, self.qdata, self.scale, bias, self.activation)",
        "return int8_linear(x, self.qdata, self.scale, None, self.activation)",
        INT8,
    ),
    Bug(
        "experts stay int8 after unpatching",
        "handle.set_attribute(self.module, _WEIGHTS, self.weights)",
        "vars(self.module)[_WEIGHTS] = self.weights",
        INT8,
    ),
    # -- int4
    Bug(
        "int4 halves of a byte exchanged",
        "halves[:, :, :, 0] | halves[:, :, :, 1] << 4",
        "halves[:, :, :, 1] | halves[:, :, :, 0] << 4",
        INT4,
    ),
    Bug("int4 inputs count alike", "layer.squares = squares.get(layer.name)", "layer.squares = None", INT4),
    Bug("int4 grids with a negative scale are not found", "_shifted, span, first, sign)", "_shifted, span, first, abs(sign))", INT4),
    # -- compile
    Bug("compiled steps keep a stale mask", "step.masks_open = full", "step.masks_open = True", COMPILE),
    Bug(
        "compiled steps do not count what they stored",
        "layer.seen += tokens",
        "layer.seen += tokens if tokens > 1 else tokens * (layer.seen % 7 > 0)",
        COMPILE,
    ),
    # -- speculation
    Bug(
        "one draft too many accepted",
        "return choice, ((draft == choice[:, :-1]) & drafted).cumprod(1).sum(1)",
        "return choice, (((draft == choice[:, :-1]) & drafted).cumprod(1).sum(1) + 1).clamp(max=counts)",
        VERIFIED,
    ),
    Bug(
        "one draft too many accepted on a CPU",
        "if tokens[i] != right[i]), count) for tokens, right, count in rows]",
        "if tokens[i] != right[i] and i % 3 != 2), count) for tokens, right, count in rows]",
        EXACT,
    ),
    Bug(
        "token after the drafts is the last position's",
        "[chosen[: n + 1] for chosen, n in zip(choice.tolist(), accepted.tolist(), strict=True)]",
        "[[*chosen[:n], chosen[-1]] for chosen, n in zip(choice.tolist(), accepted.tolist(), strict=True)]",
        EXACT,
    ),
    Bug("a parser keeps what it should roll back", "self.parser.rollback(len(known) - common)", "self.parser.rollback(0)", CONSTRAINED),
    Bug("of several allowed tokens the last is taken for forced", "None if bits & (bits - 1) else", "None if bits == 0 else", CONSTRAINED),
    Bug("drafts that fell are kept in the cache", "self.cache.keep(count, counts)", "self.cache.keep(count, [count] * len(counts))", EXACT),
    Bug(
        "rows that go on take the places of those that ended",
        "self.rows = [self.rows[row] for row in rows]",
        "self.rows = self.rows[: len(rows)]",
        EXACT,
    ),
    Bug(
        "a row that fills a hole leaves its keys behind",
        "buffer[to, :, : self.seen] = buffer[row, :, : self.seen]",
        "buffer[to, :, : self.seen] = buffer[to, :, : self.seen]",
        SCHEDULED,
    ),
    Bug(
        "a batch that does not join keeps the row that it was lent",
        "                layer.enlarge(layer.room)\n",
        "                pass\n",
        ("tests/grammar/test_scheduled.py",),
    ),
    Bug(
        "the salt of nobody is found",
        'return _salts.get().get(id(self), "")',
        'return next(iter(_salts.get().values()), "a")',
        ("tests/prefix/test_scheduled.py",),
    ),
    Bug(
        "a row that joins has the length of the batch",
        "lengths = self._each_length() + other._each_length()",
        "lengths = self._each_length() + [self.layers[0].seen]",
        SCHEDULED,
    ),
    Bug(
        "a row with a seed is drafted by draws",
        "all(row.sampled and row.generator is None for row in self.rows)",
        "all(row.sampled for row in self.rows)",
        SCHEDULED,
    ),
    Bug(
        "the best paths of a tree are the least likely",
        "heapq.heappush(waiting, (-probability * chance,",
        "heapq.heappush(waiting, (probability * chance,",
        ("tests/speculation/test_trees.py",),
    ),
    Bug(
        "a token that comes twice has its last successors",
        "self._matrix.numpy()[tokens.cpu().numpy()[::-1], : likeliest.shape[1]] = likeliest.cpu().numpy()[::-1]",
        "self._matrix.numpy()[tokens.cpu().numpy(), : likeliest.shape[1]] = likeliest.cpu().numpy()",
        ("tests/speculation/test_token_recycling.py",),
    ),
    Bug(
        "heads get the outputs of three layers in another order",
        "outputs = [speculation.outputs[index] for index in speculation.layers]",
        "outputs = [speculation.outputs[index] for index in reversed(speculation.layers)]",
        ("tests/speculation/test_eagle3.py",),
    ),
    Bug(
        "embeddings that share the head's weight are rounded in a checkpoint",
        "self.original if keep_original or self.shared else None",
        "self.original if keep_original else None",
        ("tests/patches/test_int8.py",),
    ),
    Bug(
        "rejected token drawn from the target",
        "weights = torch.where(((accepted < counts) & residual.any(1))",
        "weights = torch.where(((accepted > counts) & residual.any(1))",
        VERIFIED,
    ),
    Bug(
        "rejected token drawn from the target on a CPU",
        "residual = np.maximum(weights - q[row, length], 0)",
        "residual = np.maximum(weights - 0 * q[row, length], 0)",
        ("tests/speculation/test_sampling.py",),
    ),
    Bug(
        "drawn drafts accepted a little too often",
        "(known & (accept_draws * q < p))",
        "(known & (accept_draws * q < 1.25 * p))",
        VERIFIED,
    ),
    Bug(
        "drawn drafts accepted a little too often on a CPU",
        "uniform[row, length] * q[row, length, token] < p[row, length, token])",
        "uniform[row, length] * q[row, length, token] < 1.25 * p[row, length, token])",
        ("tests/speculation/test_sampling.py",),
    ),
    Bug(
        "end of text overlooked inside a draft",
        "            if self.rows[row].finish is not None:\n",
        "            if count == len(new) and self.rows[row].finish is not None:\n",
        EXACT,
    ),
    Bug("stop strings ignored", "self.others.append(each)", "continue", ("tests/speculation/test_generate.py",)),
    # -- serving
    Bug("a choice that is generated again is shown again", "if position < self.taken:", "if position < 0:", CONCURRENT),
    Bug("a client that leaves keeps its row", "self._release(choice, choice.row)", "pass", CONCURRENT),
    Bug("all choices have the seed of the first", "(seed + len(choices) + 2**63) % 2**64 - 2**63", "seed", ANSWERS),
    Bug("parts of characters are shown", "if not after.endswith(_INCOMPLETE):", "if True:", ("tests/serving/test_shown.py",)),
    Bug("penalties count the prompt", "new = input_ids[:, self.prompt :]", "new = input_ids", ANSWERS),
    # -- patching
    Bug(
        "a hook stays after unpatching",
        "self._steps.append(functools.partial(_remove_hook, module.register_forward_pre_hook(fn, **kw)))",
        "module.register_forward_pre_hook(fn, **kw)",
        CONTRACT,
    ),
    Bug(
        "the alias of the attention function stays in the config",
        "            _restore(obj, name, found.original)\n",
        "            pass\n",
        CONTRACT,
    ),
    Bug(
        "a model's alias goes while another one still needs it",
        "        if found.values:\n",
        "        if not found.values:\n",
        ("tests/faults/test_generate.py",),
    ),
    Bug(
        "a patched model runs in two threads",
        "            if self._owner is not None and self._owner is not thread and _is_running(self._owner, module):\n",
        "            if False:\n",
        FAULTS,
    ),
    Bug("hooks that come later are not compiled", "if self.compiled and now != self.seen:", "if False:", FAULTS),
    Bug("a layer with hooks shares its graph", "own = index if index in steps.hooked else None", "own = None", FAULTS),
    Bug("frequencies are those of the patching", "        if now != self.read:\n", "        if False:\n", DTYPES),
    Bug(
        "what inference mode has made is written to",
        "        if torch.is_inference_mode_enabled() or not self.stream.in_inference:\n",
        "        if True:\n",
        DTYPES,
    ),
    Bug(
        "native output in the default dtype",
        "y = torch.empty(*x.shape[:-1], n, dtype=torch.float32, device=x.device)\n    addresses = rows.data_ptr(), weight.data_ptr(), sc",
        "y = torch.empty(*x.shape[:-1], n)\n    addresses = rows.data_ptr(), weight.data_ptr(), sc",
        DTYPES,
    ),
    Bug(
        "the third option of a spec is dropped",
        "for argument in node.keywords:",
        "for argument in node.keywords[:2]:",
        ("tests/test_patch.py",),
    ),
    # -- prefix cache
    Bug("a state that is kept is written to", "in copied(state).items():", "in state.items():", ("tests/prefix/test_exact.py",)),
    Bug(
        "changed weights find what was kept",
        "        stamp = self.weights.stamp()\n",
        "        stamp = None\n",
        ("tests/prefix/test_prefix_cache.py",),
    ),
    Bug(
        "rows of equal prompts are given to the wrong rows",
        "        repeat_rows(cache, order)\n",
        "        repeat_rows(cache, sorted(order))\n",
        ("tests/prefix/test_exact.py",),
    ),
    Bug(
        "a file is read whatever tokens it holds",
        ' or _bytes_of(tensors["tokens"]) != tokens:',
        ":",
        ("tests/prefix/test_disk.py",),
    ),
    Bug(
        "files do not depend on converted attention",
        "for module in (self.model, *parts) for tensor in",
        "for module in (self.model,) for tensor in",
        ("tests/prefix/test_disk.py",),
    ),
    Bug(
        "a scheduler that is never idle writes no suffixes",
        "self.store.unwritten >= _TEXTS_PER_WRITE",
        "self.store.unwritten < 0",
        ("tests/speculation/test_suffix.py",),
    ),
    # -- gates
    Bug(
        "a gate passes when its interval reaches below the bound",
        "not speedup.low >= bounds.min_speedup",
        "not speedup.high >= bounds.min_speedup",
        ("tests/gates/test_gate.py",),
    ),
    Bug("a gate never fails", "failures=failures + violations(", "failures=[] and violations(", ("tests/gates/test_gate.py",)),
    # -- learning
    Bug(
        "patches act in training forwards without a cache",
        "return not module.training or (cache is not None and not torch.is_grad_enabled())",
        "return not module.training or not torch.is_grad_enabled()",
        ("tests/rl/test_training_mode.py", "tests/rl/test_view.py"),
    ),
    Bug(
        "a view is not renewed",
        "    refresh_if_due(views.derived, decoder, args, kwargs)\n",
        "",
        ("tests/rl/test_view.py",),
    ),
    Bug("a verdict may be used twice", "if verdict.nonce in self._nonces[step]:", "if False:", ("tests/rl/test_reward.py",)),
    Bug("a verdict of another step counts", "if verdict.step != step:", "if False:", ("tests/rl/test_reward.py",)),
    Bug(
        "log probabilities are those of the token before",
        "logits[:, -(new + 1) : -1].float() / temperature",
        "logits[:, -new:].float() / temperature",
        ("tests/rl/test_logprobs.py",),
    ),
]


@dataclass
class Found:
    """Result of one bug: the test that failed, the first line of its message, and seconds from the start of pytest."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    caught_by: str | None = None
    because: str = ""
    seconds: float = 0.0
    confirmed: bool = field(default=False)


def place_of(bug: Bug) -> Path:
    """File that contains ``bug.old``.

    Raises:
        SystemExit: none does, or it is there several times: the code has moved on, and the seed has to follow.
    """
    found = [(path, count) for path in sorted((ROOT / "patchkit").rglob("*.py")) if (count := path.read_text().count(bug.old))]
    if len(found) != 1 or found[0][1] != 1:
        places = ", ".join(f"{path.relative_to(ROOT)} ({count})" for path, count in found) or "no file"
        sys.exit(f"{bug.name}: {bug.old!r} must be in patchkit/ exactly once, and is in {places}. Bring this seed up to date")
    return found[0][0].relative_to(ROOT)


def copy_of_the_tree(place: Path) -> None:
    """Copy all files that git tracks or would track, as hard links where possible."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, place / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)


def run_tests(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the copy at ``place``, with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environ = {**os.environ, **threads, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=LIMIT_S)


def try_one(bug: Bug) -> Found:
    """Seed the bug into a copy and run its tests to the first failure."""
    file = place_of(bug)
    found = Found(bug.name, str(file), bug.old, bug.new, bug.tests)
    with tempfile.TemporaryDirectory(prefix="seeded-") as name:
        place = Path(name)
        copy_of_the_tree(place)
        seeded = (place / file).read_text().replace(bug.old, bug.new)
        (place / file).unlink()  # a hard link: the tree itself stays as it is
        (place / file).write_text(seeded)
        started = time.perf_counter()
        done = run_tests(place, "-x", *bug.tests)
        found.seconds = round(time.perf_counter() - started, 1)
    failed = re.search(r"^FAILED (\S+\.py::.*?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        found.caught_by, found.because = failed[1], (failed[2] or "").strip()
    elif done.returncode != 0:
        sys.exit(f"{bug.name}: pytest itself failed (exit status {done.returncode}), so nothing was tried\n{done.stdout}\n{done.stderr}")
    print(f"{found.seconds:6.1f} s  {bug.name}: {found.caught_by or 'ESCAPED'}", flush=True)
    return found


def confirm(all_found: list[Found]) -> None:
    """Run the tests that failed on a copy without any bug, and record whether they pass."""
    caught = [found for found in all_found if found.caught_by]
    with tempfile.TemporaryDirectory(prefix="unseeded-") as name:
        copy_of_the_tree(Path(name))
        done = run_tests(Path(name), *sorted({str(found.caught_by) for found in caught}))
    failed = set(re.findall(r"^FAILED (\S+\.py::.*?)(?: - .*)?$", done.stdout, re.MULTILINE))
    if done.returncode not in (0, 1):
        sys.exit(f"the tests did not run on the unedited copy (exit status {done.returncode})\n{done.stdout}\n{done.stderr}")
    for found in caught:
        found.confirmed = found.caught_by not in failed
        if not found.confirmed:
            print(f"{found.caught_by} fails without any bug, so it is no evidence about {found.bug!r}")


def main() -> int:
    """Try all bugs, print a line for each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="BUG", help="this bug only; may be given several times; nothing is written")
    parser.add_argument("--jobs", type=int, default=2, help="bugs that are tried at once (default: 2)")
    given = parser.parse_args()
    unknown = set(given.only or ()) - {bug.name for bug in BUGS}
    if unknown:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}. There are: {'; '.join(bug.name for bug in BUGS)}")
    bugs = [bug for bug in BUGS if not given.only or bug.name in given.only]
    for bug in bugs:
        place_of(bug)
    started = time.perf_counter()
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(try_one, bugs))
    confirm(found)
    caught = sum(each.confirmed for each in found)
    minutes = (time.perf_counter() - started) / 60
    print(f"{caught} of {len(found)} seeded bugs are caught by the fast layer, in {minutes:.1f} minutes")
    if not given.only:
        result = {
            "command": "python evals/seeded_bugs.py",
            "caught": caught,
            "bugs": len(found),
            "minutes": round(minutes, 1),
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "environment": environment(),
            "results": [asdict(each) for each in found],
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if caught == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
