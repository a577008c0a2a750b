"""Passes without padding: layout, attention, losses, and the trial that admits them."""
