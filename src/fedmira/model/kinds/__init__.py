"""Kinds of adapters, and the folders that plain PEFT loads."""
