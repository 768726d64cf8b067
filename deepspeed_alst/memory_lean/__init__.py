"""``alst.memory_lean_layer``: decoder layers in chunks of tokens, with the keys and values of the sequence resident."""
