"""What is to be written: which paths, what goes together, where it stands in a pack. Nothing here changes the graph."""
