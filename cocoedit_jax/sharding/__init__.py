"""Device meshes, the one table from logical axes to mesh axes, and FLOPs by formula."""
