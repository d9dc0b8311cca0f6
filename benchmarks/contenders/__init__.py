"""Who is compared: one model in all its forms, for whichever suite asks."""
