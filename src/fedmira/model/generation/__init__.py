"""Greedy generation for many clients side by side."""
