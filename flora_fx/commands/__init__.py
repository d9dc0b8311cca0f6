"""What each command of `flora-fx` does, and how it tells what came of it."""
