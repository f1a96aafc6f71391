"""The baseline of normal: nearest neighbours (HNSW or exact) and distance to random groups."""
