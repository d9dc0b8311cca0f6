"""A causal language model on ONNX Runtime, called as transformers' ``generate`` is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Unpack, overload

from torch import Tensor, nn

from flora_fx.errors import ExportError

from ..directory.manifest import Manifest
from ..lora.reading import read_lora
from ..tokens.generated import Generated, Record, Streamer, gather, record_for
from ..tokens.options import GenerationOptions, plan
from ..tokens.stream import TokenStream
from .continuing import checked_prompt, checked_text, continuation
from .conversation import Conversation
from .kv_cache import GrowingCache, SharedCache
from .kv_memory import SharedMemory
from .session import Session
from .swapping import SwappableAdapter
from .text_cache import TextCache

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
        self._swaps = 0
        if session.cuda_graph and manifest.target != "decoder":
            raise ExportError(
                f"cuda_graph needs an export whose target is 'decoder'; this one is {manifest.target!r}: its keys and "
                "values change their place with every token"
            )
        self._adapter = SwappableAdapter(session, manifest.live) if manifest.live else None
        weights = {} if self._adapter is None else self._adapter.places
        self._memory = SharedMemory(session, manifest, weights) if manifest.target == "decoder" else None

    def __repr__(self) -> str:
        graph = ", CUDA graph" if self.session.cuda_graph else ""
        return f"Decoder({self.manifest.architecture}, {self.manifest.dtype}, {self.session.provider}{graph})"

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
        ids, mask = checked_text(input_ids, attention_mask, self.manifest.vocab_size)
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
        lora = read_lora(source)
        self._swaps += 1  # before, for Ctrl-C may come while it is written
        self._adapter.write(lora)

    def new_cache(self, *, keeps: bool = False) -> TextCache:
        """What runs one prompt and then its tokens, unchecked: see `TextCache`."""
        cache = GrowingCache(self.session, self.manifest) if self._memory is None else SharedCache(self._memory)
        return TextCache(cache, self.manifest, adapter=lambda: self._swaps, keeps=keeps)

    def start(self) -> Conversation:
        """A text that goes on for several turns, whose keys and values are kept from one to the next.

        >>> chat = decoder.start()  # doctest: +SKIP
        >>> answer = chat.generate(first_question, max_new_tokens=100)  # doctest: +SKIP
        >>> answer = chat.generate(next_question, max_new_tokens=100)  # runs these tokens only  # doctest: +SKIP
        """
        return Conversation(self.new_cache(keeps=True), self.manifest, name=repr(self))

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

        A row ends, with a warning, where the model has no more positions; others go on.

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
            TypeError, ValueError: an argument that cannot be; padding on the right; a prompt that is longer than the
                model has positions; rules that leave no token.
            ExportError: ONNX Runtime fails.
        """
        record = record_for(
            wanted=return_dict_in_generate, scores=output_scores, logits=output_logits, logprobs=output_logprobs
        )
        ids, stream = self._begin(input_ids, attention_mask, options, record)
        return gather(ids, stream, streamer, record)

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[GenerationOptions]
    ) -> TokenStream:
        """As `generate`, one token of every row at a time. Arguments are checked at once, not at the first token.

        In the end its ``finish_reasons`` say why each row ended: see `TokenStream`.

        A decoder of the target ``"decoder"`` has one memory for keys and values: as another prompt begins, the
        streams before it end with a RuntimeError, if they are asked for more.

        Yields:
            [batch], int64.
        """
        return self._begin(input_ids, attention_mask, options, None)[1]

    def _begin(
        self, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions, record: Record | None
    ) -> tuple[Tensor, TokenStream]:
        """The prompts, checked, and their tokens to come."""
        ids, mask = checked_prompt(input_ids, attention_mask, self.manifest.vocab_size)
        planned = plan(options, self.manifest, ids, mask, record)
        return ids, TokenStream(*continuation(self.new_cache(), ids, mask, planned, self.manifest.max_positions))
