"""The dimension legend: one letter for each dimension that tensors in this project have.

| letter | dimension                  | letter | dimension                              |
|--------|----------------------------|--------|----------------------------------------|
| T      | packed tokens              | V      | vocabulary                             |
| S      | documents in a batch       | E      | experts                                |
| D      | model width                | N      | vector tokens of one modality          |
| H      | query heads                | C      | channels (or digits) of a vector token |
| G      | key-value heads            | L      | levels of one digit                    |
| K      | head width                 | M      | cached tokens                          |
| F      | MLP width                  | P      | pages                                  |
| A      | action dimensions          | R, W   | rows of a batch, tokens in a row       |
| h w f  | image height, width, video frames |  |                                        |

Public fields carry jaxtyping shapes (`Float[Tensor, "N C"]`); locals in tensor code carry suffixes (`q_THK`).
"""

IGNORE = -100
"""The label of a position that predicts nothing."""

MASK = -1.0
"""The value of a digit that is hidden from the model."""
