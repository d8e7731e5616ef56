"""Ways to start one run on several hosts: see README.md."""
