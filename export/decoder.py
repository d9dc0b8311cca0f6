"""A causal language model on ONNX Runtime, with the face of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_fx.errors import ExportError

from .manifest import Manifest
from .sampling import Sampling
from .session import Session, Value

__all__ = ["Decoder", "Streamer"]


class Streamer(Protocol):
    """What ``generate(streamer=...)`` calls; transformers' streamers are such."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""

    def end(self) -> None:
        """There will be no more."""


class Decoder:
    """An exported causal LM. Make one with `flora_fx.export.load`.

    Attributes:
        manifest: what was exported.
        session: where it runs; ``session.provider`` names the execution provider.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self.session = session
        self.manifest = manifest
        self._past = [name for name in manifest.inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]

    def __repr__(self) -> str:
        return f"Decoder({self.manifest.architecture}, {self.manifest.dtype}, {self.session.provider})"

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See `forward`."""
        return self.forward(input_ids, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: [batch, seq], integers.
            attention_mask: [batch, seq]; 0 where a row is padded. None for no padding.

        Returns:
            [batch, seq, vocab] in the export's dtype.

        Raises:
            TypeError, ValueError: inputs of the wrong type or shape, or tokens outside of the vocabulary.
            ExportError: ONNX Runtime fails.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        return self.step(ids, mask)[0]

    def step(self, ids: Tensor, mask: Tensor, past: Sequence[Value] | None = None) -> tuple[Tensor, list[Value]]:
        """One run of the graph, unchecked: prefill without ``past``, decode with it.

        Args:
            ids: [batch, seq], int64.
            mask: [batch, past + seq], int64.
            past: what the last step returned; it stays on the session's device.

        Returns:
            logits [batch, seq, vocab], and keys and values for the next step.
        """
        if past is None:
            past = [self.session.empty(name, {"batch": ids.shape[0], "past": 0}) for name in self._past]
        inputs = {"input_ids": ids, "attention_mask": mask, **dict(zip(self._past, past, strict=True))}
        limit = self.manifest.max_positions
        try:
            outputs = self.session.run(inputs, keep=self._present)
        except ExportError as error:
            if limit and mask.shape[1] > limit:  # learned positions end there; rotary ones would go on
                raise ValueError(
                    f"the prompt and the new tokens are {mask.shape[1]} together; this model has {limit} positions"
                ) from error
            raise
        return outputs["logits"], [outputs[name] for name in self._present]

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Streamer | None = None,
    ) -> Tensor:
        """Continue prompts, as transformers' ``generate`` does.

        Args:
            input_ids: [batch, prompt], integers; shorter prompts are padded on the left.
            attention_mask: [batch, prompt]; 0 where padded. None for no padding.
            max_new_tokens: at most so many are added.
            do_sample, temperature, top_k, top_p: see `Sampling`; temperature 0 takes the likeliest token.
            eos_token_id: token or tokens that end a row; None for the model's own, ``[]`` for none.
            pad_token_id: what follows in rows that ended; None for the model's own, or else the first end token.
            seed: for sampling; the same seed draws the same tokens.
            generator: instead of ``seed``.
            streamer: gets the prompt, then each token, as it comes.

        Returns:
            [batch, prompt + new], int64.

        Raises:
            TypeError, ValueError: an argument that cannot be; padding on the right.
            ExportError: ONNX Runtime fails.
        """
        tokens = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            seed=seed,
            generator=generator,
        )
        prompt = input_ids.to("cpu", torch.int64)
        if streamer is not None:
            streamer.put(prompt)
        new = []
        for token in tokens:
            new.append(token)
            if streamer is not None:
                streamer.put(token)
        if streamer is not None:
            streamer.end()
        return torch.cat([prompt, torch.stack(new, 1)], 1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, one token of every row at a time. Arguments are checked at once, not at the first token.

        Yields:
            [batch], int64.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        if not bool(mask[:, -1].all()):
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"row {row} of attention_mask ends with 0: the prompt is padded on the right, and its continuation "
                "would follow the padding. Pad on the left (tokenizer.padding_side = 'left')"
            )
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise TypeError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if seed is not None:
            if generator is not None:
                raise ValueError("pass either seed or generator")
            generator = torch.Generator().manual_seed(seed)
        choose = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        ends = _token_ids("eos_token_id", self.manifest.eos_token_ids if eos_token_id is None else eos_token_id)
        pad = self.manifest.pad_token_id if pad_token_id is None else _token_ids("pad_token_id", pad_token_id)[0]
        if pad is None:
            pad = ends[0] if ends else 0  # 0 is never used: without ends no row ends
        return self._tokens(ids, mask, max_new_tokens, choose, torch.tensor(ends, dtype=torch.int64), pad)

    def _tokens(
        self, ids: Tensor, mask: Tensor, count: int, choose: Sampling, ends: Tensor, pad: int
    ) -> Iterator[Tensor]:
        past: list[Value] | None = None
        going = torch.ones(ids.shape[0], dtype=torch.bool)
        for index in range(count):
            logits, past = self.step(ids, mask, past)
            token = torch.where(going, choose(logits[:, -1]), pad)
            yield token
            going = going & ~torch.isin(token, ends)
            if index + 1 == count or not bool(going.any()):
                return
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both as int64 on the CPU, in the one shape [batch, seq]."""
        ids = _integers("input_ids", input_ids)
        if ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(ids.shape)}; it must be [batch, prompt]")
        if ids.numel() == 0:
            raise ValueError(f"input_ids has shape {list(ids.shape)}; the prompt must hold at least one token")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self.manifest.vocab_size and high >= self.manifest.vocab_size):
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}; the tokens of this model are 0 to "
                f"{self.manifest.vocab_size - 1}"
            )
        if attention_mask is None:
            return ids, torch.ones_like(ids)
        mask = _integers("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}; it must be that of input_ids, {list(ids.shape)}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask holds other values than 0 and 1")
        return ids, mask


def _integers(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor of integers")
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}; it must hold integers")
    return value.detach().to("cpu", torch.int64)


def _token_ids(name: str, value: Any) -> list[int]:
    ids = [value] if isinstance(value, int) else list(value)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise TypeError(
            f"{name} is {value!r}; it must be a token id" + (" or a list of them" if name[0] == "e" else "")
        )
    return ids
