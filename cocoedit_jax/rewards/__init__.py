"""Rewards: pixel consistency outside the edit region, judges of the edit, and their blend."""
