"""The adapters of a finished run put to use: exported, served, talked to, chosen among."""
