"""What runs an export: sessions, their memory, decoders and encoders."""
