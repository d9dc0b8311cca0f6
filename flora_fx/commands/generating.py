"""`flora-fx generate`: text as it comes, or JSON in the end."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flora_fx.errors import FloraError

from .ending import Outcome

__all__ = ["generate", "pieces"]


def generate(
    directory: Path,
    adapter: Path | None,
    prompt: str | None,
    token_ids: str | None,
    options: dict[str, Any],
    outcome: Outcome,
    *,
    silent: bool,
) -> None:
    """Continue a prompt with an exported directory.

    Args:
        directory: that ``flora-fx export`` wrote.
        adapter: directory of another LoRA; None for the one that was exported. Of an export with slots, the name of
            what stands in one, or the directory of what is put into one; None for the base alone.
        prompt, token_ids: what to continue, one of the two.
        options: of ``Decoder.stream``.
        outcome: its document holds each token as soon as it is there, so that none is lost whatever comes.
        silent: print nothing; otherwise text appears token by token.

    Raises:
        FloraError: the directory, the adapter, the prompt or an option cannot be used.
    """
    import torch

    from flora_fx.checkpoint import load_tokenizer
    from flora_fx.export import Decoder, Encoder, Seq2Seq, load
    from flora_fx.export.directory.manifest import versions

    started = time.perf_counter()
    runner = load(directory)
    if adapter is not None:
        if not isinstance(runner, Decoder):
            raise FloraError(f"--adapter is for causal LMs exported with --hot-swap; {directory} is none")
        options = {**options, **_adapted(runner, adapter)}
    if isinstance(runner, Encoder) or (isinstance(runner, Seq2Seq) and "input_ids" not in runner.encoder.inputs):
        raise FloraError(f"{directory} continues no text ({runner}); flora_fx.export.load runs it from Python")
    tokenizer: Any = load_tokenizer(directory)
    if prompt is not None and tokenizer is None:
        raise FloraError(f"{directory} has no tokenizer; pass --token-ids instead of --prompt")
    if options.get("stop_strings") and tokenizer is None:
        raise FloraError(f"{directory} has no tokenizer, which --stop needs")
    ids = _parsed(token_ids) if token_ids is not None else list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise FloraError(f"{'--prompt' if token_ids is None else '--token-ids'} holds no token; give it at least one")
    seconds: dict[str, float] = {"load": time.perf_counter() - started}
    new: list[int] = []
    told = {
        "prompt_ids": ids,
        "token_ids": new,
        "text": None if tokenizer is None else "",
        "finish_reason": None,  # as long as it is not over
        "seconds": seconds,
        "versions": versions(),
    }
    outcome.document.update(told)
    outcome.left = lambda: f"{len(new)} new tokens came"

    def tokens() -> Iterator[int]:
        while True:
            name, since = "later_tokens" if new else "first_token", time.perf_counter()
            token = next(stream, None)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - since
            if token is None:
                return
            new.append(int(token))
            yield new[-1]

    shown = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the last position: it is said in the end
            stream = runner.stream(torch.tensor([ids], dtype=torch.int64), tokenizer=tokenizer, **options)
            found = (f"{token} " for token in tokens()) if tokenizer is None else pieces(tokenizer, tokens())
            for piece in found:
                if tokenizer is not None:
                    outcome.document["text"] += piece
                if not silent:
                    print(piece, end="", flush=True)
                    shown = True
    except ValueError as error:  # a token outside of the vocabulary, a top_p of 0, rules that leave no token
        raise FloraError(str(error)) from error
    finally:
        if shown:
            print()
    (reason,) = stream.finish_reasons
    outcome.document["finish_reason"] = reason
    if reason == "positions" and not silent:
        limit = runner.manifest.max_positions
        print(f"(the text ends at the last of the model's {limit} positions)", file=sys.stderr)


def _adapted(decoder: Any, adapter: Path) -> dict[str, Any]:
    """Let a decoder have an adapter; what `Decoder.stream` is to be told besides."""
    if not decoder.slots:
        decoder.load_adapter(adapter)
        return {}
    names = [slot.name for slot in decoder.slots]
    if str(adapter) not in names and decoder.manifest.live:
        number = names.index("") if "" in names else 0  # all of it is this prompt's
        decoder.load_adapter(adapter, slot=number, name=str(adapter))
    return {"adapters": str(adapter)}


def _parsed(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise FloraError(f"--token-ids is {text!r}; pass whole numbers, as in 3,14,15") from None


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens so far, piece by piece; a character split over tokens waits for its end.

    Args:
        tokenizer: of transformers.
        tokens: one after the other.
    """
    ids: list[int] = []
    said = 0
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[said:]
            said = len(text)
    if said < len(text):
        yield text[said:]
