"""Configuration of a benchmark."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from patchkit.errors import PatchError

DTYPES = ("float32", "bfloat16", "float16")


class BenchError(PatchError):
    """The benchmark cannot be run with this configuration; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Config:
    """Configuration of a benchmark. A YAML file holds the same keys.

    Attributes:
        model: 'bundled', a model directory or a hub id; with `endpoint`, the model's name on that server.
        patches: spec of the patches of a local model; empty for none.
        endpoint: base address of a server, such as http://localhost:8000/v1; None runs the model here.
        chat: ask /chat/completions instead of /completions.
        api_key_env: environment variable with the server's key.
        prompts: 'stdlib', or a UTF-8 file with a prompt per line (.json: a list of texts).
        n_prompts, prompt_chars: how many prompts; characters of each of those that are taken from the standard library.
        new_tokens: tokens to ask for.
        iterations: how often each prompt is measured.
        warmup: requests before the measured ones.
        concurrency: requests at a time, for a server.
        timeout_s: limit for a whole request.
        retries: further attempts after a connection failure, a time-out, or an answer of 408, 429 or 5xx.
        dtype, device: dtype and device of a local model.

    Raises:
        BenchError: a value that cannot be used.
    """

    model: str = "bundled"
    patches: str = ""
    endpoint: str | None = None
    chat: bool = False
    api_key_env: str = "OPENAI_API_KEY"
    prompts: str = "stdlib"
    n_prompts: int = 8
    prompt_chars: int = 512
    new_tokens: int = 64
    iterations: int = 3
    warmup: int = 1
    concurrency: int = 1
    timeout_s: float = 120.0
    retries: int = 3
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Config)
        for key, value in vars(self).items():
            kinds = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
            fits = type(value) in kinds or (float in kinds and type(value) is int)
            if not fits:
                raise BenchError(f"{key}: {value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
        for key, least in dict(n_prompts=1, prompt_chars=1, new_tokens=1, iterations=1, warmup=0, concurrency=1, retries=0).items():
            if getattr(self, key) < least:
                raise BenchError(f"{key}: {getattr(self, key)} is too small, give at least {least}")
        if self.dtype not in DTYPES:
            raise BenchError(f"dtype: {self.dtype!r} is unknown, give one of {', '.join(DTYPES)}")
        if not 0 < self.timeout_s < float("inf"):
            raise BenchError(f"timeout_s: {self.timeout_s} is no time to wait, give seconds above 0")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise BenchError(f"endpoint: {self.endpoint!r} is no address, write it like http://localhost:8000/v1")
        if self.endpoint is not None and self.patches:
            raise BenchError("patches: a server cannot be patched from here, leave patches or endpoint out")
        if self.endpoint is None and (self.chat or self.concurrency > 1):
            raise BenchError("chat and concurrency are for a server: give endpoint, or leave them out")

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Config:
        """Read a configuration from a YAML file; `overrides` replace its values.

        Raises:
            BenchError: no such file, not a mapping, or an unknown key (with the nearest known one).
        """
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BenchError(f"{path} cannot be read ({error.strerror}): give a YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BenchError(f"{path} is not YAML ({error})") from error
        if not isinstance(given, dict) or not given:
            raise BenchError(f"{path} holds no keys: write lines such as 'model: bundled'")
        known = [each.name for each in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                guess = f", did you mean {nearest[0]!r}?" if nearest else ":"
                raise BenchError(f"{path}: unknown key {key!r}{guess} available: {', '.join(known)}")
        return cls(**(given | overrides))
