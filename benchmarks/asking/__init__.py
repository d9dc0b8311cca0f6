"""What is typed for a suite, and what becomes of it."""
