"""Handle: every edit is undone, last first, also on a copy."""

from __future__ import annotations

import copy
import functools
import gc
import io
import types
from typing import Any

import pytest
import torch
from torch import nn

from patchkit.errors import IrreversiblePatch, PatchError
from patchkit.handle import Handle, _shared


class Net(nn.Module):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.zeros(3))
        self.note = "original"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + self.shift

    def double(self) -> None:  # type: ignore[override]
        self.scale *= 2


class Settings:
    """Redirects writes, as a config with aliases and properties does."""

    def __init__(self) -> None:
        self.real = 1

    @property
    def alias(self) -> int:
        return self.real

    @alias.setter
    def alias(self, value: int) -> None:
        self.real = value


def add_one(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


def halve_input(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


def with_keywords(hits: Any, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    hits["calls"] += 1
    return args, kwargs


def note(log: list[str], word: str) -> None:
    log.append(word)


def fail(log: list[str], word: str) -> None:
    log.append(word)
    raise RuntimeError(f"cannot undo {word}")


def interrupt(log: list[str], word: str) -> None:
    log.append(word)
    raise KeyboardInterrupt


def swap_weight(linear: nn.Linear, weight: nn.Parameter) -> None:
    linear._parameters["weight"] = weight


def state(net: Net) -> Any:
    """All that an edit could leave behind, by module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: (id(module), list(vars(module)), [dict(getattr(module, kind)) for kind in (*hooks, "_forward_hooks_always_called")])
        for name, module in net.named_modules()
    }


def edit(net: Net) -> Handle:
    """One edit of every kind."""
    handle = Handle(net)
    handle.hook(net, add_one, always_call=True)
    handle.pre_hook(net.linear, halve_input, prepend=True)
    handle.pre_hook(net, functools.partial(with_keywords, handle.record.hits), with_kwargs=True)
    handle.set_attribute(net, "note", "patched")
    handle.set_attribute(net, "scale", 3.0)
    handle.set_attribute(net, "helper", nn.Linear(1, 1))
    handle.on_undo(functools.partial(swap_weight, net.linear, net.linear.weight))
    net.linear._parameters["weight"] = nn.Parameter(net.linear.weight * 2)
    return handle


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.arange(6.0).view(2, 3)


def test_every_edit_acts_and_is_gone(net: Net) -> None:
    before, output, weight = state(net), net(X), net.linear.weight
    keys = list(net.state_dict())
    handle = edit(net)
    assert not torch.equal(net(X), output)
    assert handle.record.hits == {"calls": 1}
    assert (net.note, net.scale) == ("patched", 3.0)
    assert list(net.state_dict()) == keys, "a module set as an attribute must not be saved"
    handle.undo()
    assert state(net) == before
    assert net.linear.weight is weight
    assert torch.equal(net(X), output)


def test_undo_is_last_in_first_out_and_runs_once(net: Net) -> None:
    handle, log = Handle(net), []  # type: ignore[var-annotated]
    for word in "abc":
        handle.on_undo(functools.partial(note, log, word))
    handle.undo()
    handle.undo()
    assert log == ["c", "b", "a"]


def test_two_settings_of_one_attribute_return_to_the_first(net: Net) -> None:
    handle = Handle(net)
    handle.set_attribute(net, "note", 1)
    handle.set_attribute(net, "note", 2)
    handle.set_attribute(net, "fresh", None)
    handle.set_attribute(net, "fresh", 2)
    handle.undo()
    assert net.note == "original"
    assert "fresh" not in vars(net)


def test_every_undo_step_runs_though_some_fail(net: Net) -> None:
    handle, log = Handle(net), []  # type: ignore[var-annotated]
    handle.set_attribute(net, "note", "patched")
    handle.on_undo(functools.partial(fail, log, "a"))
    handle.on_undo(functools.partial(note, log, "b"))
    handle.on_undo(functools.partial(fail, log, "c"))
    with pytest.raises(IrreversiblePatch, match=r"2 undo step\(s\) failed .*undo c.*undo a.*load it again") as caught:
        handle.undo()
    assert str(caught.value.__cause__) == "cannot undo c"
    assert log == ["c", "b", "a"]
    assert net.note == "original"
    handle.undo()


def test_an_interrupt_during_undo_is_kept_until_all_steps_ran(net: Net) -> None:
    handle, log = Handle(net), []  # type: ignore[var-annotated]
    handle.on_undo(functools.partial(note, log, "a"))
    handle.on_undo(functools.partial(interrupt, log, "b"))
    handle.on_undo(functools.partial(fail, log, "c"))
    with pytest.raises(KeyboardInterrupt):
        handle.undo()
    assert log == ["c", "b", "a"]


@pytest.mark.parametrize("name", ["real", "alias"])
def test_a_redirected_attribute_is_set_back(name: str) -> None:
    settings, handle = Settings(), Handle()
    handle.set_attribute(settings, name, 5)
    assert settings.real == 5
    handle.undo()
    assert vars(settings) == {"real": 1}


@pytest.mark.parametrize(("owner", "name"), [("linear", "weight"), ("", "shift"), ("", "linear")])
def test_parameters_buffers_and_modules_are_not_attributes(net: Net, owner: str, name: str) -> None:
    before = state(net)
    with pytest.raises(PatchError, match=f"{name} is in _(parameters|buffers|modules).*on_undo"):
        Handle(net).set_attribute(net.get_submodule(owner), name, None)
    assert state(net) == before


def test_functions_that_a_copy_could_not_take_along_are_refused(net: Net) -> None:
    def inner(*args: Any) -> None: ...

    before, handle = state(net), Handle(net)
    for refused in (inner, lambda *args: None, functools.partial(inner, 1)):
        for register in (
            functools.partial(handle.hook, net),
            functools.partial(handle.pre_hook, net),
            functools.partial(handle.set_attribute, net, "note"),
            handle.on_undo,
        ):
            with pytest.raises(PatchError, match=r"is .*<(locals|lambda)>.*module-level function, or functools\.partial"):
                register(refused)
    with pytest.raises(PatchError, match=r"bound to the object it is set on.*functools\.partial\(add_one, obj\)"):
        handle.set_attribute(net, "note", types.MethodType(add_one, net))
    assert state(net) == before


def test_views_share_the_undo_stack_and_keep_their_own_report(net: Net) -> None:
    root, log = Handle(net), []  # type: ignore[var-annotated]
    first, second = (root.for_patch(types.SimpleNamespace(name=name, spec=name, stage=0)) for name in ("first", "second"))
    first.on_undo(functools.partial(note, log, "a"))
    second.on_undo(functools.partial(note, log, "b"))
    first.record.changed("layers", 2)
    first.record.changed("layers")
    first.record.hits["steps"] += 1
    second.record.left_alone("1 layer", "it is small")
    told, other = (record.report() for record in root.records)
    assert (told.name, told.changed, told.left_alone, told.hits) == ("first", {"layers": 3}, {}, {"steps": 1})
    assert (other.name, other.changed, other.left_alone, other.hits) == ("second", {}, {"1 layer": "it is small"}, {})
    root.undo()
    assert log == ["b", "a"]


def copied(net: Net) -> Net:
    return copy.deepcopy(net)


def pickled(net: Net) -> Net:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_is_undone_alone(net: Net, duplicate: Any) -> None:
    plain = net(X)
    keys = {name: list(vars(module)) for name, module in net.named_modules()}
    handle = edit(net)
    object.__setattr__(net, "_handle", handle)
    changed, before = net(X), state(net)

    twin = duplicate(net)
    assert torch.equal(twin(X), changed)
    assert handle.record.hits == {"calls": 1}, "the copy's hooks count on the copy"
    assert twin._handle.record.hits == {"calls": 2}
    twin._handle.undo()
    object.__delattr__(twin, "_handle")
    assert torch.equal(twin(X), plain)
    assert {name: list(vars(module)) for name, module in twin.named_modules()} == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())

    assert state(net) == before
    assert torch.equal(net(X), changed)
    handle.undo()
    assert torch.equal(net(X), plain)


def test_an_object_that_is_gone_leaves_nothing_behind() -> None:
    config = nn.Identity()
    key = id(config), "name"
    Handle().set_shared(config, "name", "alias")
    assert key in _shared
    del config
    gc.collect()
    assert key not in _shared
