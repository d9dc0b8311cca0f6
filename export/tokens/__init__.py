"""How tokens are chosen, until a text ends."""
