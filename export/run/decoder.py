"""A causal language model on ONNX Runtime, called as transformers' ``generate`` is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Unpack, overload

from torch import Tensor, nn

from flora_fx.errors import AdapterError, ExportError

from ..directory.manifest import Manifest
from ..lora.reading import Lora, name_of, read_lora
from ..lora.slots import EMPTY, Slot
from ..tokens.generated import Generated, Record, Streamer, gather, record_for
from ..tokens.options import GenerationOptions, plan
from ..tokens.stream import TokenStream
from .continuing import checked_prompt, checked_text, continuation
from .conversation import Conversation
from .kv_cache import GrowingCache, SharedCache
from .kv_memory import SharedMemory
from .session import Session
from .slots import Adapters, OneAdapter, RowAdapters, Rows, SlotTable, without_slots
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
        self._one = OneAdapter()
        self._table = SlotTable(manifest.slots) if manifest.slots else None
        if session.cuda_graph and manifest.target != "decoder":
            raise ExportError(
                f"cuda_graph needs an export whose target is 'decoder'; this one is {manifest.target!r}: its keys and "
                "values change their place with every token"
            )
        self._adapter = SwappableAdapter(session, manifest.live, len(manifest.slots)) if manifest.live else None
        weights = {} if self._adapter is None else self._adapter.places
        self._memory = SharedMemory(session, manifest, weights) if manifest.target == "decoder" else None

    def __repr__(self) -> str:
        graph = ", CUDA graph" if self.session.cuda_graph else ""
        return f"Decoder({self.manifest.architecture}, {self.manifest.dtype}, {self.session.provider}{graph})"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What stands in each slot now; none where the export has one adapter for all rows."""
        return () if self._table is None else tuple(self._table.slots)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, adapters: Adapters = None) -> Tensor:
        """See `forward`."""
        return self.forward(input_ids, attention_mask, adapters=adapters)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, adapters: Adapters = None) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: [batch, seq], integers.
            attention_mask: [batch, seq]; 0 where a row is padded. None for no padding.
            adapters: of the rows, see `generate`.

        Returns:
            [batch, seq, vocab] in the export's dtype.

        Raises:
            TypeError, ValueError: inputs of the wrong type or shape, or tokens outside of the vocabulary.
            AdapterError: the adapter of a row is not there.
            ExportError: ONNX Runtime fails.
        """
        ids, mask = checked_text(input_ids, attention_mask, self.manifest.vocab_size)
        cache = self.new_cache(adapters=adapters)
        cache.begin(len(ids))
        return cache.score(ids, mask)

    def load_adapter(
        self, source: str | Path | nn.Module, *, slot: int | str | None = None, name: str | None = None
    ) -> None:
        """Replace a LoRA by another one of the same base model, in place; on any error the old one stays.

        It may have lower ranks than the exported one, and fewer layers. The next run uses it: a stream that is under
        way goes on with it, on the keys and values that the old one left.

        Args:
            source: a directory that PEFT wrote (safetensors, no pickles), a Hub id, or a PEFT model, whose active
                adapter is meant.
            slot: of an export with slots: the number of the one to fill, or the name of what it replaces. None: the
                slot where an adapter of this name stands, else the first empty one.
            name: what it is called from then on; None for the last part of the path, or its name in the PEFT model.

        Raises:
            ExportError: the export was made without ``hot_swap`` and without slots; or it has none, and there is
                ``slot`` or ``name``.
            AdapterError: no LoRA, one that changes more than linear layers, is not whole, holds NaN or infinity, or has
                layers, ranks or shapes that the exported one has not; or no such slot, all taken, a name used twice.
            CheckpointNotFoundError: the directory or one of its files is missing.
            TypeError: something else than a path or a PEFT model.

        >>> decoder.load_adapter("path/to/another-lora")  # doctest: +SKIP
        """
        if self._table is None and (slot, name) != (None, None):
            raise without_slots()
        adapter = self._swappable()
        lora = read_lora(source)
        if self._table is None:
            self._one.swaps += 1  # before, for Ctrl-C may come while it is written
            adapter.write(lora)
            return
        name = name_of(source) if name is None else name
        self._write(self._table.place_for(name, slot), lora, Slot.of(name, lora))

    def unload_adapter(self, slot: int | str) -> None:
        """Empty a slot. A stream that is under way in it goes on without an adapter.

        Args:
            slot: its number, or the name of what stands in it.

        Raises:
            ExportError: the export has no slots, or was made without ``slots`` and ``hot_swap``.
            AdapterError: there is no such slot.

        >>> decoder.unload_adapter("sql")  # doctest: +SKIP
        """
        if self._table is None:
            raise without_slots()
        self._write(self._table.number(slot), Lora("no adapter", {}), EMPTY)

    def _write(self, number: int, lora: Lora, slot: Slot) -> None:
        assert self._table is not None
        adapter = self._swappable()
        before = self._table.put(number, slot)  # before, for Ctrl-C may come while it is written
        try:
            adapter.write(lora, number)
        except AdapterError:
            self._table.put(number, before)
            raise

    def _swappable(self) -> SwappableAdapter:
        if self._adapter is None:
            raise ExportError("the LoRA in this export cannot be replaced; export the model again with hot_swap=True")
        return self._adapter

    def new_cache(self, *, adapters: Adapters = None, keeps: bool = False) -> TextCache:
        """What runs one prompt and then its tokens, unchecked: see `TextCache`.

        Raises:
            ExportError: there are adapters for the rows, and the export has no slots.
            AdapterError: one of them is not there.
        """
        if self._table is None and adapters is not None:
            raise without_slots()
        cache = GrowingCache(self.session, self.manifest) if self._memory is None else SharedCache(self._memory)
        rows: Rows = self._one if self._table is None else RowAdapters(self._table, adapters)
        return TextCache(cache, self.manifest, adapters=rows, keeps=keeps)

    def start(self, *, adapters: Adapters = None) -> Conversation:
        """A text that goes on for several turns, whose keys and values are kept from one to the next.

        Args:
            adapters: of the rows in every turn, see `generate`.

        >>> chat = decoder.start()  # doctest: +SKIP
        >>> answer = chat.generate(first_question, max_new_tokens=100)  # doctest: +SKIP
        >>> answer = chat.generate(next_question, max_new_tokens=100)  # runs these tokens only  # doctest: +SKIP
        """
        return Conversation(self.new_cache(adapters=adapters, keeps=True), self.manifest, name=repr(self))

    @overload
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        adapters: Adapters = None,
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
        adapters: Adapters = None,
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
        adapters: Adapters = None,
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
            adapters: of an export with slots: for each row the name of a LoRA, or the number of its slot, or None (or
                PEFT's ``"__base__"``) for the base alone; one name for all rows. None: the base alone in every row.
            streamer: gets the prompt, then each token, as it comes.
            return_dict_in_generate: return a `Generated` instead of the tokens alone.
            output_scores, output_logits, output_logprobs: what it holds beside them.
            options: ``max_new_tokens``, ``do_sample``, ``eos_token_id``, ...: see `GenerationOptions`.

        Returns:
            [batch, prompt + new], int64.

        Raises:
            TypeError, ValueError: an argument that cannot be; padding on the right; a prompt that is longer than the
                model has positions; rules that leave no token; adapters for another number of rows.
            AdapterError: the adapter of a row is not there.
            ExportError: the export has no slots, and there are adapters; or ONNX Runtime fails.
        """
        record = record_for(
            wanted=return_dict_in_generate, scores=output_scores, logits=output_logits, logprobs=output_logprobs
        )
        ids, stream = self._begin(input_ids, attention_mask, adapters, options, record)
        return gather(ids, stream, streamer, record)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        adapters: Adapters = None,
        **options: Unpack[GenerationOptions],
    ) -> TokenStream:
        """As `generate`, one token of every row at a time. Arguments are checked at once, not at the first token.

        In the end its ``finish_reasons`` say why each row ended: see `TokenStream`.

        A decoder of the target ``"decoder"`` has one memory for keys and values: as another prompt begins, the
        streams before it end with a RuntimeError, if they are asked for more.

        Yields:
            [batch], int64.
        """
        return self._begin(input_ids, attention_mask, adapters, options, None)[1]

    def _begin(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        adapters: Adapters,
        options: GenerationOptions,
        record: Record | None,
    ) -> tuple[Tensor, TokenStream]:
        """The prompts, checked, and their tokens to come."""
        ids, mask = checked_prompt(input_ids, attention_mask, self.manifest.vocab_size)
        planned = plan(options, self.manifest, ids, mask, record)
        return ids, TokenStream(
            *continuation(self.new_cache(adapters=adapters), ids, mask, planned, self.manifest.max_positions)
        )
