"""What a cache was fed last, so that `endless` can tell new tokens from the whole text given once more.

`generate()` wants the whole text in every turn, but nobody keeps a text without end. A cache knows how many tokens it has seen,
but not which tokens. So `stream` and `endless` leave the last tokens with the cache.
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
        seen (`int`): how many tokens the cache had seen. If the cache now has another number, something else has fed it.
        fed (`torch.Tensor`): `[batch_size, <= KEPT]`, the last tokens that the cache had seen.
        returned (`torch.Tensor`, *optional*): `[batch_size, tokens]`, what `endless` returned: the end of the text, whose last
            token no forward has seen. None after `stream`.
    """

    seen: int
    fed: torch.Tensor
    returned: torch.Tensor | None = None

    def is_in(self, input_ids: torch.Tensor) -> bool:
        """Whether `input_ids` `[batch_size, tokens]` hold the known tokens at the same place of the text."""
        stop = self.seen
        return torch.equal(input_ids[:, stop - self.fed.shape[1] : stop], self.fed.to(input_ids.device))


def text_fed_to(stack: LayerStack) -> FedText | None:
    """Returns what is known of the cache's text; None if something else has fed the cache."""
    known = stack.fed_text
    return known if known is not None and known.seen == stack.state.fed else None


def note_fed(
    stack: LayerStack, before: FedText | None, tokens: torch.Tensor, returned: torch.Tensor | None = None
) -> None:
    """Notes that the cache was fed the tokens `[batch_size, tokens]`, unless too few of the text's last tokens are known.

    Args:
        before (`FedText`, *optional*): what was known of the text before these tokens.
    """
    seen = stack.state.fed
    if before is not None:
        tokens = torch.cat([before.fed.to(tokens.device), tokens], dim=1)
    # A copy, because a view would keep the whole text in memory.
    stack.fed_text = FedText(seen, tokens[:, -KEPT:].clone(), returned) if tokens.shape[1] >= min(seen, KEPT) else None


def first_new_token(stack: LayerStack, input_ids: torch.Tensor) -> int:
    """The index in `input_ids` `[batch_size, tokens]` of the first token that the cache has not seen.

    Raises:
        ValueError: if no token is new, or if `input_ids` could be new tokens or the whole text.
    """
    seen, length, known = stack.state.fed, input_ids.shape[1], text_fed_to(stack)
    if seen and known is None and length > seen:
        raise ValueError(
            f"endless cannot tell whether these {length} tokens are the whole text or new ones. The cache has seen {seen}, and "
            "not all of them through stream() or endless. Feed new tokens by stream(), and give only the last one to generate()."
        )
    if not seen or known is None:
        return 0
    if length >= seen and known.is_in(input_ids):
        last = None if known.returned is None else known.returned[:, -1].to(input_ids.device)
        if length == seen:
            raise ValueError(
                f"input_ids are the {seen} tokens that this cache has seen, and no new one. Pass at least one more token."
            )
        if last is not None and not torch.equal(input_ids[:, seen], last):
            raise ValueError(
                f"input_ids begin with the {seen} tokens that this cache has seen, but leave out the last token of the answer, "
                "which no forward has seen. Pass the whole text with that token, or only that token and the new ones."
            )
        return seen
    if known.returned is not None and torch.equal(
        input_ids[:, : known.returned.shape[1]], known.returned.to(input_ids.device)
    ):
        return known.returned.shape[1] - 1
    return 0
