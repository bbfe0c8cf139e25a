"""What a cache was fed last, so that a text that is given once more is told from new tokens.

`generate()` wants the whole text in every turn, while a text without end can only be gone on with. A cache knows how many
tokens it has seen, and not which. So `stream` and `endless` leave the last of them with the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .stack import LayerStack

KEPT = 256  # tokens


@dataclass(frozen=True)
class FedText:
    """The end of the text that a cache has been fed.

    Attributes:
        seen (`int`): tokens that the cache had seen. If it has seen another number, others have fed it since.
        fed (`torch.Tensor`): `[batch_size, <= KEPT]`, the last of these tokens.
        returned (`torch.Tensor`, *optional*): `[batch_size, tokens]`, what `endless` returned: the end of the text, whose last
            token no forward has seen. None after `stream`.
    """

    seen: int
    fed: torch.Tensor
    returned: torch.Tensor | None = None

    def begins(self, input_ids: torch.Tensor) -> bool:
        """Whether the tokens at the place of those that are known are equal to them."""
        stop = self.seen
        return torch.equal(input_ids[:, stop - self.fed.shape[1] : stop], self.fed.to(input_ids.device))


def text_fed_to(stack: LayerStack) -> FedText | None:
    """What is known of the text of this cache; None if it has been fed otherwise."""
    known = stack.fed_text
    return known if known is not None and known.seen == stack.state.fed else None


def note_fed(
    stack: LayerStack, before: FedText | None, tokens: torch.Tensor, returned: torch.Tensor | None = None
) -> None:
    """Leaves with the cache that it has been fed these tokens `[batch_size, tokens]`.

    Args:
        before (`FedText`, *optional*): what was known before that; if None, and the cache had seen tokens, nothing is known.
    """
    seen = stack.state.fed
    if before is not None:
        tokens = torch.cat([before.fed.to(tokens.device), tokens], dim=1)
    # A copy, because a view would keep the whole text in memory.
    stack.fed_text = FedText(seen, tokens[:, -KEPT:].clone(), returned) if tokens.shape[1] >= min(seen, KEPT) else None


def first_new_token(stack: LayerStack, input_ids: torch.Tensor) -> int:
    """The index in `input_ids` `[batch_size, tokens]` of the first token that the cache has not seen.

    Raises:
        ValueError: if no token is new, or if nobody can say whether `input_ids` are new or the whole text.
    """
    seen, length, known = stack.state.fed, input_ids.shape[1], text_fed_to(stack)
    if seen and known is None and length > seen:
        raise ValueError(
            f"endless cannot tell whether these {length} tokens are the whole text or new ones: the cache has seen {seen}, some "
            "of them otherwise than by stream() or endless. Pass new ones only, all but the last of them by stream()."
        )
    if not seen or known is None:
        return 0
    if length >= seen and known.begins(input_ids):
        last = None if known.returned is None else known.returned[:, -1].to(input_ids.device)
        if length == seen:
            raise ValueError(
                f"input_ids are the {seen} tokens that this cache has seen, and no new one. Pass at least one token more."
            )
        if last is not None and not torch.equal(input_ids[:, seen], last):
            raise ValueError(
                f"input_ids begin with the {seen} tokens that this cache has seen, and then differ from the last token of the "
                "answer, which it has not. Pass the whole text with that token, or that token and the new ones only."
            )
        return seen
    if known.returned is not None and torch.equal(
        input_ids[:, : known.returned.shape[1]], known.returned.to(input_ids.device)
    ):
        return known.returned.shape[1] - 1
    return 0
