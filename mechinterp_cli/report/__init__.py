"""Pictures, pages and the terminal view of a run."""
