"""Next-character LSTM, the usual model for Shakespeare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor, nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size


@checked("model", ConfigError)
class CharLSTM(HeadedNetwork):
    """Embedding, stacked LSTM, linear head; predicts the next character at every step.

    Args:
        input_shape: (steps,).
        num_classes: size of the vocabulary, of inputs and outputs.
        embedding: size of a character's vector.
        hidden: units of each LSTM layer.
        layers: how many LSTM layers.
    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        section 3 (LEAF, Caldas et al. 2018, scores the last character only).
    """

    takes_tokens = True

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        embedding: Size = 8,
        hidden: Size = 256,
        layers: Annotated[int, Ge(1), Le(100)] = 2,
    ):
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"model char_lstm needs sequences of token ids [steps], got examples of shape {list(input_shape)}; "
                "try model=mlp or, for images, lenet5"
            )
        self.embedding = nn.Embedding(num_classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, steps, hidden] from token ids x [batch, steps] int64."""
        states, _ = self.lstm(self.embedding(x))
        found: Tensor = states
        return found
