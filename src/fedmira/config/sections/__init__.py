"""The sections of a config, apart from the method's: a class each, whose fields say all of a key."""
