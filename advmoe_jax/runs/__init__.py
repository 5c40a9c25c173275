"""One run in its directory, from config to report: the only room that reads a config."""
