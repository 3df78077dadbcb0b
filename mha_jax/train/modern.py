"""The sizes of the task "decoder": what an experiment chooses of `models.decoder.Config`."""

import dataclasses

from mha_jax.attention.rotary import Rotary
from mha_jax.models.decoder import Config, Local
from mha_jax.models.sizes import check_config


@dataclasses.dataclass(frozen=True)
class Modern:
    """Sizes of a decoder in today's ways: root mean square norms first, a gate, no biases, rotary positions.

    Args:
      width: Features of a token.
      num_heads: Query heads.
      num_kv_heads: Key-value heads.
      hidden: Inner width of the feed-forward layers.
      layers: How many there are.
      window: Tokens that a query sees, its own included.
      rotary_base: Of the rotary positions.
      qk_norm: "rms" or "layer" norms queries and keys; None leaves them.
      dropout: Rate on the embeddings and on the output of every sub-layer.

    Raises:
      ShapeError: A size or a rate cannot be meant.
    """

    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    hidden: int = 352
    layers: int = 3
    window: int = 64
    rotary_base: float = 10_000.0
    qk_norm: str | None = None
    dropout: float = 0.0

    def __post_init__(self):
        sizes = ("width", "num_heads", "num_kv_heads", "hidden", "layers", "window")
        check_config(self, "dropout", **dict.fromkeys(sizes, 1))

    def decoder(self, vocabulary: int) -> Config:
        """Return the decoder of these sizes for a vocabulary.

        >>> Modern(layers=2).decoder(11).layers[1].window
        64
        """
        return Config(
            vocabulary,
            self.width,
            self.hidden,
            self.num_heads,
            (Local(Rotary(base=self.rotary_base), self.window),) * self.layers,
            num_kv_heads=self.num_kv_heads,
            qk_norm=self.qk_norm,
            tied=True,
            dropout=self.dropout,
        )
