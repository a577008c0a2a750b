"""A run whose clients are on machines of their own, or simulated by Flower."""
