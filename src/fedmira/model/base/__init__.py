"""The frozen base: its loading, its layers, its memory."""
