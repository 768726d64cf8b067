"""Operators of this package that are compiled from csrc/, each beside its definition in torch."""
