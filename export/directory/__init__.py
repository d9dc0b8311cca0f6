"""What lies on disk, and that it is whole."""
