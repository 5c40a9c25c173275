"""Long experiments whose figures the docs quote; each is a command that says whether they hold."""
