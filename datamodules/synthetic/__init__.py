"""Small synthetic archives in the official layouts."""
