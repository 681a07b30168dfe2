"""The commands: from words to what they do, a file for each."""
