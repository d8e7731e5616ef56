"""What a run shows: metrics files, pictures, and the HTML reports of one run and of a comparison."""
