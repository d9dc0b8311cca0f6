"""An encoder-decoder on ONNX Runtime, called as transformers' ``generate`` is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from flora_fx.errors import ExportError

from ..directory.manifest import Manifest
from ..tokens.arguments import padding_mask, tokens
from ..tokens.ending import Ending
from ..tokens.generated import Generated, Record, Streamer, gather, record_for
from ..tokens.logits import Logits
from ..tokens.looping import tokens_of
from ..tokens.options import GenerationOptions, Plan, plan
from ..tokens.stream import TokenStream
from .kv_memory import too_many
from .session import Session, Value

__all__ = ["Encoded", "Seq2Seq"]

Encoded = dict[str, Any]
"""What `Seq2Seq.encode` returns: inputs of the decoder's graph by name, the large ones on the session's device."""


class Seq2Seq:
    """An exported encoder-decoder. Make one with `flora_fx.export.load`.

    Attributes:
        manifest: what was exported.
        encoder, session: where the two graphs run; ``session.provider`` names the execution provider.
    """

    def __init__(self, encoder: Session, session: Session, manifest: Manifest) -> None:
        self.encoder = encoder
        self.session = session
        self.manifest = manifest
        self._past = [name for name in manifest.inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        self._reads = next(name for name in encoder.inputs if name != "attention_mask")

    def __repr__(self) -> str:
        return f"Seq2Seq({self.manifest.architecture}, {self.manifest.dtype}, {self.session.provider})"

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, decoder_input_ids: Tensor) -> Tensor:
        """See `forward`."""
        return self.forward(input_ids, attention_mask, decoder_input_ids=decoder_input_ids)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, decoder_input_ids: Tensor) -> Tensor:
        """Logits of every position of the decoder.

        Args:
            input_ids: [batch, seq], integers; of a speech model its samples or features, of an image model its
                pixels: floats, batch first, as its processor gives them.
            attention_mask: [batch, seq]; 0 where a row is padded, on either side. None for no padding.
            decoder_input_ids: [batch, target], integers.

        Returns:
            [batch, target, vocab] in the export's dtype.

        Raises:
            TypeError, ValueError: inputs of the wrong type or shape, or tokens outside of the vocabulary.
            ExportError: ONNX Runtime fails.
        """
        inputs = self._checked(input_ids, attention_mask)
        prompt = self._prompt(decoder_input_ids, len(inputs[self._reads]))
        return self.step(prompt, self.encode(inputs))[0]

    def encode(self, inputs: dict[str, Tensor]) -> Encoded:
        """One run of the encoder's graph, unchecked.

        Args:
            inputs: of that graph, by name.
        """
        length = inputs[self._reads].shape[1] if self._reads == "input_ids" else 0
        encoded = self._run(self.encoder, inputs, self.encoder.outputs, length)
        if "encoder_attention_mask" in self.session.inputs:
            encoded.setdefault("encoder_attention_mask", inputs.get("attention_mask"))
        return encoded

    def step(
        self, ids: Tensor, encoded: Encoded, past: Sequence[Value] | None = None, *, length: int = 0
    ) -> tuple[Tensor, list[Value]]:
        """One run of the decoder's graph, unchecked: prefill without ``past``, decode with it.

        Args:
            ids: [batch, target], int64.
            encoded: what `encode` returned.
            past: what the last step returned; it stays on the session's device.
            length: how many tokens there are in ``past``.

        Returns:
            logits [batch, target, vocab], and keys and values for the next step.
        """
        if past is None:
            past = [self.session.empty(name, {"batch": ids.shape[0], "past": 0}) for name in self._past]
        inputs = {"input_ids": ids, **encoded, **dict(zip(self._past, past, strict=True))}
        outputs = self._run(self.session, inputs, self._present, length + ids.shape[1])
        return outputs["logits"], [outputs[name] for name in self._present]

    @overload
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[False] = False,
        **options: Unpack[GenerationOptions],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[True],
        output_scores: bool = False,
        output_logits: bool = False,
        output_logprobs: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Generated: ...

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        output_logprobs: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Tensor | Generated:
        """Answer prompts, as transformers' ``generate`` does without beams.

        All rows end, with a warning, where the decoder has no more positions.

        Args:
            input_ids: [batch, prompt], integers; shorter prompts are padded on either side. Of a speech model its
                features [batch, mels, frames], floats.
            attention_mask: [batch, prompt]; 0 where padded. None for no padding.
            decoder_input_ids: [batch, start], what the decoder starts from, without padding; None for the model's own
                start token. To the options this is the prompt.
            streamer: gets what the decoder starts from, then each token, as it comes.
            return_dict_in_generate: return a `Generated` instead of the tokens alone.
            output_scores, output_logits, output_logprobs: what it holds beside them.
            options: ``max_new_tokens``, ``do_sample``, ``eos_token_id``, ...: see `GenerationOptions`.

        Returns:
            [batch, start + new], int64.

        Raises:
            TypeError, ValueError: an argument that cannot be; rules that leave no token.
            ExportError: ONNX Runtime fails.
        """
        record = record_for(
            wanted=return_dict_in_generate, scores=output_scores, logits=output_logits, logprobs=output_logprobs
        )
        start, stream = self._begin(input_ids, attention_mask, decoder_input_ids, options, record)
        return gather(start, stream, streamer, record)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TokenStream:
        """As `generate`, one token of every row at a time. Arguments are checked at once, not at the first token.

        In the end its ``finish_reasons`` say why each row ended: see `TokenStream`.

        Yields:
            [batch], int64.
        """
        return self._begin(input_ids, attention_mask, decoder_input_ids, options, None)[1]

    def _begin(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        options: GenerationOptions,
        record: Record | None,
    ) -> tuple[Tensor, TokenStream]:
        """What the decoder starts from, and its tokens to come."""
        inputs = self._checked(input_ids, attention_mask)
        start = self._prompt(decoder_input_ids, len(inputs[self._reads]))
        limit = self.manifest.max_positions
        if limit and start.shape[1] > limit:
            raise too_many(start.shape[1], limit)
        planned = plan(options, self.manifest, start, torch.ones_like(start), record)
        ending = Ending(planned.stopping, [start.shape[1]] * len(start), planned.count, limit)
        return start, TokenStream(self._tokens(inputs, start, planned, ending), ending)

    def _tokens(self, inputs: dict[str, Tensor], start: Tensor, plan: Plan, ending: Ending) -> Iterator[Tensor]:
        encoded: Encoded = {}
        past: list[Value] | None = None
        length = 0

        def run(ids: Tensor) -> Logits:
            nonlocal past, length
            logits, past = self.step(ids, encoded, past, length=length)
            length += ids.shape[1]
            return Logits(logits[:, -1])

        def first() -> Logits:
            encoded.update(self.encode(inputs))
            return run(start)

        def step(token: Tensor) -> Logits:
            return run(token[:, None])

        return tokens_of(first, step, plan, ending, len(start))

    def _run(self, session: Session, inputs: dict[str, Any], keep: Sequence[str], length: int) -> dict[str, Any]:
        limit = self.manifest.max_positions
        try:
            return session.run(inputs, keep=keep)
        except ExportError as error:
            if limit and length > limit:  # learned positions end there
                raise ValueError(f"a sequence has {length} tokens; this model has {limit} positions") from error
            raise

    def _checked(self, input_ids: Any, attention_mask: Any) -> dict[str, Tensor]:
        """The inputs of the encoder's graph, on the CPU."""
        if self._reads != "input_ids":
            return self._features(input_ids, attention_mask)
        ids = tokens("input_ids", input_ids, self.manifest.vocab_size)
        return {"input_ids": ids, "attention_mask": _filled(padding_mask(attention_mask, ids), "prompt")}

    def _features(self, value: Any, mask: Any) -> dict[str, Tensor]:
        shape, dtype = self.encoder.inputs[self._reads]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{self.manifest.architecture} reads {self._reads}; they must be a torch.Tensor of floats")
        fits = value.dim() == len(shape) and all(
            not isinstance(wanted, int) or wanted == size for wanted, size in zip(shape, value.shape, strict=True)
        )
        if not fits or value.numel() == 0:
            raise ValueError(f"{self._reads} has shape {list(value.shape)}; it must be [{', '.join(map(str, shape))}]")
        features = {self._reads: value.detach().to("cpu", dtype)}
        if "attention_mask" in self.encoder.inputs:
            if mask is None and self.manifest.needs_mask:
                raise TypeError(
                    f"{self.manifest.architecture} computes something else without attention_mask; pass one, all ones "
                    "where nothing is padded"
                )
            lengths = [size for name, size in zip(shape, value.shape, strict=True) if isinstance(name, str)]
            like = torch.ones(lengths, dtype=torch.int64)
            features["attention_mask"] = _filled(padding_mask(mask, like, "the lengths"), self._reads)
        elif mask is not None:
            varies = any(isinstance(size, str) for size in shape[1:])
            why = "it reads none" if varies else "its features have one length"
            raise TypeError(f"{self.manifest.architecture} takes no attention_mask: {why}")
        return features

    def _prompt(self, value: Any, batch: int) -> Tensor:
        """What the decoder starts from: [batch, start]."""
        if value is None:
            if self.manifest.decoder_start_token_id is None:
                raise ValueError(
                    f"{self.manifest.architecture} names no decoder_start_token_id: pass decoder_input_ids"
                )
            return torch.full((batch, 1), self.manifest.decoder_start_token_id, dtype=torch.int64)
        ids = tokens("decoder_input_ids", value, self.manifest.vocab_size)
        if len(ids) != batch:
            raise ValueError(f"decoder_input_ids has {len(ids)} rows and input_ids has {batch}")
        return ids


def _filled(mask: Tensor, what: str) -> Tensor:
    """A mask with something in each row."""
    if not bool(mask.any(1).all()):
        raise ValueError(f"row {int((~mask.any(1)).nonzero()[0])} of attention_mask is all 0: there is no {what}")
    return mask
