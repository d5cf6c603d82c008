"""The commands of the program `relay`, and how they show progress."""
