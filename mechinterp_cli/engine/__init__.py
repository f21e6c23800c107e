"""Sites, edits, trials and the executors that compute them."""
