"""Services that every feature builds on."""
