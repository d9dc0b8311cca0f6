"""A causal language model on ONNX Runtime, with the face of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Unpack, overload

from torch import Tensor, nn

from flora_fx.errors import ExportError

from .arguments import padding_mask, tokens
from .cache import GrowingCache, SharedCache
from .generated import Generated, Record, Streamer, gather, record_for
from .lora_source import read_lora
from .manifest import Manifest
from .memory import SharedMemory
from .options import GenerationOptions, Plan, plan
from .session import Session
from .swapping import LiveAdapter

__all__ = ["Decoder"]


class Decoder:
    """An exported causal LM. Make one with `flora_fx.export.load`.

    Attributes:
        manifest: what was exported.
        session: where it runs; ``session.provider`` names the execution provider.

    Raises:
        ExportError: a session with ``cuda_graph`` for a graph whose keys and values change their place.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self.session = session
        self.manifest = manifest
        if session.cuda_graph and manifest.target != "decoder":
            raise ExportError(
                f"cuda_graph needs an export whose target is 'decoder'; this one is {manifest.target!r}: its keys and "
                "values change their place with every token"
            )
        self._adapter = LiveAdapter(session, manifest.live) if manifest.live else None
        live = {} if self._adapter is None else self._adapter.places
        self._memory = SharedMemory(session, manifest, live) if manifest.target == "decoder" else None

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
        return self.new_cache().score(ids, mask)

    def load_adapter(self, source: str | Path | nn.Module) -> None:
        """Replace the LoRA by another one of the same base model, in place; on any error the old one stays.

        It may have lower ranks than the exported one, and fewer layers. The next run uses it: a stream that is under
        way goes on with it, on the keys and values that the old one left.

        Args:
            source: a directory that PEFT wrote (safetensors, no pickles), a Hub id, or a PEFT model, whose active
                adapter is meant.

        Raises:
            ExportError: the export was made without ``hot_swap``.
            AdapterError: no LoRA, one that changes more than linear layers, is not whole, holds NaN or infinity, or has
                layers, ranks or shapes that the exported one has not.
            CheckpointNotFoundError: the directory or one of its files is missing.
            TypeError: something else than a path or a PEFT model.

        >>> decoder.load_adapter("path/to/another-lora")  # doctest: +SKIP
        """
        if self._adapter is None:
            raise ExportError("the LoRA in this export cannot be replaced; export the model again with hot_swap=True")
        self._adapter.write(read_lora(source))

    def new_cache(self) -> GrowingCache | SharedCache:
        """What runs one prompt and then its tokens, unchecked: see `GrowingCache`."""
        if self._memory is not None:
            return SharedCache(self._memory)
        return GrowingCache(self.session, self.manifest)

    @overload
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
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
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        output_logprobs: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Tensor | Generated:
        """Continue prompts, as transformers' ``generate`` does.

        Args:
            input_ids: [batch, prompt], integers; shorter prompts are padded on the left.
            attention_mask: [batch, prompt]; 0 where padded. None for no padding.
            streamer: gets the prompt, then each token, as it comes.
            return_dict_in_generate: return a `Generated` instead of the tokens alone.
            output_scores, output_logits, output_logprobs: what it holds beside them.
            options: ``max_new_tokens``, ``do_sample``, ``eos_token_id``, ...: see `GenerationOptions`.

        Returns:
            [batch, prompt + new], int64.

        Raises:
            TypeError, ValueError: an argument that cannot be; padding on the right; rules that leave no token.
            ExportError: ONNX Runtime fails.
        """
        record = record_for(
            wanted=return_dict_in_generate, scores=output_scores, logits=output_logits, logprobs=output_logprobs
        )
        ids, stream = self._begin(input_ids, attention_mask, options, record)
        return gather(ids, stream, streamer, record)

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Tensor]:
        """As `generate`, one token of every row at a time. Arguments are checked at once, not at the first token.

        A decoder of the target ``"decoder"`` has one memory for keys and values: as another prompt begins, the
        streams before it end with a RuntimeError, if they are asked for more.

        Yields:
            [batch], int64.
        """
        return self._begin(input_ids, attention_mask, options, None)[1]

    def _begin(
        self, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions, record: Record | None
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """The prompts, checked, and their tokens to come."""
        ids, mask = self._checked(input_ids, attention_mask)
        if not bool(mask[:, -1].all()):
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"row {row} of attention_mask ends with 0: the prompt is padded on the right, and its continuation "
                "would follow the padding. Pad on the left (tokenizer.padding_side = 'left')"
            )
        return ids, self._tokens(ids, mask, plan(options, self.manifest, ids, mask, record))

    def _tokens(self, ids: Tensor, mask: Tensor, plan: Plan) -> Iterator[Tensor]:
        cache = self.new_cache()
        logits = cache.prefill(ids, mask, plan.count - 1)
        ended = [False] * len(ids)
        for left in reversed(range(plan.count)):
            token = plan.choose(logits, ended)
            yield token
            new = token.tolist()
            ended = plan.stopping(new)
            if left == 0 or all(ended):
                return
            logits = cache.decode(new)

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both as int64 on the CPU, in the one shape [batch, seq]."""
        ids = tokens("input_ids", input_ids, self.manifest.vocab_size)
        mask = padding_mask(attention_mask, ids)
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"row {row} of attention_mask is all 0: there is no token in it")
        return ids, mask
