"""Names, layouts and files of the published codes, read and written."""
