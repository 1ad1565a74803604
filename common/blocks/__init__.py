"""Network parts without a paper's wiring."""
