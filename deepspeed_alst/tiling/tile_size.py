"""Tile sizes in rows. Integers only; the same on every rank with the same number of rows.

A row is a token of the flattened input. Ranks need not agree on the sizes: weights are gathered once per pass, for
any number of tiles (tiling/zero3_leaf.py).
"""

from deepspeed_alst.config.schema import TiledMLPConfig

# Copies per row besides the layers' outputs: the gradient of each, and the activations' saved tensors.
_COPIES = 3
# Fewer rows do not saturate a GPU in a matrix product.
_FEWEST_ROWS = 256
# More rows trigger a cuBLAS bug (axolotl pull request 3666).
_MOST_ROWS = 2**18
_ALIGNMENT = 64
# Limits of "auto": bytes for rows, and for fp32 weight gradient sums of all experts at once.
_AUTO_ROW_BYTES = 2**29
_AUTO_SUM_BYTES = 2**30


def row_bytes(output_features: int, element_size: int) -> int:
    """Return the bytes per row of a tile in the backward, for the layers' total number of output features."""
    return _COPIES * output_features * element_size


def sums_fit(budget: TiledMLPConfig, sum_bytes: int, bytes_per_row: int) -> bool:
    """Return True if the fp32 sums of a module's weight gradients leave room for the fewest rows."""
    if budget.tile_bytes == "auto":
        return sum_bytes <= _AUTO_SUM_BYTES
    return sum_bytes + _FEWEST_ROWS * bytes_per_row <= budget.tile_bytes


def fewest_bytes(sum_bytes: int, bytes_per_row: int) -> int:
    """Return the smallest ``tile_bytes`` that fits the sums and the fewest rows."""
    return sum_bytes + _FEWEST_ROWS * bytes_per_row


def tile_rows(budget: TiledMLPConfig, rows: int, bytes_per_row: int, sum_bytes: int) -> int:
    """Return the rows of a tile; ``rows`` if the module is not tiled.

    Tiles are as even as possible, to avoid a tiny last one.

    Args:
        budget: the user's limits.
        rows: number of rows of the module's input.
        bytes_per_row: bytes per row of a tile in the backward.
        sum_bytes: bytes of the fp32 sums of the weight gradients.
    """
    if budget.tile_tokens is not None:
        return min(rows, budget.tile_tokens)
    if rows == 0 or rows < budget.min_tokens:
        return rows
    left = _AUTO_ROW_BYTES if budget.tile_bytes == "auto" else budget.tile_bytes - sum_bytes
    fitting = max(_FEWEST_ROWS, min(_MOST_ROWS, left // max(1, bytes_per_row)) // _ALIGNMENT * _ALIGNMENT)
    even = -(-rows // -(-rows // fitting))
    return min(rows, -(-even // _ALIGNMENT) * _ALIGNMENT)
