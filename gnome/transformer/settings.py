"""Shape of a transformer, and what its block is made of."""

from dataclasses import dataclass
from typing import Literal

from gnome.errors import InvalidInput

BlockName = Literal["preln", "parallel", "sas", "sasp"]
Activation = Literal["relu", "gelu", "swiglu"]
Norm = Literal["rms", "none"]

BLOCKS: tuple[BlockName, ...] = ("preln", "parallel", "sas", "sasp")

MLP_GAIN = 0.42
"""An MLP's first gain in a skipless block of depth 1; it falls as 1 / sqrt(depth) (0.1 at 18 blocks: arXiv 2311.01906, appendix D)."""


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """`width` is split evenly among `heads`; `hidden` is the width between an MLP's layers, 4 times `width` unless given.

    `causal`: a token sees itself and those before it, and tokens have places, told by rotary embeddings (`rotary`).  Otherwise tokens are
    a set.  `norm` "none" leaves out the norms within blocks: it trains, but became NaN when fine-tuned (arXiv 2311.01906, section 4.4);
    not for models that are to be adapted.  `mlp_gain` is the first value of an MLP's gain in `sas` and `sasp`.
    """

    block: BlockName = "sas"
    depth: int = 4
    width: int = 256
    heads: int = 8
    causal: bool = False
    hidden: int | None = None
    activation: Activation = "relu"
    norm: Norm = "rms"
    rotary: bool = True
    dropout: float = 0.0
    mlp_gain: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise InvalidInput(f"block is {self.block!r}, expected one of {', '.join(BLOCKS)}")
        if self.activation not in {"relu", "gelu", "swiglu"}:
            raise InvalidInput(f"activation is {self.activation!r}, expected relu, gelu or swiglu")
        if self.norm not in {"rms", "none"}:
            raise InvalidInput(f"norm is {self.norm!r}, expected rms or none")
        if min(self.depth, self.width, self.heads, self.mlp_width) < 1:
            raise InvalidInput(
                f"depth {self.depth}, width {self.width}, heads {self.heads} and hidden {self.mlp_width} must all be at least 1"
            )
        if self.width % self.heads:
            raise InvalidInput(f"width {self.width} does not split among {self.heads} heads")
        if self.causal and self.rotary and (self.width // self.heads) % 2:
            raise InvalidInput(f"rotary embeddings turn pairs of features, heads of width {self.width // self.heads} are odd")
        if not 0 <= self.dropout < 1:
            raise InvalidInput(f"dropout is {self.dropout}, expected at least 0 and below 1")

    @property
    def skipless(self) -> bool:
        """Whether attention is shaped and stands in a block without a skip connection around it."""
        return self.block in {"sas", "sasp"}

    @property
    def sequential(self) -> bool:
        """Whether the MLP comes after attention rather than beside it."""
        return self.block in {"preln", "sas"}

    @property
    def mlp_width(self) -> int:
        """Width between an MLP's layers."""
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def first_mlp_gain(self) -> float:
        """An MLP's gain before training."""
        if not self.skipless:
            return 1.0
        return MLP_GAIN * float(self.depth) ** -0.5 if self.mlp_gain is None else self.mlp_gain
