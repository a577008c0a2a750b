"""What is done with adapters that exist already: merged, compressed, aligned."""
