"""From a request to the choices that the engine generates: prompts as tokens, options of `generate`, grammars, limits."""

from __future__ import annotations

import copy
import logging
import secrets
import threading
from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import GrammarError
from patchkit.grammar import Grammar
from patchkit.handle import ATTRIBUTE
from patchkit.serving.api_error import ApiError, bad
from patchkit.serving.choice import Choice, Mailbox
from patchkit.serving.messages import for_template
from patchkit.serving.processors import LogitBias, OpenAIPenalties
from patchkit.serving.protocol import Asked
from patchkit.serving.shown import Detokenizer, ShownText
from patchkit.serving.tools import ToolUse, tool_use
from patchkit.speculation.stop_texts import StopsAt

_logger = logging.getLogger("patchkit")

# Patches under which a model has no longest text.
_ENDLESS = ("streaming", "linear")


class Preparer:
    """Checks requests against one model, and prepares them. Several threads may do so.

    Args:
        model: the model that is served.
        tokenizer: its tokenizer.
        name: by which requests call it.
        max_tokens: most new tokens of a choice.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_tokens: int) -> None:
        self.tokenizer, self.name, self.max_tokens = tokenizer, name, max_tokens
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.size = min(int(model.get_input_embeddings().num_embeddings), int(self.config.vocab_size))
        self.ends = _ends(model, tokenizer)
        # A tokenizer that encodes in one thread cannot decode in another.
        self._decoding = copy.deepcopy(tokenizer)
        self._encoding = threading.Lock()

    @property
    def positions(self) -> int | None:
        """Most tokens of a prompt and its text; None for a model without a limit."""
        switch = _compat.rope_switch(self.config)
        if switch is not None:  # speculative serves no texts that reach it
            return switch - 1
        handle = vars(self.model).get(ATTRIBUTE)
        if handle is not None and any(each.patch is not None and each.patch.name in _ENDLESS for each in handle.records):
            return None
        limit = getattr(self.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def choices(self, asked: Asked, mailbox: Mailbox) -> list[Choice]:
        """Return the choices of a request, n for each prompt.

        Raises:
            ApiError: a request that this model cannot serve.
        """
        if asked.model is not None and asked.model != self.name:
            raise ApiError(404, f"there is no model {asked.model[:100]!r} here: give {self.name!r}", "model", "model_not_found")
        if len(asked.prompts) * asked.n > 128:
            raise bad("n", f"{len(asked.prompts)} prompts with {asked.n} choices each are more than 128 texts")
        tools = tool_use(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
        if tools is not None and asked.response_format is not None:
            raise bad("response_format", "does not go with tools")
        if any(token >= self.size for token in asked.sampling.logit_bias):
            raise bad("logit_bias", f"the model has tokens 0 to {self.size - 1}")
        prompts = (
            [self._chat(asked, tools)] if asked.chat else [self._encoded(prompt, f"prompt[{i}]") for i, prompt in enumerate(asked.prompts)]
        )
        grammar = self._grammar(asked, tools)
        seed = secrets.randbits(62) if asked.sampling.seed is None else asked.sampling.seed
        choices: list[Choice] = []
        for number, ids in enumerate(prompts):
            options = self._options(asked, ids, grammar)
            for _ in range(asked.n):
                choices.append(
                    Choice(
                        index=len(choices),
                        prompt=number,
                        ids=torch.tensor(ids, device=self.model.device),
                        seed=(seed + len(choices) + 2**63) % 2**64 - 2**63,
                        options=options,
                        stops=asked.stop,
                        logprobs=asked.logprobs,
                        ends=frozenset(self.ends),
                        detokenizer=Detokenizer(self._decoding),
                        shown=ShownText(asked.stop),
                        tools=tools,
                        mailbox=mailbox,
                    )
                )
        return choices

    def token_text(self, token: int) -> str:
        """Return a token as text, special ones by their names."""
        return str(self._decoding.decode([token], clean_up_tokenization_spaces=False))

    def _chat(self, asked: Asked, tools: ToolUse | None) -> list[int]:
        if not self.tokenizer.chat_template:
            raise bad("messages", "this model has no chat template: use /v1/completions", "no_chat_template")
        template = str(self.tokenizer.chat_template)
        if tools is not None and not tools.demanded and "tools" not in template:
            raise bad("tools", "the model's chat template does not show tools: demand a call by tool_choice", "unsupported_value")
        messages = for_template(asked.messages)
        shown = {"tools": asked.tools} if tools is not None and "tools" in template else {}
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **shown)
        except Exception as error:  # a template is a program of the model's, which raises what it likes
            _logger.warning("patchkit: the chat template has refused messages", exc_info=error)
            raise bad("messages", f"the model's chat template does not take them ({' '.join(str(error).split())[:200]})") from error
        with self._encoding:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._checked(ids, "messages")

    def _encoded(self, prompt: str | list[int], at: str) -> list[int]:
        if isinstance(prompt, list):
            if any(token >= self.size for token in prompt):
                raise bad(at, f"the model has tokens 0 to {self.size - 1}")
            return self._checked(prompt, at)
        with self._encoding:
            ids = list(self.tokenizer(prompt)["input_ids"])
        return self._checked(ids, at)

    def _checked(self, ids: list[int], at: str) -> list[int]:
        if not ids:
            raise bad(at, "has no tokens")
        if self.positions is not None and len(ids) >= self.positions:
            raise bad(at, f"{len(ids)} tokens leave no room in the model's {self.positions} positions", "context_length_exceeded")
        return ids

    def _options(self, asked: Asked, ids: list[int], grammar: Grammar | None) -> dict[str, Any]:
        """Options of ``generate`` for one prompt. What a request leaves out has OpenAI's default, not that of the model's own config."""
        room = self.max_tokens if self.positions is None else min(self.max_tokens, self.positions - len(ids))
        if asked.max_tokens is not None and asked.max_tokens > room:
            limit = f"at most {self.max_tokens}" if room == self.max_tokens else f"{room} are left after {len(ids)} of {self.positions}"
            raise bad("max_tokens", f"{asked.max_tokens} new tokens are too many: {limit}", "context_length_exceeded")
        sampling = asked.sampling
        processors: list[Any] = []
        if sampling.presence_penalty or sampling.frequency_penalty:
            processors.append(OpenAIPenalties(len(ids), sampling.presence_penalty, sampling.frequency_penalty))
        if sampling.logit_bias:
            processors.append(LogitBias(sampling.logit_bias))
        if grammar is not None:
            processors.append(grammar)
        sampled = sampling.temperature > 0
        options: dict[str, Any] = {
            "max_new_tokens": asked.max_tokens or min(room, asked.default_tokens or room),
            "do_sample": sampled,
            "repetition_penalty": sampling.repetition_penalty,
            "pad_token_id": self.ends[0] if self.ends else 0,
            "eos_token_id": self.ends or None,
        }
        if sampled:
            options |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
        if processors:
            options["logits_processor"] = processors
        if asked.stop:
            options["stopping_criteria"] = [StopsAt(self._decoding, asked.stop, len(ids))]
        if asked.logprobs is not None:
            options |= {"return_dict_in_generate": True, "output_logits": True}
        return options

    def _grammar(self, asked: Asked, tools: ToolUse | None) -> Grammar | None:
        """The grammar of a request; None for free text."""
        form = asked.response_format
        ends: Any = self.ends or None
        at = "tools" if form is None else "response_format"
        try:
            if tools is not None and tools.demanded:
                return Grammar.json_schema(tools.schema(), self.tokenizer, ends=ends)
            if form is None:
                return None
            if form["type"] == "json_object":
                return Grammar.json_schema({"type": "object"}, self.tokenizer, ends=ends)
            if form["type"] == "json_schema":
                return Grammar.json_schema(form["json_schema"]["schema"], self.tokenizer, ends=ends)
            kind = form["type"]
            made: Grammar = getattr(Grammar, kind)(form[kind], self.tokenizer, ends=ends)
            return made
        except (GrammarError, RecursionError) as error:
            raise bad(at, str(error) or "is nested too deeply", "invalid_grammar") from error


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a text: the model's, or the tokenizer's if the model names none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
