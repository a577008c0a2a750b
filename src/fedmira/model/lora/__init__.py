"""LoRA for a whole cohort: stacked factors, and the branches that apply them."""
