"""`ablate`: take parts away and measure what breaks."""
