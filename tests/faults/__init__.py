"""What happens when something goes wrong: killed, full, damaged, hostile, out of memory, in many threads, for long."""
