"""The only transformers-specific code of the package: verified model families and model patches."""
