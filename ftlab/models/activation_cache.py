"""Activations below the lowest layer that trains, computed once for each document and kept over epochs.

Letters: T tokens of a document, N tokens of a batch, D width.

Where the embedding and the first L blocks are frozen and draw nothing at random, the stream that enters block L is a
function of a document's tokens alone. It is computed for each document by itself, so that it does not depend on what
else was in the batch, and a resumed run finds the same numbers. Differs from AutoFreeze (arXiv 2102.01386): exact,
since what is frozen stays frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftlab.errors import FtlabError
from ftlab.models.attention import Documents
from ftlab.models.llama import LlamaForCausalLM

__all__ = ["ActivationCache"]

_MULTIPLE = 64  # tokens; few shapes, because a CPU compiles its low-precision products for each


class ActivationCache:
    """The stream [T, D] that enters the lowest trainable block, by a document's tokens; at most `max_bytes` of it.

    What does not fit is computed again each time, in the same way. Errors: FtlabError if the model has nothing to
    cache.
    """

    def __init__(self, model: LlamaForCausalLM, max_bytes: int) -> None:
        self.layer = model.frozen_depth()
        if self.layer == 0:
            raise FtlabError(
                "training.activation_cache_gib: the embedding or the first block trains, or draws dropout, so there is "
                "nothing to keep; set it to 0, or train upper layers only"
            )
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._kept: dict[bytes, Tensor] = {}

    def hidden_states(
        self, model: LlamaForCausalLM, input_ids_BT: Tensor, position_ids_BT: Tensor, documents: Documents
    ) -> Tensor:
        """What `model.hidden_states` gives for the same arguments, up to the rounding of products of other shapes."""
        lengths = list(documents.lengths)
        parts = list(torch.split(input_ids_BT.reshape(-1), lengths))
        if documents.shared_prefix:
            prefix = parts[0]
            whole = [self._stream(model, torch.cat((prefix, part))) for part in parts[1:]]
            streams = [whole[0][: len(prefix)], *(stream[len(prefix) :] for stream in whole)]
        else:
            streams = [self._stream(model, part) for part in parts]
        stream_BTD = torch.cat(streams).view(*input_ids_BT.shape, -1)
        return model.hidden_states(input_ids_BT, position_ids_BT, documents, entry=(self.layer, stream_BTD))

    def summary(self) -> dict[str, int]:
        """For run.json."""
        return {
            "layer": self.layer,
            "documents": len(self._kept),
            "bytes": self.bytes,
            "hits": self.hits,
            "misses": self.misses,
        }

    def _stream(self, model: LlamaForCausalLM, ids_T: Tensor) -> Tensor:
        key = ids_T.cpu().numpy().tobytes()
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        filled = torch.nn.functional.pad(ids_T, (0, -len(ids_T) % _MULTIPLE))  # causal: nothing sees what is behind it
        with torch.no_grad():
            stream_TD = model.stream_at(self.layer, filled[None])[0, : len(ids_T)].clone()
        size = stream_TD.numel() * stream_TD.element_size()
        if self.bytes + size <= self.max_bytes:
            self._kept[key] = stream_TD
            self.bytes += size
        return stream_TD
