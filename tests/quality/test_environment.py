from __future__ import annotations

import json

import torch
import transformers

from patchkit.quality.environment import environment, version_of


def test_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__
    assert found["cpu"] and found["cores"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_a_package_that_is_not_there() -> None:
    assert version_of("no-such-distribution-of-any-name") == "not installed"
