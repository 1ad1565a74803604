"""Colour images of people with their genetics."""
