"""What waits for the backward: each saving of it beside what it costs."""
