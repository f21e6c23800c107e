"""Probes: what can be read out of activations, solved for many sites, folds and penalties together."""
