"""Models: loading them safely, and the anatomy of a decoder."""
