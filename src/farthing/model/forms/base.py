"""What a layer's first half is: sizes, tensors, what it keeps of a sequence, and what computing it takes.

A form is a frozen dataclass of one layer's own sizes, in a file of its own. Loader, shard plan, caches and
planner ask it, and know no form.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol, Self

from farthing.model.fields import UNSCALED, QueryScaling, RopeConfig
from farthing.model.spec import Tensors


@dataclass(frozen=True, slots=True)
class Index:
    """An indexer (DeepSeek-V3.2-Exp section 2.1): small heads whose scores select what attention reads."""

    heads: int
    width: int
    top_k: int
    interleaved: bool = False
    shared: bool = False  # the layer has none, and attends to what the one before selected


class Workspace(Protocol):
    """Where a form counts what native ops take in a step (`farthing.planner.buffers`)."""

    @property
    def keys(self) -> int:
        """That the last token of each sequence sees."""

    def linear(self, rows: int, columns: int) -> None:
        """A product with a matrix [rows, columns]; columns 0: the hidden size."""

    def output(self, columns: int, heads: int) -> None:
        """The product that ends the half; heads: units whose halves may be summed apart."""

    def attend(self, key: int, value: int, groups: int) -> None:
        """Grouped-query attention to every key; widths of a key and a value."""

    def attend_latents(self, nope: int, rope: int, value: int, latent: int, most: int | None) -> None:
        """Latent attention to every token, or to `most` of them for each token apart."""

    def attend_rows(self, width: int, keys: int) -> None:
        """Attention of each token apart to rows of its own."""

    def score(self, heads: int, width: int, selected: int, keys: int) -> None:
        """An indexer's scores of so many index keys."""


class Mixer:
    """A layer's first half. Properties that a form does not have are those of one without attention.

    A form's field of a property's name is declared with a default or with `field()`: the property would be
    taken for its default.
    """

    __slots__ = ()

    module: ClassVar[str] = "self_attn"  # of its tensors' names

    @property
    def cache_rows(self) -> int:
        """Rows of the cache per token."""
        return 0

    @property
    def cache_width(self) -> int:
        """Values per row."""
        return 0

    @property
    def query_heads(self) -> int:
        """Query heads."""
        return 0

    @property
    def rotary_width(self) -> int:
        """Elements of a query that are rotated."""
        return 0

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return 0

    @property
    def output_width(self) -> int:
        """Columns of the matrix that ends the half."""
        return 0

    @property
    def dot_width(self) -> int:
        """Multiplications per query head and cached key."""
        return 0

    @property
    def expanded_width(self) -> int:
        """The same in a prompt."""
        return self.dot_width

    @property
    def window(self) -> int | None:
        """How many tokens, up to its own, one attends to; None: all of them."""
        return None

    @property
    def index(self) -> Index | None:
        """What selects the keys that a token attends to; None: nothing does."""
        return None

    @property
    def rope(self) -> RopeConfig:
        """The rotation of queries and keys."""
        return UNSCALED

    @property
    def query_scaling(self) -> QueryScaling | None:
        """The scale of queries by position; None: they are not scaled."""
        return None

    @property
    def rotated(self) -> bool:
        """Whether queries and keys are rotated."""
        return True

    @property
    def states(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of float32 tensors that the layer keeps of a sequence, whatever its length."""
        return ()

    @property
    def scaled_keys(self) -> bool:
        """Whether calibrated scales of keys and values are applied to an FP8 cache."""
        return False

    @property
    def independent(self) -> bool:
        """Whether the layer needs nothing but the last one's output, nor selects anything for another."""
        return True

    @property
    def entry_tokens(self) -> int:
        """Tokens of an entry of the cache; 1 where every token has a row of its own."""
        return 1

    @property
    def state_bytes(self) -> int:
        """Bytes per sequence of the states."""
        return 4 * sum(prod(shape) for shape in self.states)

    def tensors(self, p: str, d: int) -> Tensors:
        """The parameters; p: prefix of the module, d: hidden size."""
        raise NotImplementedError

    def per_rank(self, tp: int) -> Self:
        """The form of one of `tp` ranks that share its heads. Raises ValueError."""
        raise NotImplementedError

    def apart(self) -> Self:
        """The form with projections that are not stored as one."""
        return self

    def selecting(self, top_k: int | None) -> Self:
        """The form with an indexer that selects so many keys; None: without one."""
        return self

    def check(self) -> None:
        """Raise ValueError for sizes that no model has."""

    def keys_read(self, context: int, dense: bool = False) -> int:
        """Cached keys and entries that a token behind so many attends to; dense: without what an indexer
        saves."""
        return min(context, self.window or context)

    def keys_scanned(self, context: int) -> int:
        """Index keys that a token behind so many scores: none where it would select all."""
        return 0

    def prompt_keys(self, past: float, new: float) -> tuple[float, float]:
        """What each of `new` tokens of a prompt behind `past` others takes on average: multiplications per
        query head, and index keys that it scores."""
        seen = int(past + new / 2)
        return self.keys_read(seen) * self.expanded_width, self.keys_scanned(seen)

    def passed(self, keys: int) -> int:
        """Columns per token of what ops pass to each other."""
        raise NotImplementedError

    def reference(self, tokens: int, keys: int, hidden: int, streams: int) -> tuple[int, int]:
        """Elements in the model's type, and in float32, that the reference holds at once for `tokens` at the
        end of a sequence of `keys`; streams: columns more where a layer reads several."""
        raise NotImplementedError

    def workspace(self, w: Workspace) -> None:
        """Count what native ops take."""
        raise NotImplementedError

    def gguf(self) -> dict[str, Any]:
        """Fields of a GGUF file's metadata."""
        return {}


def divided(name: str, count: int, tp: int) -> int:
    """Units of one of `tp` ranks. Raises ValueError."""
    if count % tp:
        raise ValueError(f"tp: got {tp}; expected a divisor of {name} = {count}")
    return count // tp
