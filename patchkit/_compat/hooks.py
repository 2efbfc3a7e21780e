"""The kinds of hooks that a module of torch can have."""

from __future__ import annotations

from patchkit._compat.declared import Names

HOOK_REGISTRIES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

RELIED_ON: Names = {f"torch.nn:Module().{name}": None for name in HOOK_REGISTRIES}
