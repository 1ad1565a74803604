"""Maskers decide what an encoder may not see. They draw on the right device and never synchronise with the host."""
