"""What only a GPU can show, in one run: see ``__main__.py``."""

LEAN, TILES = "memory-lean layers", "tiles and offload"
DEEPSPEED, LIGER, PLAIN = "DeepSpeed's tiles", "Liger", "checkpointing"
SYSTEMS = (LEAN, TILES, DEEPSPEED, LIGER, PLAIN)
