"""The data sets of the command, and how their files are read."""
