"""How many rows a tile has: integers only, the same on every rank that has as many rows.

A row is a token, as flat as the module sees it. Nothing here needs the ranks to agree: weights are gathered once a
pass, whatever the number of tiles (engine/leaves.py).
"""

from deepspeed_alst.blocks import TiledMlpBlock

# Of what one row needs beside the layers' outputs: the gradient of each, and what the activations between them save.
_COPIES = 3
# Under it a matrix product no longer fills a GPU.
_FEWEST_ROWS = 256
# More rows than this have met a defect of cuBLAS (axolotl's pull request 3666).
_MOST_ROWS = 2**18
_ALIGNMENT = 64
# What "auto" gives to the rows, and the sums of weight gradients that it takes for a mixture's experts at once.
_AUTO_ROW_BYTES = 2**29
_AUTO_SUM_BYTES = 2**30


def row_bytes(output_features: int, element_size: int) -> int:
    """Bytes that a row of a tile needs in the backward, for layers with so many outputs in all."""
    return _COPIES * output_features * element_size


def sums_fit(budget: TiledMlpBlock, sum_bytes: int, bytes_per_row: int) -> bool:
    """Whether the fp32 sums of a module's weight gradients leave the least number of rows their room."""
    if budget.tile_bytes == "auto":
        return sum_bytes <= _AUTO_SUM_BYTES
    return sum_bytes + _FEWEST_ROWS * bytes_per_row <= budget.tile_bytes


def fewest_bytes(sum_bytes: int, bytes_per_row: int) -> int:
    """The smallest ``tile_bytes`` into which sums and rows fit."""
    return sum_bytes + _FEWEST_ROWS * bytes_per_row


def tile_rows(budget: TiledMlpBlock, rows: int, bytes_per_row: int, sum_bytes: int) -> int:
    """Rows of a tile; ``rows`` where the module is to stay whole.

    Tiles are as even as they can be, so that the last is not a sliver.

    Args:
        budget: what the user allows.
        rows: of the module's input.
        bytes_per_row: of a tile in the backward.
        sum_bytes: the fp32 sums of the weight gradients.
    """
    if budget.tile_tokens is not None:
        return min(rows, budget.tile_tokens)
    if rows == 0 or rows < budget.min_tokens:
        return rows
    left = _AUTO_ROW_BYTES if budget.tile_bytes == "auto" else budget.tile_bytes - sum_bytes
    fitting = max(_FEWEST_ROWS, min(_MOST_ROWS, left // max(1, bytes_per_row)) // _ALIGNMENT * _ALIGNMENT)
    even = -(-rows // -(-rows // fitting))
    return min(rows, -(-even // _ALIGNMENT) * _ALIGNMENT)
