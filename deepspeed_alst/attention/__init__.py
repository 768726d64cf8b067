"""Ulysses attention: integer head plans, mask rules, and the two all-to-alls around the core."""
