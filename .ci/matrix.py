"""Which test files' matrix CI runs after the fast layer: those of the folders that changed, as far as they fit into its time.

    python3 .ci/matrix.py [BASE]        # prints the files; on stderr, what is left to `make test-all`, and why

BASE is the commit to compare with; left out, it is where this branch left origin/main, and on main itself the commit before. What a file
costs is in .ci/seconds.json, as CPU seconds of the machine that wrote it (`make seconds`, some 40 minutes); a file that is not there costs
UNKNOWN_CPU_SECONDS.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# CI may be half as fast as the machine that wrote the seconds, with two workers: 40 minutes there.
MOST_CPU_SECONDS = 2400
UNKNOWN_CPU_SECONDS = 200
# The first prefix that a changed path has says whose matrix it concerns; a test file concerns its own.
CONCERNS = {
    "patchkit/kernels/": ["tests/kernels/", "tests/test_gpu_script.py"],
    "patchkit/speculation/": ["tests/speculation/"],
    "patchkit/linear/": ["tests/linear/", "tests/patches/test_linear.py"],
    "patchkit/training/": ["tests/training/", "tests/speculation/test_heads.py"],
    "patchkit/rl/": ["tests/rl/"],
    "patchkit/int8/": ["tests/int8/", "tests/patches/test_mlp_int8.py"],
    "patchkit/int4/": ["tests/int4/", "tests/patches/test_int4.py"],
    "patchkit/quantised/": [
        "tests/int8/",
        "tests/int4/",
        "tests/patches/test_mlp_int8.py",
        "tests/patches/test_int4.py",
        "tests/rl/test_view.py",
    ],
    "patchkit/measure/": ["tests/measure/"],
    "patchkit/prove/": ["tests/prove/"],
    "patchkit/definitions/": ["tests/prove/"],
    "patchkit/search/": ["tests/search/"],
    "patchkit/gates/": ["tests/gates/"],
    "patchkit/bench/": ["tests/bench/"],
    "patchkit/serving/": ["tests/serving/"],
    "patchkit/lm_eval/": ["tests/lm_eval/"],
    "patchkit/cli/": ["tests/prove/", "tests/search/", "tests/gates/", "tests/lm_eval/"],
    "patchkit/models/": ["tests/models/", "tests/measure/"],
    "patchkit/patches/speculative.py": ["tests/speculation/", "tests/test_contract.py"],
    "patchkit/": ["tests/patches/", "tests/test_contract.py", "tests/speculation/"],
    "evals/": ["tests/test_gpu_script.py"],
    "docs/tutorial.md": ["tests/test_tutorial.py"],
    "pyproject.toml": ["tests/"],
    "constraints.txt": ["tests/"],
    "tests/support.py": ["tests/"],
    "tests/oracle.py": ["tests/patches/"],
    "tests/speculation.py": ["tests/speculation/"],
}


def concerned(path: str) -> list[str]:
    """Folders and files of tests whose matrix has to run when ``path`` has changed."""
    for prefix, tests in CONCERNS.items():
        if path.startswith(prefix):
            return tests
    return [path] if path.startswith("tests/") and path.endswith(".py") else []


def files_with_a_matrix(root: Path = ROOT) -> list[str]:
    """Test files that have cases which only `make test-all` runs."""
    found = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in found if re.search(r"\bmatrix\b|\bfast_first\b", path.read_text(encoding="utf-8"))]


def chosen(changed: list[str], files: list[str], seconds: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Of ``files``, those that the changed paths concern and that fit, the cheapest first; and those that do not fit."""
    tests = {each for path in changed for each in concerned(path)}
    wanted = [file for file in files if any(file.startswith(each) for each in tests)]
    cost = {file: seconds.get(file, {}).get("matrix", UNKNOWN_CPU_SECONDS) for file in wanted}
    taken: list[str] = []
    left: list[str] = []
    for file in sorted(wanted, key=lambda file: (cost[file], file)):
        fits = sum(cost[each] for each in taken) + cost[file] <= MOST_CPU_SECONDS
        (taken if fits else left).append(file)
    return taken, left


def git(*arguments: str) -> str:
    """What git says; "" where it knows no answer (no such commit)."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def base_of_head() -> str:
    """Where this branch left origin/main; on main itself, the commit before."""
    head, base = git("rev-parse", "HEAD"), git("merge-base", "HEAD", "origin/main")
    return base if base and base != head else git("rev-parse", "HEAD~1")


def main() -> None:
    base = sys.argv[1] if len(sys.argv) > 1 else base_of_head()
    if not base or not git("rev-parse", "--verify", f"{base}^{{commit}}"):
        sys.exit(f"there is no commit {base or 'before HEAD'} to compare with: give one, python3 .ci/matrix.py BASE")
    changed = git("diff", "--name-only", base, "HEAD").splitlines()
    record = ROOT / ".ci" / "seconds.json"
    seconds = json.loads(record.read_text()) if record.exists() else {}
    taken, left = chosen(changed, files_with_a_matrix(), seconds)
    print(f"{len(changed)} files changed since {base[:12]}: the matrix of {len(taken)} test files", file=sys.stderr)
    if left:
        print(f"too long for here, left to make test-all: {', '.join(left)}", file=sys.stderr)
    print(" ".join(taken))


if __name__ == "__main__":
    main()
