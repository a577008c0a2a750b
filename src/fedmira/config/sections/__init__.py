"""The sections of a config whose keys do not depend on a method: a class each, whose fields say all that is known of a key."""
