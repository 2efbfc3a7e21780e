"""Texts of the trials: rows of one length with a needle each, asked for at several distances."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.lm_eval import offline_tasks
from patchkit.measure.english_text import english_ids
from patchkit.measure.needle_prompt import Asking


@dataclass
class Rows:
    """Texts ids [B, n] with what is to be recalled stated at ``places`` [B], and the question's ids per row."""

    ids: torch.Tensor
    places: list[int]
    stated: list[int]  # tokens of the statement
    tails: torch.Tensor  # [B, t]: the question, up to the beginning of the answer
    forced: torch.Tensor  # [B, a]: the expected answer
    scored: int  # its last tokens that are scored
    keys: list[str]


_KNOWN_NEEDLE = "I will ask you: What is the secret number? It is stated in this text.\n\n"


def needles(
    tokenizer: Any, rows: int, after: int, before: int = 600, spread: int = 64, seed: int = 0, first: int = 0, known: bool = False
) -> Rows:
    """Needles ``after`` (give or take ``spread``) tokens before the end of rows of before + after tokens.

    Args:
        known: the question is put before the text too.
    """
    asking = Asking.of(tokenizer)
    need = before + after
    begin = asking.head + (tokenizer(_KNOWN_NEEDLE, add_special_tokens=False)["input_ids"] if known else [])
    stride = 1500
    text = english_ids(tokenizer, (first + rows) * stride + need + 2000)[0].tolist()
    pieces = tokenizer.convert_ids_to_tokens(text)
    breaks = [i for i in range(1, len(text)) if pieces[i - 1].endswith(".") and pieces[i].startswith((" ", "\n", "Ġ", "Ċ"))]
    found, places, keys, lengths, digits = [], [], [], [], []
    for row in range(first, first + rows):
        rng = random.Random(f"needles {seed} {row}")
        key = str(rng.randrange(10_000, 100_000))
        start = next(place for place in breaks if place >= 1 + row * stride)
        wanted = start + before - len(begin) + rng.randrange(-spread, spread + 1)
        place = min(breaks, key=lambda at: abs(at - wanted))
        stated = asking.needle(key)
        ids = begin + text[start:place] + stated + text[place : place + need]
        found.append(ids[:need])
        places.append(len(begin) + place - start)
        lengths.append(len(stated))
        keys.append(key)
        digits.append(asking.answer + asking.key(key))
    tail = torch.tensor([asking.tail]).expand(rows, -1)
    return Rows(torch.tensor(found), places, lengths, tail, torch.tensor(digits), len(digits[0]) - len(asking.answer), keys)


def recalls(tokenizer: Any, task: str, rows: int, after: int, before: int = 600, seed: int = 0, known: bool = False) -> Rows:
    """Rows of the tasks key_value and copy, stated ``after`` tokens before the end; text of Python code.

    Args:
        known: the question is put before the text too.
    """
    rng = random.Random(f"{task} {seed}")
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    found, places, lengths, tails, forced, keys = [], [], [], [], [], []
    while len(found) < rows:
        if task == "key_value":
            table = {name: str(rng.randrange(10)) for name in rng.sample(offline_tasks._NAMES.split(), 4)}
            asked = rng.choice(list(table))
            said, question, key = "".join(f"{n} = {d}\n" for n, d in table.items()) * 2, f"{asked} =", table[asked]
            answer = " " + key
        else:
            names = rng.sample(offline_tasks._NAMES.split(), 8)
            said, question = f"    return call({', '.join(names)})\n" * 2, f"    return call({', '.join(names[:2])},"
            key = " ".join(names[2:5])
            answer = " " + ", ".join(names[2:5])
        head = encode(offline_tasks._lines(rng, before, tokenizer))
        if known:
            head = (encode(f"# to be completed: {question}\n") + head)[:before]
        stated, tail, said_back = encode(said), encode("\n" + question), encode(answer)
        rest = encode(offline_tasks._lines(rng, after + 200, tokenizer))
        ids = (head + stated + rest)[: before + after]
        if len(ids) < before + after or (forced and (len(tail), len(said_back)) != (len(tails[0]), len(forced[0]))):
            continue
        found.append(ids)
        places.append(len(head))
        lengths.append(len(stated))
        tails.append(tail)
        forced.append(said_back)
        keys.append(key)
    return Rows(torch.tensor(found), places, lengths, torch.tensor(tails), torch.tensor(forced), len(forced[0]), keys)
