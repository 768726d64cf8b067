"""Batch sharding: pure cutting of whole samples, and the loader that exchanges the shards."""
