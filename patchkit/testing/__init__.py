"""Tools for tests of patches: tolerances by dtype, tiny models of many anatomies, and a check that nothing was left behind.

    from patchkit.testing import TOLERANCES, assert_restored, families, snapshot, tiny_model

    model = tiny_model("gpt_neox")
    before = snapshot(model)
    with patched(model, "streaming(sinks=2, window=6)"):
        ...
    assert_restored(before, model)

Nothing here needs a network or a GPU.
"""

from patchkit.testing.families import families as families
from patchkit.testing.families import tiny_model as tiny_model
from patchkit.testing.restored import Snapshot as Snapshot
from patchkit.testing.restored import assert_restored as assert_restored
from patchkit.testing.restored import snapshot as snapshot
from patchkit.tolerance import TOLERANCES as TOLERANCES
from patchkit.tolerance import Tolerance as Tolerance
from patchkit.tolerance import logit_error as logit_error
