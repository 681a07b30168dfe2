"""The data sets of the command, and their files."""
