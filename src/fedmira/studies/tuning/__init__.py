"""Settings chosen by validation loss: spaces, searches, trials, and what comparisons take."""
