"""What an encoder may not see: maskers take sizes, draw on the right device and never synchronise with the host."""
