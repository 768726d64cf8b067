"""From whole samples to shards: pure cutting, and the loader that exchanges the cuts."""
