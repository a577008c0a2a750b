"""The sections of a config whose keys do not depend on a method, a class each.

The fields of a class say all that is known of a key.
"""
