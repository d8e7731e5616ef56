"""Rectified-flow mathematics: noise schedules, deterministic solvers, latent packing."""
