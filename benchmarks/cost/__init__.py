"""What dropping costs: time and memory."""
