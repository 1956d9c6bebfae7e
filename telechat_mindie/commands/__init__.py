"""The commands, one function each: its arguments are the flags. What they work with is imported where it is used."""
