"""The only code that knows transformers: verified families, and the patches with their patches."""
